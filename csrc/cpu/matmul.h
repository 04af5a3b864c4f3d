// The large products of one instruction set: many rows times a matrix in packed panels, which the
// input product and the gradients of the input are; sums of outer products, which are the gradients
// of the weights; and sums of rows, those of the biases.
#pragma once
#include "amx.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// Sums of parts (Dot<Split>) that came out infinite or NaN, made again of the depth products that
// term(i, k) gives for the i-th. Slowly: of a batch that is all NaN a product takes ten times as
// long.
template <class D, int n, class Term>
RNNKERN_INLINE void mend(Vec<typename D::A> (&sums)[n], int64_t depth, const Term& term) {
  if constexpr (D::kPlanes > 1) {
    Vec<typename D::A> all = sums[0];
    for (int i = 1; i < n; ++i) all += sums[i];
    if (__builtin_expect(all_finite(all), 1)) return;
    for (int i = 0; i < n; ++i) {
      if (all_finite(sums[i])) continue;
      sums[i] = Vec<typename D::A>{};
      for (int64_t k = 0; k < depth; ++k) sums[i] += term(i, k);
    }
  }
}

// ---- products of many rows ----

// The elements of one row, whole tiles of them.
template <class S>
RNNKERN_INLINE void store_row(const S* from, int64_t width, typename Dot<S>::Element* to) {
  using D = Dot<S>;
  constexpr int lanes = kLanes<typename D::A>;
  const int64_t all = elements<D>(width) / D::kPlanes * D::kDepth;
  for (int64_t j = 0; j < all; j += lanes) D::store(to, j, load_part(from + j, width - j));
}

// One vector of columns, of row k of a matrix.
template <class S>
RNNKERN_INLINE auto load_columns(const MatrixView& m, int64_t k, int64_t column) {
  const S* from = static_cast<const S*>(m.data) + k * m.stride_k + column * m.stride_n;
  if (m.stride_n == 1) return load_part(from, m.width - column);
  constexpr int lanes = kLanes<typename Storage<S>::Acc>;
  S part[lanes] = {};
  for (int64_t n = 0; n < min_of(m.width - column, lanes); ++n) part[n] = from[n * m.stride_n];
  return Storage<S>::load(part);
}

// scratch: of parts, row_bytes() for each row.
template <class S>
void matmul(const MatmulParams& p, int64_t begin, int64_t end, [[maybe_unused]] void* scratch) {
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;
  constexpr int lanes = kLanes<A>;
  const S* a = static_cast<const S*>(p.a);
  const A *bias_ih = static_cast<const A*>(p.bias_ih), *bias_hh = static_cast<const A*>(p.bias_hh);
  const int64_t depth = elements<D>(p.matrix.depth), width = p.matrix.width;
  const Element* rows;  // of row `begin`
  int64_t stride;
  if constexpr (std::is_same_v<S, Element>) {
    rows = a + begin * p.a_stride;
    stride = p.a_stride;
  } else {
    auto* to = static_cast<Element*>(scratch);
    stride = row_stride<D>(p.matrix.depth);
    for (int64_t row = begin; row < end; ++row) {
      store_row(a + row * p.a_stride, p.matrix.depth, to + (row - begin) * stride);
    }
    rows = to;
  }
  ProductsOf<D> products(/*alone=*/false);
  // A tile's rows of products that have yet to be stored.
  struct {
    const A* product;
    int64_t row, end, column;
    int vecs;
    Vec<A> bias[kPanelVecs];
  } made = {};
  const auto store_one = [&]() __attribute__((always_inline)) {
    if (made.row == made.end) return false;
    for (int v = 0; v < made.vecs; ++v, made.product += lanes) {
      const int64_t at = made.column + v * lanes;
      A* out = static_cast<A*>(p.out) + made.row * p.out_stride + at;
      Vec<A> sum[] = {load_vec<Vec<A>>(made.product)};
      mend<D>(sum, p.matrix.depth, [&](int, int64_t k) {
        return broadcast(load_one(a + made.row * p.a_stride + k)) *
               load_columns<S>(p.matrix, k, at);
      });
      *sum += made.bias[v];
      if (p.add) *sum += load_part(out, width - at);
      store_part(out, *sum, width - at);
    }
    return ++made.row < made.end;
  };
  ChoreOf chore(store_one);
  alignas(64) A sums[D::kTiles ? 2 : 1][ProductsOf<D>::kMostRows * kPanel<A>];
  int filled = 0;  // of these, last

  for (int64_t column = 0; column < width; column += kPanel<A>) {
    const int vecs = static_cast<int>(panel_width<A>(column, width) / lanes);
    const auto* panel =
        static_cast<const Element*>(p.panels) + column * panel_depth<D>(p.matrix.depth);
    for_each_tile<ProductsOf<D>::kMostRows>(begin, end, [&](int64_t row, int64_t tile_end) {
      for (int64_t r = row; D::kTiles && r < tile_end; ++r) {
        for (int v = 0; v < vecs; ++v) {
          __builtin_prefetch(static_cast<A*>(p.out) + r * p.out_stride + column + v * lanes, 1);
        }
      }
      if constexpr (D::kTiles) filled = !filled;
      A* const c = sums[filled];
      products(static_cast<int>(tile_end - row), vecs, depth, 0, depth,
               rows + (row - begin) * stride, stride, panel, c, &chore);
      // Of tiles, while the next is multiplied.
      while (D::kTiles && chore()) {
      }
      made = {c, row, tile_end, column, vecs, {}};
      for (int v = 0; bias_ih && v < vecs; ++v) {
        const int64_t at = column + v * lanes;
        made.bias[v] = load_part(bias_ih + at, width - at) + load_part(bias_hh + at, width - at);
      }
      while (!D::kTiles && store_one()) {
      }
    });
  }
  while (D::kTiles && chore()) {
  }
}

// ---- sums of outer products ----

// So much is packed at a time: rows; columns of a, in panels; and columns of v, in tiles. In
// float32 they are 1 MB and 0.2 MB, which the second-level cache holds.
constexpr int64_t kOuterDepth = 256, kOuterRows = 192;
template <class D>
constexpr int64_t kOuterWidth = D::kPlanes > 1 ? 512 : 1024;
// The columns of v, rows of the result, that are one tile.
template <class D>
constexpr int64_t kOuterTile = D::kTiles ? kTileRows : kRows;

// The product of one tile.
template <class D>
class OuterProducts {
 public:
  using A = typename D::A;
  void operator()(int, int vecs, int64_t depth, const A* tile, int64_t, const A* panel, A* c) {
#if RNNKERN_PANEL_VECS >= 4
    if (vecs == 4) return product<D, kRows, 4, kRows, kRows>(depth, tile, 1, panel, c);
    if (vecs == 3) return product<D, kRows, 3, kRows, kRows>(depth, tile, 1, panel, c);
#endif
    if (vecs == 2) return product<D, kRows, 2, kRows, kRows>(depth, tile, 1, panel, c);
    return product<D, kRows, 1, kRows, kRows>(depth, tile, 1, panel, c);
  }
};

#ifdef __AMX_BF16__
template <>
class OuterProducts<Dot<Split>> {
 public:
  void operator()(int rows, int vecs, int64_t depth, const uint32_t* tile, int64_t stride,
                  const uint32_t* panel, float* c) {
    products_(rows, vecs, depth, 0, depth, tile, stride, panel, c);
  }

 private:
  TileProducts<Dot<Split>> products_{/*alone=*/false};
};
#endif

// Row n of a, from its first column on; null: zeros.
template <class S>
RNNKERN_INLINE const S* outer_row(const OuterParams& p, int64_t n) {
  const auto *a = static_cast<const S*>(p.a), *initial = static_cast<const S*>(p.initial);
  const int64_t at = p.a_rows ? p.a_rows[n] : n;
  return at >= 0 ? a + at * p.a_stride : initial ? initial + ~at * p.initial_stride : nullptr;
}

// Rows n0 .. n0 + depth of columns [begin, end) of a, as panels.
template <class S>
void pack_outer_panels(const OuterParams& p, int64_t n0, int64_t depth, int64_t begin, int64_t end,
                       typename Dot<S>::Element* panels) {
  using D = Dot<S>;
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  const int64_t all = elements<D>(depth) / D::kPlanes * D::kDepth;  // beyond depth: zeros
  for (int64_t k = 0; k < all; k += D::kDepth) {
    const S* rows[D::kDepth];
    for (int i = 0; i < D::kDepth; ++i) {
      rows[i] = k + i < depth ? outer_row<S>(p, n0 + k + i) : nullptr;
    }
    for (int64_t column = begin; column < end; column += kPanel<A>) {
      const int64_t width = panel_width<A>(column, end);
      auto* out = panels + (column - begin) * elements<D>(depth);
      for (int64_t j = 0; j < width; j += lanes) {
        Vec<A> block[D::kDepth];
        for (int i = 0; i < D::kDepth; ++i) {
          block[i] = rows[i] ? load_part(rows[i] + column + j, end - column - j) : Vec<A>{};
        }
        pack_block<D>(block, k, D::kDepth, j, width, elements<D>(depth), out);
      }
    }
  }
}

// Rows n0 .. n0 + depth of tiles [first, last) of v.
template <class S>
void pack_outer_tiles(const OuterParams& p, int64_t n0, int64_t depth, int64_t first, int64_t last,
                      typename Dot<S>::Element* tiles) {
  using D = Dot<S>;
  constexpr int lanes = kLanes<typename D::A>;
  constexpr int64_t tile_rows = kOuterTile<D>;
  const auto* v = static_cast<const S*>(p.v);
  const int64_t stride = row_stride<D>(depth);
  if constexpr (D::kTiles) {
    for (int64_t m = first * tile_rows; m < min_of(last * tile_rows, p.m); m += lanes) {
      auto* out = tiles + (m - first * tile_rows) * stride;
      for (int64_t k0 = 0; k0 < depth; k0 += kTileDepth * D::kDepth) {
        Vec<typename D::A> block[D::kPlanes][kTileDepth];
        for (int64_t i = 0; i < kTileDepth; ++i) {
          Vec<typename D::A> rows[D::kDepth] = {}, planes[D::kPlanes];
          for (int64_t j = 0; j < D::kDepth; ++j) {
            const int64_t k = k0 + i * D::kDepth + j;
            if (k < depth) rows[j] = load_part(v + (n0 + k) * p.v_stride + m, p.m - m);
          }
          D::split(rows, planes);
          for (int plane = 0; plane < D::kPlanes; ++plane) block[plane][i] = planes[plane];
        }
        for (auto& plane : block) {
          transpose<typename D::A>(plane);
          for (int r = 0; r < lanes; ++r) store_vec(out + r * stride, plane[r]);
          out += kTileDepth;
        }
      }
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      const S* row = v + (n0 + k) * p.v_stride;
      for (int64_t tile = first; tile < last; ++tile) {
        S* out = tiles + (tile - first) * tile_rows * stride + k * tile_rows;
        const int64_t m = tile * tile_rows;
        if (m + tile_rows <= p.m) {
          __builtin_memcpy(out, row + m, tile_rows * sizeof(S));
          continue;
        }
        for (int64_t r = 0; r < tile_rows; ++r) out[r] = m + r < p.m ? row[m + r] : S(0);
      }
    }
  }
}

template <class S>
void outer(const OuterParams& p, int64_t first, int64_t last, void* scratch) {
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t tile_rows = kOuterTile<D>, most_tiles = kOuterRows / tile_rows;
  auto* panels = static_cast<Element*>(scratch);
  const int64_t most = elements<D>(min_of(p.n, kOuterDepth));
  Element* tiles = panels + most * min_of(padded<A>(p.width), kOuterWidth<D>);
  OuterProducts<D> products;
  for (int64_t begin = 0; begin < p.width; begin += kOuterWidth<D>) {
    const int64_t end = min_of(p.width, begin + kOuterWidth<D>);
    for (int64_t n0 = 0; n0 < p.n; n0 += kOuterDepth) {
      const int64_t rows = min_of(p.n - n0, kOuterDepth), depth = elements<D>(rows);
      const int64_t stride = row_stride<D>(rows);
      pack_outer_panels<S>(p, n0, rows, begin, end, panels);
      for (int64_t tile0 = first; tile0 < last; tile0 += most_tiles) {
        const int64_t tile1 = min_of(last, tile0 + most_tiles);
        pack_outer_tiles<S>(p, n0, rows, tile0, tile1, tiles);
        for (int64_t column = begin; column < end; column += kPanel<A>) {
          const int vecs = static_cast<int>(panel_width<A>(column, end) / lanes);
          for (int64_t tile = tile0; tile < tile1; ++tile) {
            const int64_t m0 = tile * tile_rows, m1 = min_of(p.m, m0 + tile_rows);
            alignas(64) A c[tile_rows * kPanel<A>];
            products(static_cast<int>(m1 - m0), vecs, depth,
                     tiles + (tile - tile0) * tile_rows * stride, stride,
                     panels + (column - begin) * depth, c);
            const A* product = c;
            for (int64_t m = m0; m < m1; ++m) {
              for (int i = 0; i < vecs; ++i, product += lanes) {
                const int64_t at = column + i * lanes;
                A* out = static_cast<A*>(p.out) + m * p.out_stride + at;
                Vec<A> sum[] = {load_vec<Vec<A>>(product)};
                mend<D>(sum, rows, [&](int, int64_t k) {
                  const S* row = outer_row<S>(p, n0 + k);
                  const auto factor =
                      load_one(static_cast<const S*>(p.v) + (n0 + k) * p.v_stride + m);
                  return broadcast(factor) * (row ? load_part(row + at, end - at) : Vec<A>{});
                });
                if (n0 > 0) *sum += load_part(out, end - at);
                store_part(out, *sum, end - at);
              }
            }
          }
        }
      }
    }
  }
}

// Panels [first, last) of the sum of n rows. In blocks, so that the rounding errors of many rows do
// not pile up.
template <class A>
void column_sums(const A* v, int64_t n, int64_t stride, int64_t width, int64_t first, int64_t last,
                 A* out) {
  constexpr int lanes = kLanes<A>;
  for (int64_t column = first * kPanel<A>; column < min_of(last * kPanel<A>, width);
       column += kPanel<A>) {
    Vec<A> total[kPanelVecs] = {};
    const int vecs = static_cast<int>(panel_width<A>(column, width) / lanes);
    const auto left = [&](int j) { return width - column - j * lanes; };
    constexpr int64_t block = 32;
    for (int64_t n0 = 0; n0 < n; n0 += block) {
      Vec<A> sum[kPanelVecs] = {};
      for (int64_t i = n0; i < min_of(n, n0 + block); ++i) {
        const A* row = v + i * stride + column;
        for (int j = 0; j < vecs; ++j) sum[j] += load_part(row + j * lanes, left(j));
      }
      for (int j = 0; j < vecs; ++j) total[j] += sum[j];
    }
    for (int j = 0; j < vecs; ++j) store_part(out + column + j * lanes, total[j], left(j));
  }
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
