// The products of one instruction set: rows times a matrix in packed panels, which is what a scan's
// step is and what the input product and the gradients of the input are; and sums of outer
// products, which are the gradients of the weights.
//
// The matrix lies in panels of kPanel columns, k-major, so that the inner loop is one broadcast of
// a row's element and a few multiply-adds on contiguous loads. A tile of kRows rows by one panel
// stays in registers while k runs.
#pragma once
#include "scan_params.h"
#include "vec.h"

namespace rnnkern::cpu::RNNKERN_ISA {

constexpr int kPanelVecs = RNNKERN_PANEL_VECS;
constexpr int kRows = 6;
constexpr int kTileRows = 32, kTileDepth = 16;  // amx.h: rows, and elements, taken at a time

template <class A>
constexpr int kPanel = kPanelVecs * kLanes<A>;

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A>
RNNKERN_INLINE int64_t padded(int64_t width) {
  return (width + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// The width of the panel at `column`: the last one is as narrow as whole vectors allow.
template <class A>
RNNKERN_INLINE int64_t panel_width(int64_t column, int64_t width) {
  return min_of(padded<A>(width) - column, kPanel<A>);
}

// How many elements hold so many k's: whole tiles of them where those are multiplied.
template <class D>
RNNKERN_INLINE int64_t elements(int64_t depth) {
  constexpr int64_t unit = D::kTiles ? kTileDepth : 1;
  return ((depth + D::kDepth - 1) / D::kDepth + unit - 1) / unit * unit;
}

// The vectors of one panel column: its elements and what lies behind them.
template <class D>
RNNKERN_INLINE int64_t panel_depth(int64_t depth) {
  return elements<D>(depth) + D::kSums;
}

// ---- packing ----

// Columns [first, last) of the panels, zero beyond the matrix. A block of lanes x lanes at a time:
// along its rows or, transposed in registers, along its columns, whichever lies together.
template <class S>
void pack(const MatrixView& matrix, int64_t first, int64_t last, void* dst) {
  using D = Dot<S>;
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  const auto* m = static_cast<const S*>(matrix.data);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel<A>;
    auto* out = static_cast<typename D::Element*>(dst) + column * panel_depth<D>(matrix.depth);
    const int64_t width = panel_width<A>(column, matrix.width);
    const int64_t filled = (matrix.depth + D::kDepth - 1) / D::kDepth;
    for (int64_t i = filled * width; i < elements<D>(matrix.depth) * width; ++i) out[i] = 0;
    // Down the columns first: so many rows of W, and no more, are read side by side as the hardware
    // can prefetch.
    for (int64_t n0 = 0; n0 < width; n0 += lanes) {
      const int64_t wide = min_of(matrix.width - column - n0, lanes);
      for (int64_t k0 = 0; k0 < matrix.depth; k0 += lanes) {
        const int64_t deep = min_of(matrix.depth - k0, lanes);
        const S* from = m + k0 * matrix.stride_k + (column + n0) * matrix.stride_n;
        Vec<A> block[lanes] = {};
        if (matrix.stride_n == 1) {
          for (int64_t k = 0; k < deep; ++k) block[k] = load_part(from + k * matrix.stride_k, wide);
        } else if (matrix.stride_k == 1) {
          for (int64_t n = 0; n < wide; ++n) block[n] = load_part(from + n * matrix.stride_n, deep);
          transpose<A>(block);
        } else {
          for (int64_t k = 0; k < deep; ++k) {
            S part[lanes] = {};
            for (int64_t n = 0; n < wide; ++n) {
              part[n] = from[k * matrix.stride_k + n * matrix.stride_n];
            }
            block[k] = Storage<S>::load(part);
          }
        }
        for (int64_t k = 0; k < deep; k += D::kDepth) {
          store_vec(out + (k0 + k) / D::kDepth * width + n0, D::join(block + k));
        }
      }
    }
  }
}

// W_hh in 8 bits, whose rows lie together, and behind each panel 128 times their sums.
template <>
inline void pack<Quantized>(const MatrixView& matrix, int64_t first, int64_t last, void* dst) {
  using D = Dot<Quantized>;
  const auto* m = static_cast<const int8_t*>(matrix.data);
  const int64_t depth = elements<D>(matrix.depth);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel<float>;
    const int64_t width = panel_width<float>(column, matrix.width);
    auto* out = static_cast<uint32_t*>(dst) + column * panel_depth<D>(matrix.depth);
    for (int64_t n = 0; n < width; ++n) {
      const bool there = column + n < matrix.width;
      const int8_t* row = m + (column + n) * matrix.stride_n;
      int32_t added = 0;
      for (int64_t k = 0; k < depth; ++k) {
        uint32_t bytes = 0;
        for (int64_t i = 4 * k; there && i < min_of(4 * k + 4, matrix.depth); ++i) {
          bytes |= static_cast<uint32_t>(static_cast<uint8_t>(row[i])) << (8 * (i - 4 * k));
          added += 128 * row[i];
        }
        out[k * width + n] = bytes;
      }
      __builtin_memcpy(out + depth * width + n, &added, sizeof added);
    }
  }
}

// weight_ih (H, I) transposed to (I, padded H), and a row more for the sum of the biases.
template <class S>
void pack_input(const InputWeights& w, void* dst) {
  using A = typename Storage<S>::Acc;
  constexpr int lanes = kLanes<A>;
  const int64_t features = w.weight.depth, hidden = w.weight.width;
  A* out = static_cast<A*>(dst);
  const auto* weight = static_cast<const S*>(w.weight.data);
  const auto* bias_ih = static_cast<const S*>(w.bias_ih);
  const auto* bias_hh = static_cast<const S*>(w.bias_hh);
  for (int64_t i = 0; i <= features; ++i) {
    for (int64_t j0 = 0; j0 < hidden; j0 += lanes, out += lanes) {
      const int64_t count = min_of(hidden - j0, lanes);
      S part[lanes] = {}, more[lanes] = {};
      for (int64_t j = 0; j < count; ++j) {
        if (i < features) {
          part[j] = weight[i * w.weight.stride_k + (j0 + j) * w.weight.stride_n];
        } else if (bias_ih) {
          part[j] = bias_ih[j0 + j];
          more[j] = bias_hh[j0 + j];
        }
      }
      store_vec(out, Storage<S>::load(part) + Storage<S>::load(more));
    }
  }
}

// ---- the product of a tile ----

// c (R, V vectors) = rows (R, depth) * panel (depth, V vectors), depth in elements; element (r, k)
// of the rows is at r * stride + k * k_stride. Few accumulators cannot hide the latency of a
// multiply-add, so small tiles split k over several sets of them: so many that a tile of full_rows
// fills eight. Not of its own R rows: a row's sum must not depend on the tile it came into, or the
// number of threads would change the bits.
template <class D, int R, int V, int full_rows, int k_stride = 1>
void product(int64_t depth, const typename D::Element* __restrict rows, int64_t stride,
             const typename D::Element* __restrict panel, typename D::A* __restrict c) {
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  constexpr int full = full_rows * V;
  constexpr int sets = full >= 8 ? 1 : full >= 4 ? 2 : full >= 2 ? 4 : 8;
  Vec<A> acc[sets][R][V] = {};
  int64_t k = 0;
  for (; k + sets <= depth; k += sets) {
#pragma GCC unroll 8
    for (int s = 0; s < sets; ++s) {
      Vec<A> b[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) b[v] = load_vec<Vec<A>>(panel + ((k + s) * V + v) * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> a = D::broadcast(rows[r * stride + (k + s) * k_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[s][r][v] = D::add(acc[s][r][v], a, b[v]);
      }
    }
  }
  for (; k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> a = D::broadcast(rows[r * stride + k * k_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[0][r][v] = D::add(acc[0][r][v], a, load_vec<Vec<A>>(panel + (k * V + v) * lanes));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      // Halves of halves, each by a loop that the compiler sees the end of: else acc is in memory.
#pragma GCC unroll 8
      for (int s = 0; s < (sets == 8 ? 4 : 0); ++s) {
        acc[s][r][v] = D::sum(acc[s][r][v], acc[(s + 4) % sets][r][v]);
      }
#pragma GCC unroll 8
      for (int s = 0; s < (sets >= 4 ? 2 : 0); ++s) {
        acc[s][r][v] = D::sum(acc[s][r][v], acc[(s + 2) % sets][r][v]);
      }
      if (sets >= 2) acc[0][r][v] = D::sum(acc[0][r][v], acc[1 % sets][r][v]);
      store_vec(c + (r * V + v) * lanes, acc[0][r][v]);
    }
  }
}

template <class D>
using Product = void (*)(int64_t, const typename D::Element*, int64_t, const typename D::Element*,
                         typename D::A*);

template <class D, int V>
RNNKERN_INLINE Product<D> product_of_rows(int rows, bool alone) {
  if (alone) return product<D, 1, V, 1>;
  constexpr Product<D> table[] = {product<D, 1, V, kRows>, product<D, 2, V, kRows>,
                                  product<D, 3, V, kRows>, product<D, 4, V, kRows>,
                                  product<D, 5, V, kRows>, product<D, 6, V, kRows>};
  return table[rows - 1];
}

// alone: the whole batch is one row.
template <class D>
RNNKERN_INLINE Product<D> find_product(int rows, int vecs, bool alone) {
#if RNNKERN_PANEL_VECS >= 4
  if (vecs == 4) return product_of_rows<D, 4>(rows, alone);
  if (vecs == 3) return product_of_rows<D, 3>(rows, alone);
#endif
  return vecs == 2 ? product_of_rows<D, 2>(rows, alone) : product_of_rows<D, 1>(rows, alone);
}

// visit(first, end) for even tiles of rows [begin, end).
template <int most = kRows, class Visit>
RNNKERN_INLINE void for_each_tile(int64_t begin, int64_t end, Visit visit) {
  const int64_t tiles = (end - begin + most - 1) / most;
  int64_t row = begin;
  for (int64_t tile = 1; tile <= tiles; ++tile) {
    const int64_t tile_end = begin + (end - begin) * tile / tiles;
    visit(row, tile_end);
    row = tile_end;
  }
}

// ---- products of many rows ----

template <class A>
void matmul(const MatmulParams& p, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<A>;
  const A *a = static_cast<const A*>(p.a), *panels = static_cast<const A*>(p.panels);
  const A *bias_ih = static_cast<const A*>(p.bias_ih), *bias_hh = static_cast<const A*>(p.bias_hh);
  for (int64_t column = 0; column < p.width; column += kPanel<A>) {
    const int vecs = static_cast<int>(panel_width<A>(column, p.width) / lanes);
    Vec<A> bias[kPanelVecs] = {};
    for (int v = 0; bias_ih && v < vecs; ++v) {
      const int64_t at = column + v * lanes;
      bias[v] = load_part(bias_ih + at, p.width - at) + load_part(bias_hh + at, p.width - at);
    }
    for_each_tile(begin, end, [&](int64_t row, int64_t tile_end) {
      alignas(64) A c[kRows * kPanel<A>];
      find_product<Dot<A>>(static_cast<int>(tile_end - row), vecs, /*alone=*/false)(
          p.depth, a + row * p.a_stride, p.a_stride, panels + column * p.depth, c);
      for (const A* product = c; row < tile_end; ++row) {
        for (int v = 0; v < vecs; ++v, product += lanes) {
          const int64_t at = column + v * lanes;
          A* out = static_cast<A*>(p.out) + row * p.out_stride + at;
          Vec<A> sum = load_vec<Vec<A>>(product) + bias[v];
          if (p.add) sum += load_part(out, p.width - at);
          store_part(out, sum, p.width - at);
        }
      }
    });
  }
}

// ---- sums of outer products ----

// So much is packed at a time: rows; columns of a, in panels; and tiles of kRows columns of v. In
// float32 they are 1 MB and 0.2 MB, which the second-level cache holds.
constexpr int64_t kOuterDepth = 256, kOuterWidth = 1024, kOuterTiles = 32;

template <class A>
RNNKERN_INLINE Product<Dot<A>> outer_tile(int vecs) {
  using D = Dot<A>;
#if RNNKERN_PANEL_VECS >= 4
  if (vecs == 4) return product<D, kRows, 4, kRows, kRows>;
  if (vecs == 3) return product<D, kRows, 3, kRows, kRows>;
#endif
  return vecs == 2 ? product<D, kRows, 2, kRows, kRows> : product<D, kRows, 1, kRows, kRows>;
}

// Rows n0 .. n0 + depth of columns [begin, end) of a, as panels.
template <class A>
void pack_outer_panels(const OuterParams& p, int64_t n0, int64_t depth, int64_t begin, int64_t end,
                       A* panels) {
  constexpr int lanes = kLanes<A>;
  const auto *a = static_cast<const A*>(p.a), *initial = static_cast<const A*>(p.initial);
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = p.a_rows ? p.a_rows[n0 + k] : n0 + k;
    const A* row = at >= 0   ? a + at * p.a_stride
                   : initial ? initial + ~at * p.initial_stride
                             : nullptr;
    for (int64_t column = begin; column < end; column += kPanel<A>) {
      const int64_t width = panel_width<A>(column, end);
      A* out = panels + (column - begin) * depth + k * width;
      for (int64_t j = 0; j < width; j += lanes) {
        store_vec(out + j, row ? load_part(row + column + j, end - column - j) : Vec<A>{});
      }
    }
  }
}

// Rows n0 .. n0 + depth of tiles [first, last) of v.
template <class A>
void pack_outer_tiles(const OuterParams& p, int64_t n0, int64_t depth, int64_t first, int64_t last,
                      A* tiles) {
  const A* v = static_cast<const A*>(p.v);
  for (int64_t k = 0; k < depth; ++k) {
    const A* row = v + (n0 + k) * p.v_stride;
    for (int64_t tile = first; tile < last; ++tile) {
      A* out = tiles + (tile - first) * kRows * depth + k * kRows;
      const int64_t m = tile * kRows;
      if (m + kRows <= p.m) {
        __builtin_memcpy(out, row + m, kRows * sizeof(A));
        continue;
      }
      for (int64_t r = 0; r < kRows; ++r) out[r] = m + r < p.m ? row[m + r] : A(0);
    }
  }
}

template <class A>
void outer(const OuterParams& p, int64_t first, int64_t last, void* scratch) {
  constexpr int lanes = kLanes<A>;
  A* panels = static_cast<A*>(scratch);
  const int64_t most = min_of(p.n, kOuterDepth);
  A* tiles = panels + most * min_of(padded<A>(p.width), kOuterWidth);
  for (int64_t begin = 0; begin < p.width; begin += kOuterWidth) {
    const int64_t end = min_of(p.width, begin + kOuterWidth);
    for (int64_t n0 = 0; n0 < p.n; n0 += kOuterDepth) {
      const int64_t depth = min_of(p.n - n0, kOuterDepth);
      pack_outer_panels(p, n0, depth, begin, end, panels);
      for (int64_t tile0 = first; tile0 < last; tile0 += kOuterTiles) {
        const int64_t tile1 = min_of(last, tile0 + kOuterTiles);
        pack_outer_tiles(p, n0, depth, tile0, tile1, tiles);
        for (int64_t column = begin; column < end; column += kPanel<A>) {
          const int vecs = static_cast<int>(panel_width<A>(column, end) / lanes);
          for (int64_t tile = tile0; tile < tile1; ++tile) {
            alignas(64) A c[kRows * kPanel<A>];
            outer_tile<A>(vecs)(depth, tiles + (tile - tile0) * kRows * depth, 1,
                                panels + (column - begin) * depth, c);
            const A* product = c;
            for (int64_t m = tile * kRows; m < min_of(p.m, (tile + 1) * kRows); ++m) {
              for (int i = 0; i < vecs; ++i, product += lanes) {
                const int64_t at = column + i * lanes;
                A* out = static_cast<A*>(p.out) + m * p.out_stride + at;
                Vec<A> sum = load_vec<Vec<A>>(product);
                if (n0 > 0) sum += load_part(out, end - at);
                store_part(out, sum, end - at);
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
    for (int64_t n0 = 0; n0 < n; n0 += kOuterDepth) {
      Vec<A> sum[kPanelVecs] = {};
      for (int64_t i = n0; i < min_of(n, n0 + kOuterDepth); ++i) {
        const A* row = v + i * stride + column;
        for (int j = 0; j < vecs; ++j) sum[j] += load_part(row + j * lanes, left(j));
      }
      for (int j = 0; j < vecs; ++j) total[j] += sum[j];
    }
    for (int j = 0; j < vecs; ++j) store_part(out + column + j * lanes, total[j], left(j));
  }
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
