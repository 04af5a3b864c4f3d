// The primitives of activation.h on vectors.
#pragma once
#include "vec.h"

#ifdef __AVX512F__
#include "tanh_table.h"
#endif

namespace rnnkern::cpu::RNNKERN_ISA {

template <class A>
struct TanhConstants;
// saturation: where tanh rounds to 1. underflow: where exp(-2a) leaves the normal numbers. shift:
// adding it leaves round(x) in the low bits. half_ln2 = hi + lo with few enough bits in hi that n *
// hi is exact. degree: of expm1's series on [0, ln2/2], whose remainder then stays below half an
// ulp.
template <>
struct TanhConstants<float> {
  static constexpr float saturation = 9.02f, underflow = 43.6685f, shift = 0x1.8p23f,
                         two_over_ln2 = 0x1.715476p1f;
  static constexpr float half_ln2_hi = 0x1.62e4p-2f, half_ln2_lo = 0x1.7f7d1cp-21f;
  static constexpr int mantissa = 23, degree = 8;
  static constexpr int32_t sign = INT32_MIN, one = 0x3f800000;
};
template <>
struct TanhConstants<double> {
  static constexpr double saturation = 19.07, underflow = 354.1985, shift = 0x1.8p52,
                          two_over_ln2 = 0x1.71547652b82fep1;
  static constexpr double half_ln2_hi = 0x1.62e42fefap-2, half_ln2_lo = 0x1.cf79abc9e3b3ap-41;
  static constexpr int mantissa = 52, degree = 14;
  static constexpr int64_t sign = INT64_MIN, one = 0x3ff0000000000000;
};

template <class A>
struct VecMath {
  using V = Vec<A>;
  using B = Bits<A>;
  using C = TanhConstants<A>;

  static RNNKERN_INLINE V one(const V&) { return broadcast(A(1)); }

  static RNNKERN_INLINE V tanh(const V& x) {
    V one[1] = {x};
    tanh<1>(one);
    return one[0];
  }

  // Of n vectors in step: each is one long chain of operations, of which a processor's scheduler
  // holds few (a step of 16 rows of H 16: 247 ns, 277 one by one).
  template <int n>
  static RNNKERN_INLINE void tanh(V* x) {
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4) return tanh_by_table<n>(x);
#endif
    tanh_by_expm1<n>(x);
  }

  // 1 / (1 + exp(-a)): with e = expm1(|a|), (e + 1) / (e + 2) or, for negative a, 1 / (e + 2).
  static RNNKERN_INLINE V sigmoid(const V& a) {
    V e = (a < A(0) ? -a : a) * A(0.5);
    expm1_twice<1>(&e, C::underflow);
    const V y = (a < A(0) ? one(a) : e + A(1)) / (e + A(2));
    return a < A(-2) * C::underflow ? V{} : y;
  }

  static RNNKERN_INLINE V relu(const V& a) { return a < A(0) ? V{} : a; }  // NaN stays NaN
  static RNNKERN_INLINE V step(const V& h) { return h <= A(0) ? V{} : one(h); }

  static RNNKERN_INLINE V softplus(const V& a) {
    return each(a, [](A x) {
      // max(x, 0) + log1p(exp(-|x|)); written so that NaN passes
      return (x < A(0) ? A(0) : x) + A(__builtin_log1p(__builtin_exp(x < A(0) ? x : -x)));
    });
  }
  static RNNKERN_INLINE V expm1(const V& a) {
    return each(a, [](A x) { return A(__builtin_expm1(x)); });
  }

 private:
  // tanh a = e / (e + 2) with e = expm1(2a). Relative accuracy holds down to zero, as expm1's does.
  template <int n>
  static RNNKERN_INLINE void tanh_by_expm1(V* x) {
    B sign[n];
    V e[n], d[n], lost[n], inverse[n], t[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      sign[i] = (B)x[i] & C::sign;
      e[i] = (V)((B)x[i] ^ sign[i]);
    }
    expm1_twice<n>(e, C::saturation);
    // One correction by the residual, which also knows what e + 2 lost: 2 ulp at most, 2.2
    // without fused multiply-add; otherwise 2.6.
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      d[i] = e[i] + A(2);
      inverse[i] = A(1) / d[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      lost[i] = e[i] - (d[i] - A(2));
      t[i] = e[i] * inverse[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      t[i] += (e[i] - t[i] * d[i] - t[i] * lost[i]) * inverse[i];
      x[i] = (V)((B)t[i] | sign[i]);
    }
  }

#ifdef __AVX512F__
  // A polynomial for each of 31 intervals of |x|; two registers' permutation finds a coefficient.
  // 1 ulp at most. A vector takes 2.7 ns, and 10 one after another; by expm1 4.6 and 26.
  template <int n>
  static RNNKERN_INLINE void tanh_by_table(V* x) {
    B at[n];
    V t[n], q[n];
    const auto entry = [&](int row, int i) __attribute__((always_inline)) {
      return (V)_mm512_permutex2var_ps(load_vec<__m512>(kTanhTable[row]), (__m512i)at[i],
                                       load_vec<__m512>(kTanhTable[row] + kLanes<A>));
    };
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const B a = (B)x[i] & ~C::sign;
      const __m512i least = _mm512_max_epi32((__m512i)a, _mm512_set1_epi32(kTanhLeast));
      at[i] = (B)_mm512_min_epi32(least, _mm512_set1_epi32(kTanhMost)) >> kTanhShift;
      t[i] = (V)_mm512_min_ps(_mm512_set1_ps(C::saturation), (__m512)a);  // NaN stays NaN
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) t[i] -= entry(0, i);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const V high = entry(5, i) + entry(6, i) * t[i];
      q[i] = (entry(3, i) + entry(4, i) * t[i]) + (t[i] * t[i]) * high;
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) q[i] = entry(2, i) + t[i] * q[i];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      q[i] = entry(1, i) + t[i] * q[i];
      constexpr int third_chooses = 0xd8;  // the second's bits where it is 1, else the first's
      const __m512i sign = _mm512_set1_epi32(C::sign);
      x[i] = (V)_mm512_ternarylogic_epi32((__m512i)q[i], (__m512i)x[i], sign, third_chooses);
    }
  }
#endif

  // expm1(2a) of each a >= 0, held at `limit`: 2^m expm1(2r) + 2^m - 1 with a = m ln2/2 + r. NaN
  // passes.
  template <int n>
  static RNNKERN_INLINE void expm1_twice(V* x, A limit) {
    V shifted[n], r[n], q[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      x[i] = x[i] > limit ? broadcast(limit) : x[i];
      shifted[i] = x[i] * C::two_over_ln2 + C::shift;
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const V m = shifted[i] - C::shift;
      r[i] = x[i] - m * C::half_ln2_hi;
      r[i] = (r[i] - m * C::half_ln2_lo) * A(2);
      q[i] = broadcast(inverse_factorial(C::degree));
    }
    // expm1(r) = r + r^2 q(r): the large term is added last, so that it is rounded once.
#pragma GCC unroll 16
    for (int k = C::degree - 1; k >= 2; --k) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) q[i] = q[i] * r[i] + inverse_factorial(k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const V scale = (V)(((B)shifted[i] << C::mantissa) + C::one);
      x[i] = scale * (r[i] + (r[i] * r[i]) * q[i]) + (scale - A(1));
    }
  }
  static constexpr A inverse_factorial(int n) {
    double f = 1;
    for (int i = 2; i <= n; ++i) f *= i;
    return static_cast<A>(1 / f);
  }
  template <class F>
  static RNNKERN_INLINE V each(const V& a, F f) {
    V out = {};
    for (int i = 0; i < kLanes<A>; ++i) out[i] = f(a[i]);
    return out;
  }
};

}  // namespace rnnkern::cpu::RNNKERN_ISA
