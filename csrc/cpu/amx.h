// Products by AMX, whose registers are tiles: one instruction multiplies 16 rows of the state by 16
// columns of a panel, over 16 elements (32 bfloat16 or 64 bytes). The depth of states and of packed
// panels is whole tiles, and a panel's tiles lie together (place_in_panel).
//
// Of more than 16 rows, two tiles of rows meet two of columns, so that each load serves twice:
// columns come from the second-level cache at about the speed at which one product uses them.
#pragma once
#include "product.h"

namespace rnnkern::cpu::RNNKERN_ISA {

template <class D>
class TileProducts;

#ifdef __AMX_TILE__

// The numbers of tile registers are part of an instruction: no variables.
#define RNNKERN_TILE_PRODUCT(c, a, b) \
  {                                   \
    if constexpr (D::kDepth == 2) {   \
      _tile_dpbf16ps(c, a, b);        \
    } else {                          \
      _tile_dpbusd(c, a, b);          \
    }                                 \
  }

template <class D>
class TileProducts {
 public:
  using Element = typename D::Element;
  static constexpr int kMostRows = kTileRows;

  // Another user of the tiles in this thread finds them configured as it left them.
  explicit TileProducts(bool) {
    _tile_storeconfig(&before_);
    settle(&before_);
  }
  TileProducts(const TileProducts&) = delete;
  ~TileProducts() { _tile_loadconfig(&before_); }

  // Of elements [first, last) of the depth, whole tiles. to: rows that lie together, nothing added.
  void operator()(int rows, int vecs, int64_t depth, int64_t first, int64_t last,
                  const Element* state, int64_t stride, const Element* panel,
                  const Target<float>& to, const Fetch& fetch = kNothingToFetch,
                  Chore* chore = nullptr) {
    float* const c = to.first;
    if (rows != rows_) configure(rows);
    for (int r = 0; r < rows; ++r) fetch(r);
    if (chore) {
      const int64_t tiles = (last - first) / kTileDepth / D::kPlanes;
      const int64_t loops = rows > kTile && vecs > 2 ? 2 : 1;
      chore->spread(tiles * loops * (D::kPlanes > 1 ? 2 : 1));
    }
    if constexpr (D::kPlanes == 1)
      return run(rows, vecs, depth, first, last, state, stride, panel, c, chore);
    // In blocks whose sums are added up: the rounding errors of long sums do not pile up, and what
    // is read twice is still in cache.
    constexpr int64_t block = kBlock * kTileDepth * D::kPlanes;
    run(rows, vecs, depth, first, min_of(last, first + block), state, stride, panel, c, chore);
    alignas(64) float part[kMostRows * kPanel<float>];
    for (int64_t k = first + block; k < last; k += block) {
      run(rows, vecs, depth, k, min_of(last, k + block), state, stride, panel, part, chore);
      for (int64_t i = 0; i < rows * vecs * kTile; i += kTile) {
        store_vec(c + i, load_vec<Vec<float>>(c + i) + load_vec<Vec<float>>(part + i));
      }
    }
  }

 private:
  // Of a tile: its rows, a row's bytes, all its elements.
  static constexpr int kTile = 16, kBytes = 64, kWhole = kTile * kTile;
  static constexpr int kBlock = 8;  // tiles of the depth
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };

  // Tiles 0 to 3 are sums, 4 and 5 rows of the state, 6 and 7 of a panel. Of more than 16 rows,
  // sums 2 and 3 and state 5 are of those beyond.
  void configure(int rows) {
    rows_ = rows;
    alignas(64) Config config = {};
    config.palette = 1;
    const int first = static_cast<int>(min_of(rows, kTile));
    const int second = rows > kTile ? rows - kTile : rows;
    const int of[] = {first, first, second, second, first, second, kTile, kTile};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(of[i]);
      config.bytes[i] = kBytes;
    }
    settle(&config);
    _tile_loadconfig(&config);
  }

  // GCC's intrinsics name less memory than they read and write: the compiler must not put off, or
  // leave out, what was stored before.
  static RNNKERN_INLINE void settle(const void* p) { __asm__ volatile("" ::"r"(p) : "memory"); }

  static RNNKERN_INLINE void turn(Chore* chore) {
    if (chore) chore->turn();
  }

// Of numbers in planes the five small products come first: while the sums are small, so are their
// errors. The large one is then added up as float32's own multiply-adds would.

// Sums 0 .. V - 1 += rows in tile `a` times a plane of the columns.
#define RNNKERN_ONE(a, plane)                                  \
  _tile_loadd(6, left + (plane) * kLeft, kBytes);              \
  RNNKERN_TILE_PRODUCT(0, a, 6)                                \
  if constexpr (V > 1) {                                       \
    _tile_loadd(7, left + (plane) * kLeft + kWhole, kBytes);   \
    RNNKERN_TILE_PRODUCT(1, a, 7)                              \
  }                                                            \
  if constexpr (V > 2) {                                       \
    _tile_loadd(6, right + (plane) * kRight, kBytes);          \
    RNNKERN_TILE_PRODUCT(2, a, 6)                              \
  }                                                            \
  if constexpr (V > 3) {                                       \
    _tile_loadd(7, right + (plane) * kRight + kWhole, kBytes); \
    RNNKERN_TILE_PRODUCT(3, a, 7)                              \
  }

// And then the rows in tile a2.
#define RNNKERN_BOTH(a, a2, plane)                               \
  _tile_loadd(6, left + (plane) * kLeft, kBytes);                \
  if constexpr (V > 1) {                                         \
    _tile_loadd(7, left + (plane) * kLeft + kWhole, kBytes);     \
  }                                                              \
  RNNKERN_TILE_PRODUCT(0, a, 6)                                  \
  if constexpr (V > 1) RNNKERN_TILE_PRODUCT(1, a, 7)             \
  RNNKERN_TILE_PRODUCT(0, a2, 6)                                 \
  if constexpr (V > 1) RNNKERN_TILE_PRODUCT(1, a2, 7)            \
  if constexpr (V > 2) {                                         \
    _tile_loadd(6, right + (plane) * kRight, kBytes);            \
    if constexpr (V > 3) {                                       \
      _tile_loadd(7, right + (plane) * kRight + kWhole, kBytes); \
    }                                                            \
    RNNKERN_TILE_PRODUCT(2, a, 6)                                \
    if constexpr (V > 3) RNNKERN_TILE_PRODUCT(3, a, 7)           \
    RNNKERN_TILE_PRODUCT(2, a2, 6)                               \
    if constexpr (V > 3) RNNKERN_TILE_PRODUCT(3, a2, 7)          \
  }

// Of two tiles of rows, the upper from a on, and of columns from b on; and their four products.
#define RNNKERN_ROWS(a)   \
  _tile_loadd(4, a, row); \
  _tile_loadd(5, (a) + below, row);
#define RNNKERN_COLUMNS(b)   \
  _tile_loadd(6, b, kBytes); \
  if constexpr (both) _tile_loadd(7, (b) + kWhole, kBytes);
#define RNNKERN_FOUR              \
  RNNKERN_TILE_PRODUCT(0, 4, 6)   \
  RNNKERN_TILE_PRODUCT(2, 5, 6)   \
  if constexpr (both) {           \
    RNNKERN_TILE_PRODUCT(1, 4, 7) \
    RNNKERN_TILE_PRODUCT(3, 5, 7) \
  }

  void run(int rows, int vecs, int64_t depth, int64_t first, int64_t last, const Element* state,
           int64_t stride, const Element* panel, float* c, Chore* chore) {
    settle(state);
    const auto of = [&](auto vecs) {
      constexpr int V = decltype(vecs)::value;
      rows > kTile ? two_tiles<V>(depth, first, last, state, stride, panel, c, chore)
                   : one_tile<V>(depth, first, last, state, stride, panel, c, chore);
    };
    switch (vecs) {
      case 4:
        return of(std::integral_constant<int, 4>{});
      case 3:
        return of(std::integral_constant<int, 3>{});
      case 2:
        return of(std::integral_constant<int, 2>{});
      default:
        return of(std::integral_constant<int, 1>{});
    }
  }

  template <int V>
  static void one_tile(int64_t depth, int64_t first, int64_t last, const Element* state,
                       int64_t stride, const Element* panel, float* c, Chore* chore) {
    constexpr int64_t kLeft = V > 1 ? 2 * kWhole : kWhole, kRight = V > 3 ? 2 * kWhole : kWhole;
    constexpr int64_t across = V * kBytes;
    const int64_t row = stride * static_cast<int64_t>(sizeof(Element));
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (V > 2) _tile_zero(2);
    if constexpr (V > 3) _tile_zero(3);
    const Element *left_0 = panel + first / kTileDepth * kLeft, *left = left_0;
    const Element* right_0 = panel + 2 * kTile * depth + first / kTileDepth * kRight;
    const Element* right = right_0;
    if constexpr (D::kPlanes > 1) {  // in the same order as below
      for (int64_t k = first; k < last; k += kTileDepth * D::kPlanes) {
        const Element* a = state + k;
        _tile_loadd(4, a, row);
        RNNKERN_ONE(4, 2)
        _tile_loadd(5, a + kTileDepth, row);
        RNNKERN_BOTH(4, 5, 1)
        turn(chore);
        _tile_loadd(4, a + 2 * kTileDepth, row);
        RNNKERN_BOTH(5, 4, 0)
        turn(chore);
        left += D::kPlanes * kLeft;
        right += D::kPlanes * kRight;
      }
      left = left_0;
      right = right_0;
    }
    for (int64_t k = first; k < last; k += kTileDepth * D::kPlanes) {
      _tile_loadd(4, state + k, row);
      RNNKERN_ONE(4, 0)
      if constexpr (D::kPlanes == 1) turn(chore);
      left += D::kPlanes * kLeft;
      right += D::kPlanes * kRight;
    }
    _tile_stored(0, c, across);
    if constexpr (V > 1) _tile_stored(1, c + kTile, across);
    if constexpr (V > 2) _tile_stored(2, c + 2 * kTile, across);
    if constexpr (V > 3) _tile_stored(3, c + 3 * kTile, across);
  }

  template <int V>
  static void two_tiles(int64_t depth, int64_t first, int64_t last, const Element* state,
                        int64_t stride, const Element* panel, float* c, Chore* chore) {
    pair<V, (V > 1)>(first, last, state, stride, panel, c, chore);
    if constexpr (V > 2) {
      pair<V, (V > 3)>(first, last, state, stride, panel + 2 * kTile * depth, c + 2 * kTile, chore);
    }
  }

  // Two vectors of columns or, the last, one, of V.
  template <int V, bool both>
  static void pair(int64_t first, int64_t last, const Element* state, int64_t stride,
                   const Element* b, float* c, Chore* chore) {
    constexpr int64_t across = V * kBytes, plane = both ? 2 * kWhole : kWhole;
    const int64_t row = stride * static_cast<int64_t>(sizeof(Element)), below = kTile * stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    b += first / kTileDepth * plane;
    if constexpr (D::kPlanes > 1) {
      const Element* at = b;
      for (int64_t k = first; k < last; k += kTileDepth * D::kPlanes, at += D::kPlanes * plane) {
        const Element* a = state + k;
        RNNKERN_ROWS(a)
        RNNKERN_COLUMNS(at + 2 * plane)
        RNNKERN_FOUR
        RNNKERN_COLUMNS(at + plane)
        RNNKERN_FOUR
        turn(chore);
        RNNKERN_ROWS(a + kTileDepth)
        RNNKERN_FOUR
        RNNKERN_COLUMNS(at)
        RNNKERN_FOUR
        RNNKERN_ROWS(a + 2 * kTileDepth)
        RNNKERN_FOUR
        turn(chore);
      }
    }
    for (int64_t k = first; k < last; k += kTileDepth * D::kPlanes, b += D::kPlanes * plane) {
      RNNKERN_ROWS(state + k)
      RNNKERN_COLUMNS(b)
      RNNKERN_FOUR
      if constexpr (D::kPlanes == 1) turn(chore);
    }
    float* out_below = c + kTile * V * kTile;
    _tile_stored(0, c, across);
    _tile_stored(2, out_below, across);
    if constexpr (both) {
      _tile_stored(1, c + kTile, across);
      _tile_stored(3, out_below + kTile, across);
    }
  }

  alignas(64) Config before_;
  int rows_ = 0;
};

#undef RNNKERN_TILE_PRODUCT
#undef RNNKERN_ONE
#undef RNNKERN_BOTH
#undef RNNKERN_ROWS
#undef RNNKERN_COLUMNS
#undef RNNKERN_FOUR

#endif

template <class D>
using ProductsOf = std::conditional_t<D::kTiles, TileProducts<D>, Products<D>>;

}  // namespace rnnkern::cpu::RNNKERN_ISA
