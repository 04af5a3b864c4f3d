// Vectors for one instruction set, on the compilers' own vector types: the same source makes SSE2,
// AVX2, AVX-512 and NEON code. RNNKERN_VECTOR_BYTES is the register width; all of it lives in
// RNNKERN_ISA, a namespace of its own for each instruction set.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef RNNKERN_EMULATED
#include "emulated.h"
#elif defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
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

}  // namespace rnnkern::cpu::RNNKERN_ISA
