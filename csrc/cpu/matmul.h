// Products of many rows with a matrix, of one instruction set: the input product, the gradients of
// the input. Large ones go by packed panels.
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

// Puts a row of a tile's products, `vecs` vectors, where it belongs, plus the bias, plus what is
// there if `add`. left: columns from there on. term(i, k): for mend().
template <class D, class S, class Term>
RNNKERN_INLINE void put_row(const typename D::A* product, int vecs, const Vec<typename D::A>* bias,
                            bool add, S* out, int64_t left, int64_t depth, const Term& term) {
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[kPanelVecs] = {};
  const auto put = [&](int count, auto load, auto store) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs && v < count; ++v)
      sums[v] = load_vec<Vec<A>>(product + v * lanes);
    mend<D>(sums, depth, term);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs && v < count; ++v) {
      if (bias) sums[v] += bias[v];
      if (add) sums[v] += load(v);
      store(v, sums[v]);
    }
  };
  if (left >= kPanel<A>) {
    put(
        kPanelVecs, [&](int v) { return load_all(out + v * lanes); },
        [&](int v, const Vec<A>& sum) { store_all(out + v * lanes, sum); });
  } else {
    put(
        vecs, [&](int v) { return load_part(out + v * lanes, left - v * lanes); },
        [&](int v, const Vec<A>& sum) { store_part(out + v * lanes, sum, left - v * lanes); });
  }
}

// A tile's rows of the result, from `out` on.
template <class A, class S>
RNNKERN_INLINE Fetch::Rows rows_of_tile(const S* out, int64_t stride, int64_t vecs) {
  constexpr int64_t size = sizeof(S);
  return {out, stride * size, vecs * kLanes<A> * size};
}

// ---- products of what is not packed ----

// Rows [m, end) of out, at most kRows, and `columns` columns from `column` on: the sum over k of
// element (row, k) of a times row k of b, null for zeros, plus what is there if `add`.
template <class A, int V, class B>
RNNKERN_INLINE void direct_tile(int64_t depth, int64_t m, int64_t end, int64_t column,
                                int64_t columns, const A* a, int64_t a_row, int64_t a_k, const B& b,
                                A* out, int64_t out_stride, bool add) {
  constexpr int lanes = kLanes<A>;
  int64_t at[kRows];  // beyond the end the last again
  for (int r = 0; r < kRows; ++r) at[r] = min_of(m + r, end - 1) * a_row;
  Vec<A> sums[kRows][V] = {};
  const auto multiply = [&](auto load) __attribute__((always_inline)) {
    for (int64_t k = 0; k < depth; ++k, a += a_k) {
      const A* row = b(k);
      Vec<A> of_row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) of_row[v] = row ? load(row + column, v * lanes) : Vec<A>{};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> element = broadcast(a[at[r]]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] += element * of_row[v];
      }
    }
  };
  if (columns >= V * lanes) {
    multiply([](const A* row, int64_t i) { return load_all(row + i); });
  } else {
    multiply([&](const A* row, int64_t i) { return load_part(row + i, columns - i); });
  }
  out += m * out_stride + column;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, out += out_stride) {
    if (m + r >= end) break;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t i = v * lanes;
      if (add) sums[r][v] += load_part(out + i, columns - i);
      store_part(out + i, sums[r][v], columns - i);
    }
  }
}

// Rows [begin, end) and columns [first, width) of out.
template <class A, class B>
RNNKERN_INLINE void direct_product(int64_t depth, int64_t begin, int64_t end, int64_t first,
                                   int64_t width, const A* a, int64_t a_row, int64_t a_k,
                                   const B& b, A* out, int64_t out_stride, bool add) {
  for (int64_t column = first; column < width; column += kPanel<A>) {
    const int64_t vecs = panel_width<A>(column, width) / kLanes<A>;
    with_vecs(vecs, [&](auto v) __attribute__((always_inline)) {
      for_each_tile(begin, end, [&](int64_t m, int64_t tile_end) __attribute__((always_inline)) {
        direct_tile<A, decltype(v)::value>(depth, m, tile_end, column, width - column, a, a_row,
                                           a_k, b, out, out_stride, add);
      });
    });
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
  return load_all(part);
}

// A tile's product, of whose depth so much is added up at a time: the rounding errors of long sums
// do not pile up. (Tiles of amx.h do so themselves.) Of 521 k's they were 2.7 times those of
// torch's. What is added comes with the first. written: to be fetched; next: the rows that come
// next, or null.
template <class D>
RNNKERN_INLINE void multiply_in_blocks(ProductsOf<D>& products, int rows, int vecs, int64_t depth,
                                       const typename D::Element* from, int64_t stride,
                                       const typename D::Element* panel, Target<typename D::A> to,
                                       const Fetch::Rows& written, const typename D::Element* next,
                                       Chore* chore) {
  constexpr int64_t most = 256, size = sizeof(typename D::Element);
  const int64_t blocks = D::kTiles || depth <= most ? 1 : (depth + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = depth * i / blocks, last = depth * (i + 1) / blocks;
    Fetch fetch = {};
    if (next) fetch.read[0] = {next + first, stride * size, (last - first) * size};
    if (i == 0) fetch.written = written;
    products(rows, vecs, depth, first, last, from, stride, panel, to, fetch, chore);
    to.bias = nullptr;
    to.add = true;
  }
}

// scratch: row_bytes() for each row, but of float32 and float64 that go elsewhere; then a panel, if
// panels are to be packed.
template <class S>
void matmul(const MatmulParams& p, int64_t begin, int64_t end, int64_t first, int64_t last,
            void* scratch) {
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;
  constexpr int lanes = kLanes<A>;
  const S* a = static_cast<const S*>(p.a);
  if constexpr (std::is_same_v<S, A>) {
    if (p.direct) {
      const auto row = [&](int64_t k) {
        return static_cast<const A*>(p.matrix.data) + k * p.matrix.stride_k;
      };
      return direct_product<A>(p.matrix.depth, begin, end, first * kPanel<A>,
                               min_of(last * kPanel<A>, p.matrix.width), a, p.a_stride, 1, row,
                               static_cast<A*>(p.out), p.out_stride, p.add);
    }
  }
  const S *bias_ih = static_cast<const S*>(p.bias_ih), *bias_hh = static_cast<const S*>(p.bias_hh);
  const int64_t depth = elements<D>(p.matrix.depth), width = p.matrix.width;
  const Element* rows = nullptr;  // of row `begin`
  int64_t stride = 0;
  auto* packed = static_cast<Element*>(scratch);  // one panel
  if constexpr (std::is_same_v<S, Element>) {
    if (p.a != p.out) {
      rows = a + begin * p.a_stride;
      stride = p.a_stride;
    }
  }
  if (!rows) {
    rows = packed;
    stride = row_stride<D>(p.matrix.depth);
    for (int64_t row = begin; row < end; ++row, packed += stride) {
      store_row(a + row * p.a_stride, p.matrix.depth, packed);
    }
  }
  ProductsOf<D> products(/*alone=*/false);
  // A tile's rows of products that have yet to be stored.
  struct {
    const A* product;
    int64_t row, column;
    int vecs;
    Vec<A> bias[kPanelVecs];
  } made = {};
  const auto store_rows = [&](int64_t rows) __attribute__((always_inline)) {
    for (; rows > 0; --rows) {
      S* out = static_cast<S*>(p.out) + made.row * p.out_stride + made.column;
      const auto term = [&](int v, int64_t k) {
        return broadcast(load_one(a + made.row * p.a_stride + k)) *
               load_columns<S>(p.matrix, k, made.column + v * lanes);
      };
      put_row<D>(made.product, made.vecs, made.bias, p.add, out, width - made.column,
                 p.matrix.depth, term);
      made.product += made.vecs * lanes;
      ++made.row;
    }
  };
  ChoreOf chore(store_rows);
  alignas(64) A sums[D::kTiles ? 2 : 1][ProductsOf<D>::kMostRows * kPanel<A>];
  int filled = 0;  // of these, last

  for (int64_t column = first * kPanel<A>; column < min_of(width, last * kPanel<A>);
       column += kPanel<A>) {
    const int vecs = static_cast<int>(panel_width<A>(column, width) / lanes);
    const Element* panel = packed;
    if (p.panels) {
      panel = static_cast<const Element*>(p.panels) + column * panel_depth<D>(p.matrix.depth);
    } else {
      MatrixView part = p.matrix;
      part.data = static_cast<const S*>(part.data) + column * part.stride_n;
      part.width = min_of(width - column, kPanel<A>);
      pack<S>(part, 0, 1, packed);
    }
    Vec<A> bias[kPanelVecs] = {};
    for (int v = 0; bias_ih && v < vecs; ++v) {
      const int64_t at = column + v * lanes;
      bias[v] = load_part(bias_ih + at, width - at) + load_part(bias_hh + at, width - at);
    }
    for_each_tile<ProductsOf<D>::kMostRows>(begin, end, [&](int64_t row, int64_t tile_end) {
      const int tile_rows = static_cast<int>(tile_end - row);
      const Element* from = rows + (row - begin) * stride;
      S* const out = static_cast<S*>(p.out) + row * p.out_stride + column;
      const Fetch::Rows written = rows_of_tile<A>(out, p.out_stride, vecs);
      if constexpr (!D::kTiles && std::is_same_v<S, A>) {
        if (column + kPanel<A> <= width) {
          // The first panel's rows come from memory.
          const bool next = column == first * kPanel<A> && tile_end < end;
          multiply_in_blocks<D>(products, tile_rows, vecs, depth, from, stride, panel,
                                {out, p.out_stride, bias_ih ? bias : nullptr, p.add}, written,
                                next ? from + tile_rows * stride : nullptr, nullptr);
          return;
        }
      }
      if constexpr (D::kTiles) filled = !filled;
      A* const c = sums[filled];
      multiply_in_blocks<D>(products, tile_rows, vecs, depth, from, stride, panel,
                            {c, vecs * lanes}, written, nullptr, &chore);
      // Of tiles, while the next is multiplied.
      chore.rest();
      made = {c, row, column, vecs, {}};
      for (int v = 0; v < vecs; ++v) made.bias[v] = bias[v];
      if constexpr (D::kTiles) {
        chore.left = tile_end - row;
      } else {
        store_rows(tile_end - row);
      }
    });
  }
  chore.rest();
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
