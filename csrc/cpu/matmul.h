// The products outside the scan, of one instruction set: many rows times a matrix, which the input
// product and the gradients of the input are; sums of outer products, which are the gradients of
// the weights; and sums of rows, those of the biases. The large ones go by packed panels.
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
    const auto vecs = panel_width<A>(column, width) / kLanes<A>;
    for (int64_t m = begin; m < end; m += kRows) {
      const auto tile = [&](auto count) __attribute__((always_inline)) {
        direct_tile<A, decltype(count)::value>(depth, m, min_of(m + kRows, end), column,
                                               width - column, a, a_row, a_k, b, out, out_stride,
                                               add);
      };
      if (vecs == 1) {
        tile(std::integral_constant<int, 1>{});
      } else if (vecs == 2) {
        tile(std::integral_constant<int, 2>{});
#if RNNKERN_PANEL_VECS >= 4
      } else if (vecs == 3) {
        tile(std::integral_constant<int, 3>{});
      } else {
        tile(std::integral_constant<int, 4>{});
#endif
      }
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

// ---- sums of outer products ----

// So much is packed at a time, and as much of the next while it is multiplied: rows; columns of a,
// in panels; and columns of v, in tiles. (In float32, one thread of a Zen 4 with 1 MB of cache, H
// 1024: 104 GFLOP/s with 256 or 512 columns at a time, 108 with 1024, also of 256 rows and 512.)
constexpr int64_t kOuterDepth = 128;
template <class D>
constexpr int64_t kOuterWidth = D::kTiles ? 512 : 1024;
constexpr int64_t kOuterRows = 192;
// The columns of v, rows of the result, that are one tile.
template <class D>
constexpr int64_t kOuterTile = D::kTiles ? kTileRows : kRows;

// While a block is multiplied the next one, if there is one, is packed.
template <class D>
int64_t outer_lots(int64_t n, int64_t width, int64_t tiles) {
  const bool one =
      n <= kOuterDepth && width <= kOuterWidth<D> && tiles * kOuterTile<D> <= kOuterRows;
  return one ? 1 : 2;
}

// The product of one tile, of processors that do not multiply whole ones.
template <class D, class Turn>
RNNKERN_INLINE void outer_product(int vecs, int64_t depth, const typename D::A* tile,
                                  const typename D::A* panel, const Target<typename D::A>& to,
                                  const Turn& turn) {
  if (vecs == kPanelVecs) {
    return multiply_to<D, kRows, kPanelVecs, false, kRows>(depth, tile, 1, panel, to, turn);
  }
  for (int r = 0; r < kRows; ++r) turn(r);
#if RNNKERN_PANEL_VECS >= 4
  if (vecs == 3) return multiply_to<D, kRows, 3, false, kRows>(depth, tile, 1, panel, to, NoTurn());
  if (vecs == 2) return multiply_to<D, kRows, 2, false, kRows>(depth, tile, 1, panel, to, NoTurn());
#endif
  multiply_to<D, kRows, 1, false, kRows>(depth, tile, 1, panel, to, NoTurn());
}

// Row n of a, from its first column on; null: zeros.
template <class S>
RNNKERN_INLINE const S* outer_row(const OuterParams& p, int64_t n) {
  const auto *a = static_cast<const S*>(p.a), *initial = static_cast<const S*>(p.initial);
  const int64_t at = p.a_rows ? p.a_rows[n] : n;
  return at >= 0 ? a + at * p.a_stride : initial ? initial + ~at * p.initial_stride : nullptr;
}

// What is multiplied at a time: rows [n0, n1) of columns [begin, end) of a and of tiles [first,
// last) of v.
struct OuterBlock {
  int64_t n0, n1, begin, end, first, last;
};

// Packs a block of a, as panels, and of v, as tiles, piece by piece.
template <class S>
class OuterPacking {
 public:
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;

  explicit OuterPacking(const OuterParams& p) : p_(p) {}

  // panels: null if they are packed.
  void start(const OuterBlock& block, Element* panels, Element* tiles) {
    block_ = block;
    panels_ = panels;
    tiles_ = tiles;
    rows_ = block.n1 - block.n0;
    depth_ = elements<D>(rows_);
    whole_ = depth_ / D::kPlanes * D::kDepth;
    of_panels_ = {panels ? 0 : whole_, block.begin};
    of_tiles_ = {0, block.first * kOuterTile<D>};
    const auto parts = [](int64_t all, int64_t part) { return (all + part - 1) / part; };
    const int64_t columns = parts(block.end - block.begin, kPanel<A>) * (panels ? 1 : 0);
    const int64_t rows = min_of(block.last * kOuterTile<D>, p_.m) - of_tiles_.column;
    left_ = whole_ / D::kDepth * columns +
            (D::kTiles ? whole_ / kVector * parts(rows, kVector)
                       : whole_ * parts(rows, kTilesAtOnce * kOuterTile<D>));
  }

  int64_t left() const { return left_; }  // pieces
  void piece() {
    if (left_ == 0) return;
    --left_;
    if (of_panels_.k < whole_) {
      pack_panels();
    } else {
      pack_tiles();
    }
  }
  void rest() {
    while (left_ > 0) piece();
  }

 private:
  static constexpr int kVector = kLanes<A>, kAhead = 16, kTilesAtOnce = 8;
  struct Next {
    int64_t k, column;
  };

  // Of one panel, the k's of an element.
  void pack_panels() {
    const int64_t k = of_panels_.k, first = of_panels_.column;
    const int64_t begin = block_.begin, end = block_.end, depth = depth_;
    const int64_t last = min_of(first + kPanel<A>, end);
    const S *rows[D::kDepth], *ahead[D::kDepth];
    bool whole = (last - first) % kVector == 0;
    for (int64_t i = 0; i < D::kDepth; ++i) {
      const int64_t n = block_.n0 + k + i;
      rows[i] = k + i < rows_ ? outer_row<S>(p_, n) : nullptr;
      ahead[i] = n + kAhead < p_.n ? outer_row<S>(p_, n + kAhead) : nullptr;
      whole = whole && rows[i];
    }
    const auto pack_columns = [&](auto load) __attribute__((always_inline)) {
      const int64_t width = panel_width<A>(first, end);
      for (int64_t j = 0; j < width; j += kVector) {
        Vec<A> block[D::kDepth];
#pragma GCC unroll 2
        for (int i = 0; i < D::kDepth; ++i) {
          block[i] = load(rows[i], first + j);
          if (ahead[i]) __builtin_prefetch(ahead[i] + first + j);
        }
        pack_block<D>(block, k, D::kDepth, j, width, depth, panels_ + (first - begin) * depth);
      }
    };
    if (whole) {
      pack_columns([](const S* row, int64_t at) { return load_all(row + at); });
    } else {
      pack_columns(
          [&](const S* row, int64_t at) { return row ? load_part(row + at, end - at) : Vec<A>{}; });
    }
    of_panels_ = last < end ? Next{k, last} : Next{k + D::kDepth, begin};
  }

  // Of a vector of columns, as many k's; or of some tiles, one k.
  void pack_tiles() {
    constexpr int64_t tile_rows = kOuterTile<D>;
    auto& [k, column] = of_tiles_;
    const int64_t first = block_.first * tile_rows, last = min_of(block_.last * tile_rows, p_.m);
    const auto* v = static_cast<const S*>(p_.v) + (block_.n0 + k) * p_.v_stride;
    const int64_t stride = row_stride<D>(rows_);
    if constexpr (D::kTiles) {
      Vec<A> block[kVector];
#pragma GCC unroll 16
      for (int i = 0; i < kVector; ++i) {
        const int64_t ahead = i + 2 * kVector;
        if (block_.n0 + k + ahead < p_.n) __builtin_prefetch(v + ahead * p_.v_stride + column);
        block[i] =
            k + i < rows_ ? load_part(v + i * p_.v_stride + column, last - column) : Vec<A>{};
      }
      transpose<A>(block);
      Element* out = tiles_ + (column - first) * stride;
#pragma GCC unroll 16
      for (int i = 0; i < kVector; ++i) D::store(out + i * stride, k, block[i]);
      column += kVector;
      if (column >= last) of_tiles_ = {k + kVector, first};
    } else {
      if (block_.n0 + k + kAhead < p_.n) {
        for (int64_t i = 0; i < kTilesAtOnce * tile_rows; i += 64 / int64_t{sizeof(S)}) {
          __builtin_prefetch(v + kAhead * p_.v_stride + column + i);
        }
      }
      const int64_t end = min_of(column + kTilesAtOnce * tile_rows, last);
      for (; column < end; column += tile_rows) {
        Element* out = tiles_ + (column - first) * stride + k * tile_rows;
        if (std::is_same_v<S, Element> && column + tile_rows <= last) {
          __builtin_memcpy(out, v + column, tile_rows * sizeof(S));
          continue;
        }
        for (int64_t r = 0; r < tile_rows; ++r) {
          out[r] = column + r < last ? load_one(v + column + r) : Element(0);
        }
      }
      if (column >= last) of_tiles_ = {k + 1, first};
    }
  }

  const OuterParams& p_;
  OuterBlock block_;
  Element *panels_, *tiles_;
  int64_t rows_, depth_, whole_;  // whole: so many k's are packed, those beyond the rows zero
  Next of_panels_, of_tiles_;
  int64_t left_;
};

// Rows [begin, end) of the result, of rows as they lie.
template <class A>
void outer_directly(const OuterParams& p, int64_t begin, int64_t end) {
  const A* v = static_cast<const A*>(p.v);
  for (int64_t n0 = 0; n0 < p.n; n0 += kOuterDepth) {
    const auto row = [&](int64_t k) { return outer_row<A>(p, n0 + k); };
    direct_product<A>(min_of(p.n - n0, kOuterDepth), begin, end, 0, p.width, v + n0 * p.v_stride, 1,
                      p.v_stride, row, static_cast<A*>(p.out), p.out_stride, n0 > 0);
  }
}

template <class S>
void outer(const OuterParams& p, int64_t first, int64_t last, void* scratch) {
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;
  constexpr int lanes = kLanes<A>;
  constexpr int64_t tile_rows = kOuterTile<D>, most_tiles = kOuterRows / tile_rows;
  if constexpr (std::is_same_v<S, A>) {
    if (p.direct) return outer_directly<A>(p, first * tile_rows, min_of(last * tile_rows, p.m));
  }
  const int64_t lots = outer_lots<D>(p.n, p.width, last - first);
  const int64_t most = min_of(p.n, kOuterDepth);
  const int64_t of_panels = elements<D>(most) * min_of(padded<A>(p.width), kOuterWidth<D>);
  const int64_t of_tiles = row_stride<D>(most) * min_of(last - first, most_tiles) * tile_rows;
  Element *panels[2] = {}, *tiles[2] = {};
  for (int i = 0; i < lots; ++i) {
    panels[i] = static_cast<Element*>(scratch) + i * (of_panels + of_tiles);
    tiles[i] = panels[i] + of_panels;
  }

  // Rows of a tile's sums that have yet to be added to the result.
  struct {
    const A* product;
    int64_t m, end, column, n0, n1;
    int vecs;
  } made = {};
  const auto add_row = [&]() __attribute__((always_inline)) {
    const auto* v = static_cast<const S*>(p.v) + made.m;
    A* out = static_cast<A*>(p.out) + made.m * p.out_stride;
    const auto term = [&](int i, int64_t k) {
      const S* row = outer_row<S>(p, made.n0 + k);
      const int64_t at = made.column + i * lanes;
      return broadcast(load_one(v + (made.n0 + k) * p.v_stride)) *
             (row ? load_part(row + at, p.width - at) : Vec<A>{});
    };
    put_row<D>(made.product, made.vecs, static_cast<Vec<A>*>(nullptr), made.n0 > 0,
               out + made.column, p.width - made.column, made.n1 - made.n0, term);
    made.product += made.vecs * lanes;
    ++made.m;
  };
  OuterPacking<S> packing(p);
  ProductsOf<D> products(/*alone=*/false);
  // Of whole tiles; otherwise there are turns, below.
  const auto pieces = [&](int64_t count) __attribute__((always_inline)) {
    for (; count > 0; --count) {
      if (made.m == made.end) {
        packing.piece();
      } else {
        for (int i = 0; i < 4 && made.m < made.end; ++i) add_row();
      }
    }
  };
  ChoreOf chore(pieces);
  alignas(64) A sums[D::kTiles ? 2 : 1][tile_rows * kPanel<A>];
  int filled = 0;  // of these, last

  // Block i. Of all blocks the tiles change first, then the rows, then the columns.
  const int64_t groups = (last - first + most_tiles - 1) / most_tiles;
  const int64_t deep = (p.n + kOuterDepth - 1) / kOuterDepth;
  const int64_t blocks = groups * deep * ((p.width + kOuterWidth<D> - 1) / kOuterWidth<D>);
  const auto block_at = [&](int64_t i) -> OuterBlock {
    const int64_t group = i % groups, n0 = i / groups % deep * kOuterDepth;
    const int64_t begin = i / groups / deep * kOuterWidth<D>;
    return {n0,
            min_of(n0 + kOuterDepth, p.n),
            begin,
            min_of(begin + kOuterWidth<D>, p.width),
            first + (last - first) * group / groups,
            first + (last - first) * (group + 1) / groups};
  };
  const auto start_packing = [&](int64_t i) {
    packing.start(block_at(i), i % groups ? nullptr : panels[i / groups % 2], tiles[i % 2]);
  };

  start_packing(0);
  for (int64_t i = 0; i < blocks; ++i) {
    packing.rest();
    if (i + 1 < blocks) start_packing(i + 1);
    const OuterBlock block = block_at(i);
    const int64_t rows = block.n1 - block.n0;
    const int64_t depth = elements<D>(rows), stride = row_stride<D>(rows);
    for (int64_t column = block.begin; column < block.end; column += kPanel<A>) {
      const int vecs = static_cast<int>(panel_width<A>(column, block.end) / lanes);
      const Element* panel = panels[i / groups % 2] + (column - block.begin) * depth;
      for (int64_t tile = block.first; tile < block.last; ++tile) {
        const int64_t m = tile * tile_rows, end = min_of(p.m, m + tile_rows);
        const int64_t columns_left = (block.end - column + kPanel<A> - 1) / kPanel<A>;
        const int64_t products_left =
            columns_left * (block.last - block.first) - (tile - block.first);
        const Element* from = tiles[i % 2] + (tile - block.first) * tile_rows * stride;
        if constexpr (D::kTiles) {
          filled = !filled;
          products(static_cast<int>(end - m), vecs, depth, 0, depth, from, stride, panel,
                   {sums[filled], vecs * lanes}, {}, &chore);
          chore.rest();
          made = {sums[filled], m, end, column, block.n0, block.n1, vecs};
          chore.left = (end - m + 3) / 4 + (packing.left() + products_left - 1) / products_left;
        } else {
          const int64_t turns = products_left * kRows, each = (packing.left() + turns - 1) / turns;
          A* const out = static_cast<A*>(p.out) + m * p.out_stride + column;
          const Fetch fetch = {{}, rows_of_tile<A>(out, p.out_stride, vecs)};
          const bool whole = m + kRows <= p.m && column + kPanel<A> <= p.width;
          const Target<A> in_place = {out, p.out_stride, nullptr, block.n0 > 0};
          const Target<A> aside = {sums[0], vecs * lanes};
          outer_product<D>(vecs, depth, from, panel, whole ? in_place : aside,
                           [&](int r) __attribute__((always_inline)) {
                             if (m + r < end) fetch(r);
                             for (int64_t i = 0; i < each; ++i) packing.piece();
                           });
          made = {sums[0], whole ? end : m, end, column, block.n0, block.n1, vecs};
          while (made.m < made.end) add_row();
        }
      }
    }
  }
  while (made.m < made.end) add_row();
}

// Panels [first, last) of the sum of n rows. In blocks, so that the rounding errors of many rows do
// not pile up.
template <class S>
void column_sums(const S* v, int64_t n, int64_t stride, int64_t width, int64_t first, int64_t last,
                 S* out) {
  using A = typename Storage<S>::Acc;
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
        const S* row = v + i * stride + column;
        for (int j = 0; j < vecs; ++j) sum[j] += load_part(row + j * lanes, left(j));
      }
      for (int j = 0; j < vecs; ++j) total[j] += sum[j];
    }
    for (int j = 0; j < vecs; ++j) store_part(out + column + j * lanes, total[j], left(j));
  }
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
