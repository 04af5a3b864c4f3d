// Products by AMX, whose registers are tiles: one instruction multiplies 16 rows of the state by 16
// columns of a panel, over 16 elements (32 bfloat16 or 64 bytes). The packed panels and the states
// lie as elsewhere, but for the depth, which is whole tiles.
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
  if constexpr (D::kDepth == 2) {     \
    _tile_dpbf16ps(c, a, b);          \
  } else {                            \
    _tile_dpbusd(c, a, b);            \
  }

template <class D>
class TileProducts {
 public:
  using Element = typename D::Element;
  static constexpr int kMostRows = kTileRows;

  // Another user of the tiles in this thread finds them configured as it left them.
  explicit TileProducts(bool) { _tile_storeconfig(&before_); }
  TileProducts(const TileProducts&) = delete;
  ~TileProducts() { _tile_loadconfig(&before_); }

  void operator()(int rows, int vecs, int64_t depth, const Element* state, int64_t stride,
                  const Element* panel, float* c) {
    if (rows != rows_) configure(rows);
    if (rows > kTile) {
      switch (vecs) {
        case 4:
          return two_tiles<4>(depth, state, stride, panel, c);
        case 3:
          return two_tiles<3>(depth, state, stride, panel, c);
        case 2:
          return two_tiles<2>(depth, state, stride, panel, c);
        default:
          return two_tiles<1>(depth, state, stride, panel, c);
      }
    }
    switch (vecs) {
      case 4:
        return one_tile<4>(depth, state, stride, panel, c);
      case 3:
        return one_tile<3>(depth, state, stride, panel, c);
      case 2:
        return one_tile<2>(depth, state, stride, panel, c);
      default:
        return one_tile<1>(depth, state, stride, panel, c);
    }
  }

 private:
  static constexpr int kTile = 16, kBytes = 64;  // of a tile: its rows, a row's bytes
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
    _tile_loadconfig(&config);
  }

  template <int V>
  static void one_tile(int64_t depth, const Element* state, int64_t stride, const Element* panel,
                       float* c) {
    constexpr int64_t across = V * kBytes;
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (V > 2) _tile_zero(2);
    if constexpr (V > 3) _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const Element* b = panel + k * V * kTile;
      _tile_loadd(4, state + k, stride * sizeof(Element));
      _tile_loadd(6, b, across);
      RNNKERN_TILE_PRODUCT(0, 4, 6)
      if constexpr (V > 1) {
        _tile_loadd(7, b + kTile, across);
        RNNKERN_TILE_PRODUCT(1, 4, 7)
      }
      if constexpr (V > 2) {
        _tile_loadd(6, b + 2 * kTile, across);
        RNNKERN_TILE_PRODUCT(2, 4, 6)
      }
      if constexpr (V > 3) {
        _tile_loadd(7, b + 3 * kTile, across);
        RNNKERN_TILE_PRODUCT(3, 4, 7)
      }
    }
    _tile_stored(0, c, across);
    if constexpr (V > 1) _tile_stored(1, c + kTile, across);
    if constexpr (V > 2) _tile_stored(2, c + 2 * kTile, across);
    if constexpr (V > 3) _tile_stored(3, c + 3 * kTile, across);
  }

  template <int V>
  static void two_tiles(int64_t depth, const Element* state, int64_t stride, const Element* panel,
                        float* c) {
    constexpr int64_t across = V * kBytes;
    const Element* below = state + kTile * stride;
    for (int v = 0; v < V; v += 2) {
      const bool both = v + 1 < V;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        const Element* b = panel + (k * V + v) * kTile;
        _tile_loadd(4, state + k, stride * sizeof(Element));
        _tile_loadd(5, below + k, stride * sizeof(Element));
        _tile_loadd(6, b, across);
        RNNKERN_TILE_PRODUCT(0, 4, 6)
        RNNKERN_TILE_PRODUCT(2, 5, 6)
        if (both) {
          _tile_loadd(7, b + kTile, across);
          RNNKERN_TILE_PRODUCT(1, 4, 7)
          RNNKERN_TILE_PRODUCT(3, 5, 7)
        }
      }
      float *out = c + v * kTile, *out_below = out + kTile * V * kTile;
      _tile_stored(0, out, across);
      _tile_stored(2, out_below, across);
      if (both) {
        _tile_stored(1, out + kTile, across);
        _tile_stored(3, out_below + kTile, across);
      }
    }
  }

  alignas(64) Config before_;
  int rows_ = 0;
};

#undef RNNKERN_TILE_PRODUCT

#endif

}  // namespace rnnkern::cpu::RNNKERN_ISA
