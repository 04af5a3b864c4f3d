// What a scan multiplies: how the elements of states and packed matrices lie, and what their
// product is, by storage type.
#pragma once
#include "vec.h"

namespace rnnkern::cpu::RNNKERN_ISA {

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

}  // namespace rnnkern::cpu::RNNKERN_ISA
