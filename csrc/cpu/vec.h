// Vectors for one instruction set, on the compilers' own vector types: the same source makes SSE2,
// AVX2, AVX-512 and NEON code. RNNKERN_VECTOR_BYTES is the register width; all of it lives in
// RNNKERN_ISA, a namespace of its own for each instruction set.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#include "tanh_table.h"
#endif

namespace rnnkern::cpu::RNNKERN_ISA {

#define RNNKERN_INLINE inline __attribute__((always_inline))

template <class A>
constexpr int kLanes = RNNKERN_VECTOR_BYTES / static_cast<int>(sizeof(A));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(RNNKERN_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(RNNKERN_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(RNNKERN_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(RNNKERN_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using Bits = typename VecOf<A>::bits;
typedef uint32_t Words __attribute__((vector_size(RNNKERN_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(RNNKERN_VECTOR_BYTES / 2)));

// Loads and stores at any address.
template <class V>
RNNKERN_INLINE V load_vec(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
RNNKERN_INLINE void store_vec(void* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Subtracting zero, unlike adding it, changes no value, so the compiler makes this a plain
// broadcast.
template <class A>
RNNKERN_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

// ---- storage types: how elements lie in memory, and the type they are computed in ----

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Acc: the type. Raw: a vector's worth of elements as they lie.
template <class S>
struct Storage {  // float, double: computed as they are
  using Acc = S;
  using Raw = Vec<S>;
  static RNNKERN_INLINE Vec<S> widen(const Raw& v) { return v; }
  static RNNKERN_INLINE Raw narrow(const Vec<S>& v) { return v; }
};

template <>
struct Storage<BFloat16> {
  using Acc = float;
  using Raw = HalfWords;
  static RNNKERN_INLINE Vec<float> widen(const HalfWords& h) {
    return (Vec<float>)(__builtin_convertvector(h, Words) << 16);
  }
  // To nearest, ties to even; a NaN stays one (the increment could carry it into infinity).
  static RNNKERN_INLINE HalfWords narrow(const Vec<float>& v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = (Words)(v != v);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), HalfWords);
  }
};

#if RNNKERN_VECTOR_BYTES == 64 && defined(__F16C__)
RNNKERN_INLINE Vec<float> widen_half(const HalfWords& h) {
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
}
RNNKERN_INLINE HalfWords narrow_half(const Vec<float>& v) {
  return (HalfWords)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif RNNKERN_VECTOR_BYTES == 32 && defined(__F16C__)
RNNKERN_INLINE Vec<float> widen_half(const HalfWords& h) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
}
RNNKERN_INLINE HalfWords narrow_half(const Vec<float>& v) {
  return (HalfWords)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Without conversion instructions, by arithmetic that rounds as the hardware does. Widening: shift
// the exponent into place and rescale by 2^112, which also makes the subnormals right. Narrowing:
// adding and removing a magic number rounds the mantissa to the 10 bits (fewer for subnormals) that
// half keeps.
RNNKERN_INLINE Vec<float> widen_half(const HalfWords& h) {
  const Words w = __builtin_convertvector(h, Words);
  const Words magnitude = (w & 0x7fffu) << 13;
  const Words special = (Words)((w & 0x7c00u) == 0x7c00u);  // infinity and NaN
  const Words scaled = (Words)((Vec<float>)magnitude * 0x1p112f);
  return (Vec<float>)(((scaled & ~special) | ((magnitude | 0x7f800000u) & special)) |
                      ((w & 0x8000u) << 16));
}
RNNKERN_INLINE HalfWords narrow_half(const Vec<float>& v) {
  const Words bits = (Words)v, magnitude = bits & 0x7fffffffu;
  const Words nan = (Words)(v != v);
  const Words large = (Words)(magnitude >= 0x477ff000u);     // 65520 and up round to infinity
  const Words subnormal = (Words)(magnitude < 0x38800000u);  // below 2^-14
  const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // In [0.5, 1) a float's last bit is 2^-24, the smallest half.
  const Words tiny = (Words)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  Words out = (tiny & subnormal) | (normal & ~subnormal);
  out = (out & ~large) | (0x7c00u & large);
  out = (out & ~nan) | (0x7e00u & nan);
  return __builtin_convertvector(out | ((bits >> 16) & 0x8000u), HalfWords);
}
#endif

template <>
struct Storage<Half> {
  using Acc = float;
  using Raw = HalfWords;
  static RNNKERN_INLINE Vec<float> widen(const HalfWords& h) { return widen_half(h); }
  static RNNKERN_INLINE HalfWords narrow(const Vec<float>& v) { return narrow_half(v); }
};

// float32 rows, and a state in [-1, 1] that meets a weight of 8 bits as 8 bits itself.
struct Quantized {
  float value;
};
// float32, multiplied as sums of three bfloat16.
struct Split {
  float value;
};

template <>
struct Storage<Quantized> : Storage<float> {};
template <>
struct Storage<Split> : Storage<float> {};

template <class S>
using AccVec = Vec<typename Storage<S>::Acc>;

template <class S>
RNNKERN_INLINE AccVec<S> load_all(const S* p) {
  return Storage<S>::widen(load_vec<typename Storage<S>::Raw>(p));
}
template <class S>
RNNKERN_INLINE void store_all(S* p, const AccVec<S>& v) {
  store_vec(p, Storage<S>::narrow(v));
}

// The first n of a vector's elements, in a half, a quarter, ... of it.
template <class S>
RNNKERN_INLINE void copy_part(S* to, const S* from, int64_t n) {
  const uint64_t count = n > 0 ? n : 0;
#pragma GCC unroll 8
  for (uint64_t piece = kLanes<typename Storage<S>::Acc> / 2; piece > 0; piece /= 2) {
    if (count & piece) {
      const uint64_t done = count & ~(2 * piece - 1);
      __builtin_memcpy(to + done, from + done, piece * sizeof(S));
    }
  }
}

// The first n elements only: the end of a row whose length is no multiple of the vector's.
template <class S>
RNNKERN_INLINE AccVec<S> load_part(const S* p, int64_t n) {
  constexpr int lanes = kLanes<typename Storage<S>::Acc>;
  if (n >= lanes) return load_all(p);
#ifdef __AVX512BW__
  const uint32_t first = n > 0 ? (1u << n) - 1 : 0;
  typename Storage<S>::Raw part;
  if constexpr (sizeof(S) == 8) part = (decltype(part))_mm512_maskz_loadu_pd(first, p);
  if constexpr (sizeof(S) == 4) part = (decltype(part))_mm512_maskz_loadu_ps(first, p);
  if constexpr (sizeof(S) == 2) part = (decltype(part))_mm256_maskz_loadu_epi16(first, p);
  return Storage<S>::widen(part);
#else
#if RNNKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  if constexpr (sizeof(S) >= 4) {  // else vectors are loaded of parts, for which a core waits
    constexpr int64_t each = sizeof(S) / 4, whole = 8;
    alignas(64) static constexpr int32_t ones[2 * whole] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const auto first = load_vec<__m256i>(ones + whole - (n > 0 ? n : 0) * each);
    const auto part = _mm256_maskload_ps(reinterpret_cast<const float*>(p), first);
    return Storage<S>::widen((typename Storage<S>::Raw)part);
  }
#endif
  S part[lanes] = {};
  copy_part(part, p, n);
  return load_all(part);
#endif
}
template <class S, class V>
RNNKERN_INLINE void store_part(S* p, const V& v, int64_t n) {
  constexpr int lanes = kLanes<typename Storage<S>::Acc>;
  if (n >= lanes) return store_all(p, v);
#ifdef __AVX512BW__
  const uint32_t first = n > 0 ? (1u << n) - 1 : 0;
  const auto part = Storage<S>::narrow(v);
  if constexpr (sizeof(S) == 8) _mm512_mask_storeu_pd(p, first, (__m512d)part);
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, first, (__m512)part);
  if constexpr (sizeof(S) == 2) _mm256_mask_storeu_epi16(p, first, (__m256i)part);
#else
  S part[lanes];
  store_all(part, v);
  copy_part(p, part, n);
#endif
}

// What is left of v when it is stored.
template <class S>
RNNKERN_INLINE AccVec<S> rounded(const AccVec<S>& v) {
  return Storage<S>::widen(Storage<S>::narrow(v));
}

// One element, as it is computed.
template <class S>
RNNKERN_INLINE auto load_one(const S* p) {
  if constexpr (std::is_same_v<S, typename Storage<S>::Acc>) {
    return *p;
  } else if constexpr (std::is_same_v<S, Split>) {
    return p->value;
  } else {
    return load_part(p, 1)[0];
  }
}

// ---- what a scan multiplies: how the elements of states and packed matrices lie ----

constexpr int kTileRows = 32, kTileDepth = 16;  // amx.h: rows, and elements, taken at a time

// As they are computed: one k to an element.
template <class S>
struct Dot {
  using A = typename Storage<S>::Acc;
  using Element = A;
  static constexpr int kDepth = 1;       // k's to an element
  static constexpr int kSums = 0;        // vectors of column sums behind a panel's elements
  static constexpr int kPlanes = 1;      // elements whose sum is one number
  static constexpr bool kTiles = false;  // whether the processor multiplies whole tiles (amx.h)
  static RNNKERN_INLINE Vec<A> broadcast(const Element& a) { return a - Vec<A>{}; }
  // acc + a * b.
  static RNNKERN_INLINE Vec<A> add(const Vec<A>& acc, const Vec<A>& a, const Vec<A>& b) {
    return acc + a * b;
  }
  static RNNKERN_INLINE Vec<A> sum(const Vec<A>& a, const Vec<A>& b) { return a + b; }
  // Rows k .. k + kDepth - 1 of a matrix as elements.
  static RNNKERN_INLINE Vec<A> join(const Vec<A>* rows) { return rows[0]; }
  static RNNKERN_INLINE void store(Element* row, int64_t column, const Vec<A>& v) {
    store_vec(row + column, v);
  }
};

#ifdef __AVX512BF16__
// Two k's to an element, for the instruction that multiplies pairs of bfloat16 and adds them up in
// float32: twice the products, of half the memory. It takes subnormal numbers for zero.
template <>
struct Dot<BFloat16> {
  using A = float;
  using Element = uint32_t;
  static constexpr int kDepth = 2, kSums = 0, kPlanes = 1;
#ifdef __AMX_BF16__
  static constexpr bool kTiles = true;
#else
  static constexpr bool kTiles = false;
#endif
  static RNNKERN_INLINE Vec<A> broadcast(const Element& a) { return (Vec<A>)(Words{} + a); }
  static RNNKERN_INLINE Vec<A> add(const Vec<A>& acc, const Vec<A>& a, const Vec<A>& b) {
    return (Vec<A>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static RNNKERN_INLINE Vec<A> sum(const Vec<A>& a, const Vec<A>& b) { return a + b; }
  static RNNKERN_INLINE Vec<A> join(const Vec<A>* rows) {  // both exactly bfloat16
    return (Vec<A>)(((Words)rows[0] >> 16) | ((Words)rows[1] & 0xffff0000u));
  }
  static RNNKERN_INLINE void store(Element* row, int64_t column, const Vec<A>& v) {
    store_vec(reinterpret_cast<uint16_t*>(row) + column, Storage<BFloat16>::narrow(v));
  }
  static RNNKERN_INLINE void store_pair(Element* row, int64_t column, const Vec<A>& v,
                                        const Vec<A>& w) {  // both exactly bfloat16
    store_vec(row + column / kDepth, _mm512_cvtne2ps_pbh((__m512)w, (__m512)v));
  }
};
#endif

#ifdef __AMX_BF16__
// A float32 is the sum of three bfloat16 x0 + x1 + x2, each what the ones before it leave, to
// nearest, ties away from zero: 8 bits each of its 24. Of the nine products of two such sums the
// six largest are added up, x0 y0, x0 y1, x1 y0, x1 y1, x0 y2 and x2 y0; the others are each below
// 2^-24 of the whole, half of float32's last bit. (The idea is Henry, Tang and Heinecke's,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
// ARITH 2019.) At their peaks AMX makes six of them in 6/16 of the time that AVX-512 takes for one
// product of float32.
//
// Where a number is infinite, or so large that x0 would be, the sums are infinite or NaN: they are
// then made again by multiply-adds. Subnormal numbers, and x1 and x2 below 2^-126, count as zero.
//
// The planes of a tile's depth lie one behind the other.
template <>
struct Dot<Split> {
  using A = float;
  using Element = uint32_t;
  static constexpr int kDepth = 2, kSums = 0, kPlanes = 3;
  static constexpr bool kTiles = true;
  static RNNKERN_INLINE Vec<A> sum(const Vec<A>& a, const Vec<A>& b) { return a + b; }
  // The planes of rows k and k + 1, which are changed. The last are what is left: no more than 8
  // bits, or a NaN.
  static RNNKERN_INLINE void split(Vec<A>* rows, Vec<A>* planes) {
#pragma GCC unroll 3
    for (int plane = 0; plane < kPlanes; ++plane) {
      if (plane + 1 < kPlanes) {
        const Vec<A> high[] = {nearest(rows[0]), nearest(rows[1])};
        planes[plane] = Dot<BFloat16>::join(high);
        rows[0] -= high[0];
        rows[1] -= high[1];
      } else {
        planes[plane] = Dot<BFloat16>::join(rows);
      }
    }
  }
  static RNNKERN_INLINE void store(Element* row, int64_t column, Vec<A> v) {
    constexpr int wide = kDepth * kTileDepth;
    auto* to = reinterpret_cast<uint16_t*>(row) + column / wide * wide * kPlanes + column % wide;
#pragma GCC unroll 3
    for (int plane = 0; plane < kPlanes; ++plane) {
      const Vec<A> part = plane + 1 == kPlanes ? v : nearest(v);
      store_vec(to + plane * wide, narrow(part));
      v -= part;
    }
  }
  // Two vectors side by side, as whole rows of a tile: what is stored in halves, a tile's load
  // waits for.
  static RNNKERN_INLINE void store_pair(Element* row, int64_t column, Vec<A> v, Vec<A> w) {
    constexpr int wide = kDepth * kTileDepth;
    Element* to = row + column / wide * kTileDepth * kPlanes;
#pragma GCC unroll 3
    for (int plane = 0; plane < kPlanes; ++plane) {
      const bool last = plane + 1 == kPlanes;
      const Vec<A> x = last ? v : nearest(v), y = last ? w : nearest(w);
      store_vec(to + plane * kTileDepth, _mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
      v -= x;
      w -= y;
    }
  }

 private:
  static RNNKERN_INLINE HalfWords narrow(const Vec<A>& v) {
    return (HalfWords)_mm512_cvtneps_pbh((__m512)v);
  }
  // Its first 8 bits; ties away from zero, and some NaNs are lost, which the last plane keeps.
  static RNNKERN_INLINE Vec<A> nearest(const Vec<A>& v) {
    return (Vec<A>)(((Words)v + 0x8000u) & 0xffff0000u);
  }
};

RNNKERN_INLINE bool all_finite(const Vec<float>& v) {
  constexpr int nans_and_infinities = 0x99;
  return _mm512_fpclass_ps_mask((__m512)v, nans_and_infinities) == 0;
}
#endif

// Four k's to an element: of the state as unsigned bytes 127 h + 128, of the weight as signed ones.
// The sums are exact integers, the same on every instruction set. Behind a panel's elements lies
// what the 128 has added to each column.
template <>
struct Dot<Quantized> {
  using A = float;  // the bits of an int32, until finish()
  using Element = uint32_t;
  static constexpr int kDepth = 4, kSums = 1, kPlanes = 1;
#ifdef __AMX_INT8__
  static constexpr bool kTiles = true;
#else
  static constexpr bool kTiles = false;
#endif
  static RNNKERN_INLINE Vec<A> broadcast(const Element& a) { return (Vec<A>)(Words{} + a); }
  static RNNKERN_INLINE Vec<A> add(const Vec<A>& acc, const Vec<A>& a, const Vec<A>& b) {
#ifdef __AVX512VNNI__
    return (Vec<A>)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
    Bits<A> sum = (Bits<A>)acc;
    for (int i = 0; i < 32; i += 8) {
      sum += (Bits<A>)(((Words)a >> i) & 0xffu) * ((Bits<A>)((Words)b << (24 - i)) >> 24);
    }
    return (Vec<A>)sum;
#endif
  }
  static RNNKERN_INLINE Vec<A> sum(const Vec<A>& a, const Vec<A>& b) {
    return (Vec<A>)((Bits<A>)a + (Bits<A>)b);
  }
  // The number that a sum stands for; scale: of the columns' weights.
  static RNNKERN_INLINE Vec<A> finish(const Vec<A>& c, const Element* added, const Vec<A>& scale) {
    const Bits<A> sum = (Bits<A>)c - load_vec<Bits<A>>(added);
    return __builtin_convertvector(sum, Vec<A>) * (scale * (1 / 127.0f));
  }
  static RNNKERN_INLINE void store(Element* row, int64_t column, const Vec<A>& v) {
    // To nearest: adding 1.5 2^23 leaves the rounded number in the low bits.
    const Vec<A> shifted = v * 127.0f + (0x1.8p23f + 128.0f);
    typedef uint8_t Bytes __attribute__((vector_size(RNNKERN_VECTOR_BYTES / 4)));
    const Bytes bytes = __builtin_convertvector((Words)shifted & 0xffu, Bytes);
    store_vec(reinterpret_cast<uint8_t*>(row) + column, bytes);
  }
};

// ---- transposing ----

// Lane j is lane from[j] of a and b, one after the other.
template <class V, class B, int... from>
RNNKERN_INLINE V shuffle(const V& a, const V& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, from...);
#else
  return __builtin_shuffle(a, b, B{from...});
#endif
}

// Exchanges the off-diagonal quarters of every 2s x 2s block.
template <class A, int s, int... j>
RNNKERN_INLINE void exchange(Vec<A>* rows, std::integer_sequence<int, j...>) {
  constexpr int lanes = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & s) continue;
    const Vec<A> upper = rows[i], lower = rows[i + s];
    rows[i] = shuffle<Vec<A>, Bits<A>, ((j & s) ? lanes + j - s : j)...>(upper, lower);
    rows[i + s] = shuffle<Vec<A>, Bits<A>, ((j & s) ? lanes + j : j + s)...>(upper, lower);
  }
}

// A square block of as many rows as a vector has lanes, in log2 of them rounds.
template <class A, int s = kLanes<A> / 2>
RNNKERN_INLINE void transpose(Vec<A>* rows) {
  exchange<A, s>(rows, std::make_integer_sequence<int, kLanes<A>>());
  if constexpr (s > 1) transpose<A, s / 2>(rows);
}

// ---- the primitives of activation.h ----

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
      inverse[i] = reciprocal(d[i]);
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
  // To 14 bits at least: the correction that follows doubles them.
  static RNNKERN_INLINE V reciprocal(const V& d) {
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4) return (V)_mm512_rcp14_ps((__m512)d);
#endif
    return A(1) / d;
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
