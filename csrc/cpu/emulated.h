// AVX-512 and AMX by other instructions, so that the kernels for them can be tested where the
// processor lacks them (RNNKERN_EMULATE=1 in setup.py). What each computes is what Intel's manual
// says, and a fault there traps here; how fast, says nothing. Two faults of AMX's it cannot show:
// memory that the compiler does not know an instruction to read or write, and tiles that another
// library configures.
//
// RNNKERN_EMULATE_AVX512, _AVX512_BF16 and _AMX: what the compiler is not told to use. Vector types
// it makes of smaller registers itself; intrinsics become the functions here of the same names,
// which hide its own in the kernels' namespace.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef RNNKERN_EMULATE_AVX512
#define __AVX512F__ 1
#define __AVX512BW__ 1
#undef _mm512_cvtps_ph
#undef _mm512_fpclass_ps_mask
#undef _mm512_ternarylogic_epi32
#endif
#ifdef RNNKERN_EMULATE_AVX512_BF16
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif
#ifdef RNNKERN_EMULATE_AMX
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#endif

namespace rnnkern::cpu::RNNKERN_ISA {

inline void expect(bool right) {
  if (!right) __builtin_trap();
}

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Unsigned __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));

#ifdef RNNKERN_EMULATE_AVX512

// An element that the mask leaves out is not touched in memory.
template <class T, class V>
inline V load_masked(uint32_t mask, const void* from) {
  T to[sizeof(V) / sizeof(T)] = {};
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(to + i, static_cast<const T*>(from) + i, sizeof(T));
  }
  V v;
  std::memcpy(&v, to, sizeof v);
  return v;
}
template <class T, class V>
inline void store_masked(void* to, uint32_t mask, const V& v) {
  T from[sizeof(V) / sizeof(T)];
  std::memcpy(from, &v, sizeof v);
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(to) + i, from + i, sizeof(T));
  }
}
inline __m512d _mm512_maskz_loadu_pd(uint32_t mask, const void* p) {
  return load_masked<double, __m512d>(mask, p);
}
inline __m512 _mm512_maskz_loadu_ps(uint32_t mask, const void* p) {
  return load_masked<float, __m512>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi16(uint32_t mask, const void* p) {
  return load_masked<int16_t, __m256i>(mask, p);
}
inline void _mm512_mask_storeu_pd(void* p, uint32_t mask, const __m512d& v) {
  store_masked<double>(p, mask, v);
}
inline void _mm512_mask_storeu_ps(void* p, uint32_t mask, const __m512& v) {
  store_masked<float>(p, mask, v);
}
inline void _mm256_mask_storeu_epi16(void* p, uint32_t mask, const __m256i& v) {
  store_masked<int16_t>(p, mask, v);
}

// Two of F16C's.
inline __m512 _mm512_cvtph_ps(const __m256i& v) {
  __m128i halves[2];
  std::memcpy(halves, &v, sizeof v);
  const __m256 wide[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  __m512 out;
  std::memcpy(&out, wide, sizeof out);
  return out;
}
inline __m256i _mm512_cvtps_ph(const __m512& v, int) {  // to nearest
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof v);
  const __m128i narrow[2] = {_mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT)};
  __m256i out;
  std::memcpy(&out, narrow, sizeof out);
  return out;
}

inline __m512 _mm512_set1_ps(float x) { return (__m512)(x - Floats{}); }
inline __m512i _mm512_set1_epi32(int32_t x) { return (__m512i)(x + Ints{}); }
// Of two numbers the second, where one is a NaN or they are equal.
inline __m512 _mm512_min_ps(const __m512& a, const __m512& b) {
  return (__m512)((Floats)a < (Floats)b ? (Floats)a : (Floats)b);
}
inline __m512i _mm512_min_epi32(const __m512i& a, const __m512i& b) {
  return (__m512i)((Ints)a < (Ints)b ? (Ints)a : (Ints)b);
}
inline __m512i _mm512_max_epi32(const __m512i& a, const __m512i& b) {
  return (__m512i)((Ints)a > (Ints)b ? (Ints)a : (Ints)b);
}
// Bit 4a + 2b + c of the table.
inline __m512i _mm512_ternarylogic_epi32(const __m512i& a, const __m512i& b, const __m512i& c,
                                         int table) {
  Ints out = {};
  for (int i = 0; i < 8; ++i) {
    if (!(table >> i & 1)) continue;
    out |=
        (i & 4 ? (Ints)a : ~(Ints)a) & (i & 2 ? (Ints)b : ~(Ints)b) & (i & 1 ? (Ints)c : ~(Ints)c);
  }
  return (__m512i)out;
}
inline __m512 _mm512_permutex2var_ps(const __m512& a, const __m512i& index, const __m512& b) {
  float from[32], out[16];
  int32_t at[16];
  std::memcpy(from, &a, sizeof a);
  std::memcpy(from + 16, &b, sizeof b);
  std::memcpy(at, &index, sizeof index);
  for (int i = 0; i < 16; ++i) out[i] = from[at[i] & 31];
  __m512 v;
  std::memcpy(&v, out, sizeof v);
  return v;
}
// Of the classes NaN (0x81), infinity (0x08) and minus infinity (0x10).
inline uint16_t _mm512_fpclass_ps_mask(const __m512& v, int classes) {
  expect((classes & ~0x99) == 0);
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const float x = v[i];
    const bool is = (classes & 0x81 && std::isnan(x)) || (classes & 0x08 && x == INFINITY) ||
                    (classes & 0x10 && x == -INFINITY);
    mask |= static_cast<uint16_t>(is << i);
  }
  return mask;
}

#endif

// What the bfloat16 instructions take and give for a number: zero for a subnormal one.
inline Floats without_subnormal(const Floats& v) {
  const Unsigned bits = (Unsigned)v;
  const Unsigned tiny = (Unsigned)((bits & 0x7f800000u) == 0u);
  return (Floats)(bits & ~(tiny & 0x7fffffffu));
}
// Of pairs of bfloat16 in 32 bits, the first (0) or the second (1).
inline Floats one_of_pair(const Ints& pairs, int second) {
  const Unsigned bits = (Unsigned)pairs;
  return without_subnormal((Floats)(second ? bits & 0xffff0000u : bits << 16));
}
inline Floats add_product(const Floats& sum, const Floats& a, const Floats& b) {
  return without_subnormal(without_subnormal(sum) + a * b);
}
// Sums of four products, each of an unsigned and a signed byte.
inline Ints add_bytes(Ints sum, const Ints& a, const Ints& b) {
  for (int i = 0; i < 32; i += 8) {
    sum += (Ints)(((Unsigned)a >> i) & 0xffu) * ((Ints)((Unsigned)b << (24 - i)) >> 24);
  }
  return sum;
}

#ifdef RNNKERN_EMULATE_AVX512_BF16

// To nearest, ties to even.
inline Shorts _mm512_cvtneps_pbh(const __m512& v) {
  const Unsigned bits = (Unsigned)without_subnormal((Floats)v);
  const Unsigned nan = (Unsigned)((Floats)v != (Floats)v);
  const Unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Unsigned quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((rounded & ~nan) | (quiet & nan), Shorts);
}
inline __m512bh _mm512_cvtne2ps_pbh(const __m512& upper, const __m512& lower) {
  const Shorts halves[2] = {_mm512_cvtneps_pbh(lower), _mm512_cvtneps_pbh(upper)};
  __m512bh out;
  std::memcpy(&out, halves, sizeof out);
  return out;
}
inline __m512 _mm512_dpbf16_ps(const __m512& sum, const __m512bh& a, const __m512bh& b) {
  const Floats seconds = add_product((Floats)sum, one_of_pair((Ints)a, 1), one_of_pair((Ints)b, 1));
  return (__m512)add_product(seconds, one_of_pair((Ints)a, 0), one_of_pair((Ints)b, 0));
}
inline __m512i _mm512_dpbusd_epi32(const __m512i& sum, const __m512i& a, const __m512i& b) {
  return (__m512i)add_bytes((Ints)sum, (Ints)a, (Ints)b);
}

#endif

#ifdef RNNKERN_EMULATE_AMX

// The tiles of a thread. What a load leaves beyond its rows and bytes is zero.
struct Tiles {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config;
  Ints rows[8][16];
};
inline thread_local Tiles tiles;

inline void _tile_loadconfig(const void* from) {
  auto& config = tiles.config;
  std::memcpy(&config, from, sizeof config);
  expect(config.palette <= 1 && config.start_row == 0);
  for (int i = 0; i < 16; ++i) {
    expect(config.bytes[i] <= (i < 8 ? 64 : 0) && config.rows[i] <= (i < 8 ? 16 : 0));
  }
  if (config.palette == 0) config = {};
  std::memset(tiles.rows, 0, sizeof tiles.rows);
}
inline void _tile_storeconfig(void* to) { std::memcpy(to, &tiles.config, sizeof tiles.config); }
inline void expect_configured(int tile) {
  expect(tiles.config.rows[tile] > 0 && tiles.config.bytes[tile] > 0);
}
inline void _tile_zero(int tile) {
  expect_configured(tile);
  std::memset(tiles.rows[tile], 0, sizeof tiles.rows[tile]);
}
inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  _tile_zero(tile);
  for (int i = 0; i < tiles.config.rows[tile]; ++i) {
    std::memcpy(&tiles.rows[tile][i], static_cast<const char*>(from) + i * stride,
                tiles.config.bytes[tile]);
  }
}
inline void _tile_stored(int tile, void* to, int64_t stride) {
  expect_configured(tile);
  for (int i = 0; i < tiles.config.rows[tile]; ++i) {
    std::memcpy(static_cast<char*>(to) + i * stride, &tiles.rows[tile][i],
                tiles.config.bytes[tile]);
  }
}
inline void expect_product(int c, int a, int b) {
  const auto& [palette, start_row, reserved, bytes, rows] = tiles.config;
  for (const int tile : {a, b, c}) expect_configured(tile);
  expect(a != b && b != c && c != a);
  expect(rows[c] == rows[a] && bytes[c] == bytes[b] && bytes[a] == 4 * rows[b]);
}
// With subnormal numbers taken for zero, and made zero, by the processor: no compiler may move this
// out of there.
__attribute__((noinline)) inline void multiply_tiles(int c, int a, int b) {
  Floats columns[16][2];
  for (int k = 0; k < tiles.config.rows[b]; ++k) {
    const Unsigned pairs = (Unsigned)tiles.rows[b][k];
    columns[k][0] = (Floats)(pairs << 16);
    columns[k][1] = (Floats)(pairs & 0xffff0000u);
  }
  for (int i = 0; i < tiles.config.rows[c]; ++i) {
    Floats sums[2] = {};
    for (int k = 0; k < tiles.config.rows[b]; ++k) {
      const Unsigned pair = (Unsigned)(tiles.rows[a][i][k] + Ints{});
      sums[0] += (Floats)(pair << 16) * columns[k][0];
      sums[1] += (Floats)(pair & 0xffff0000u) * columns[k][1];
    }
    tiles.rows[c][i] = (Ints)((Floats)tiles.rows[c][i] + (sums[0] + sums[1]));
  }
}
inline void _tile_dpbf16ps(int c, int a, int b) {
  expect_product(c, a, b);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | _MM_FLUSH_ZERO_ON | 0x40);  // 0x40: and those that come
  multiply_tiles(c, a, b);
  _mm_setcsr(before);
}
inline void _tile_dpbusd(int c, int a, int b) {
  expect_product(c, a, b);
  for (int i = 0; i < tiles.config.rows[c]; ++i) {
    for (int k = 0; k < tiles.config.rows[b]; ++k) {
      const Ints bytes = tiles.rows[a][i][k] + Ints{};
      tiles.rows[c][i] = add_bytes(tiles.rows[c][i], bytes, tiles.rows[b][k]);
    }
  }
}

#endif

}  // namespace rnnkern::cpu::RNNKERN_ISA
