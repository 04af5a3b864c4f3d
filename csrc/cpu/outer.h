// Sums over many rows, of one instruction set: of outer products, which are the gradients of the
// weights, and of the rows themselves, which are those of the biases.
#pragma once
#include "matmul.h"

namespace rnnkern::cpu::RNNKERN_ISA {

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
  with_vecs<kPanelVecs - 1>(vecs, [&](auto v) __attribute__((always_inline)) {
    multiply_to<D, kRows, decltype(v)::value, false, kRows>(depth, tile, 1, panel, to, NoTurn());
  });
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
