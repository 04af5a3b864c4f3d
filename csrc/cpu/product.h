// The products of one instruction set: rows times a matrix in packed panels, which is what a scan's
// step is, and what the larger products of matmul.h and outer.h are made of.
//
// The matrix lies in panels of kPanel columns, k-major, so that the inner loop is one broadcast of
// a row's element and a few multiply-adds on contiguous loads. A tile of kRows rows by one panel
// stays in registers while k runs.
#pragma once
#include "dot.h"
#include "scan_params.h"

namespace rnnkern::cpu::RNNKERN_ISA {

constexpr int kPanelVecs = RNNKERN_PANEL_VECS;
constexpr int kRows = 6;

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
  return ((depth + D::kDepth - 1) / D::kDepth + unit - 1) / unit * unit * D::kPlanes;
}

// Elements from one row to the next, of those that meet a panel. For tiles an odd number of cache
// lines: the 16 rows of one then lie in as many sets of the first-level cache. In one thread's
// product by parts of float32 in cache: 334 GFLOP/s of H 512, 369 so; 128 and 374 of H 1024.
template <class D>
RNNKERN_INLINE int64_t row_stride(int64_t width) {
  const int64_t all = elements<D>(padded<typename D::A>(width));
  return D::kTiles ? all + (all / kTileDepth % 2 ? 0 : kTileDepth) : all;
}

// The vectors of one panel column: its elements and what lies behind them.
template <class D>
RNNKERN_INLINE int64_t panel_depth(int64_t depth) {
  return elements<D>(depth) + D::kSums;
}

// Where vector n of row k lies in a panel of `width` columns and `depth` rows of elements: row by
// row; or tile by tile, each together, two side by side, which is how they are read.
template <class D>
RNNKERN_INLINE int64_t place_in_panel(int64_t k, int64_t n, int64_t width, int64_t depth) {
  if constexpr (!D::kTiles) return k * width + n;
  constexpr uint64_t lanes = kLanes<typename D::A>, pair = 2 * lanes;
  const uint64_t uk = k, un = n, before = un / pair * pair;
  const uint64_t side = width - before < pair ? lanes : pair;  // of this pair, the last may be one
  const uint64_t tile = uk / kTileDepth * side + un % pair / lanes * lanes;
  return before * depth + tile * kTileDepth + uk % kTileDepth * lanes;
}

// ---- packing ----

// Rows k0 .. k0 + deep of vector n of a panel. Changes the block.
template <class D>
RNNKERN_INLINE void pack_block(Vec<typename D::A>* block, int64_t k0, int64_t deep, int64_t n,
                               int64_t width, int64_t depth, typename D::Element* panel) {
  auto* const first = panel + place_in_panel<D>(0, n, width, depth);
  const int64_t tile_size =
      place_in_panel<D>(kTileDepth, n, width, depth) - place_in_panel<D>(0, n, width, depth);
  for (int64_t k = 0; k < deep; k += D::kDepth) {
    const uint64_t element = (k0 + k) / uint64_t{D::kDepth};
    const uint64_t tile = element / kTileDepth, within = element % kTileDepth;
    auto* to = D::kTiles ? first + tile * D::kPlanes * tile_size + within * kLanes<typename D::A>
                         : first + element * width;
    if constexpr (D::kPlanes == 1) {
      store_vec(to, D::join(block + k));
    } else {
      Vec<typename D::A> planes[D::kPlanes];
      D::split(block + k, planes);
#pragma GCC unroll 3
      for (int plane = 0; plane < D::kPlanes; ++plane) {
        store_vec(to + plane * tile_size, planes[plane]);
      }
    }
  }
}

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
    const int64_t depth = elements<D>(matrix.depth);
    if constexpr (D::kTiles) {  // the last tile may not be full
      const int64_t last_tile = depth ? depth - kTileDepth * D::kPlanes : 0;
      for (int64_t n = 0; n < width; n += lanes) {
        for (int64_t k = last_tile; k < depth; ++k) {
          store_vec(out + place_in_panel<D>(k, n, width, depth), Vec<A>{});
        }
      }
    }
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
            block[k] = load_all(part);
          }
        }
        pack_block<D>(block, k0, deep, n0, width, depth, out);
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
        constexpr int64_t lanes = kLanes<float>;
        out[place_in_panel<D>(k, n / lanes * lanes, width, depth) + n % lanes] = bytes;
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
      store_vec(out, load_all(part) + load_all(more));
    }
  }
}

// ---- the product of a tile ----

// Few accumulators cannot hide the latency of a multiply-add, so tiles of few vectors split k over
// several sets of them. It goes by what a full tile has, not by the tile's own rows: a row's sum
// must not depend on the tile it came into, or the number of threads would change the bits.
template <int V, bool alone>
constexpr int kSets = (alone ? V : kRows * V) >= 8   ? 1
                      : (alone ? V : kRows * V) >= 4 ? 2
                                                     : 4;

struct NoTurn {
  RNNKERN_INLINE void operator()(int) const {}
};

// Rows of memory that will be touched and that the processor does not foresee. Asked for row by
// row, while a tile is multiplied (by amx.h, before): of more than a few requests at once a
// processor drops some. One thread of a Zen 4, whose peak is 117 GFLOP/s, if all are asked for
// before a tile, and so: scans of H 256 backward 88 and 98, of H 512 forward 102 and 107; gradients
// of weights of H 256 88 and 103, of H 512 97 and 107, half of which is due to packing that is
// spread in the same way (outer.h).
struct Fetch {
  struct Rows {
    const void* first;
    int64_t stride, bytes;  // from row to row, and of a row
  };
  Rows read[2], written;

  RNNKERN_INLINE void operator()(int64_t row) const {
    // A panel's floats at once: a loop over lines takes longer.
    constexpr int64_t line = 64, floats = kPanelVecs * RNNKERN_VECTOR_BYTES;
    constexpr int64_t wide = floats > line ? floats : line;
    const auto fetch = [&](const Rows& rows, auto written) __attribute__((always_inline)) {
      const char* at = static_cast<const char*>(rows.first) + row * rows.stride;
      int64_t i = 0;
      for (; i + wide <= rows.bytes; i += wide) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < wide; j += line) __builtin_prefetch(at + i + j, written.value);
      }
      for (; i < rows.bytes; i += line) __builtin_prefetch(at + i, written.value);
    };
    fetch(read[0], std::false_type());
    fetch(read[1], std::false_type());
    fetch(written, std::true_type());
  }
};
constexpr Fetch kNothingToFetch = {};

// Where the rows of a product go, and what is added to them.
template <class A>
struct Target {
  A* first;
  int64_t stride;
  const Vec<A>* bias = nullptr;  // of the columns, or null
  bool add = false;              // to what is there
};

// c = rows (R, depth) * columns (depth, V vectors), depth in elements: row(r, k) is an element, and
// column(r, k) where those lie that it meets, the same for all rows if shared. turn(r), for each
// row, is done at as many places of the depth, beside the products.
template <class D, int R, int V, int sets, bool shared, class Row, class Column, class Turn>
RNNKERN_INLINE void multiply(int64_t depth, const Row& row, const Column& column,
                             Vec<typename D::A> (&c)[R][V], const Turn& turn) {
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  Vec<A> acc[sets][R][V] = {};
  const auto add = [&](int s, int64_t k) __attribute__((always_inline)) {
    Vec<A> b[V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r == 0 || !shared) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) b[v] = load_vec<Vec<A>>(column(r, k) + v * lanes);
      }
      const Vec<A> a = D::broadcast(row(r, k));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[s][r][v] = D::add(acc[s][r][v], a, b[v]);
    }
  };
  int64_t k = 0;
  constexpr int turns = std::is_same_v<Turn, NoTurn> ? 1 : R;
  for (int r = 0; r < turns; ++r) {
    turn(r);
    const int64_t end = r + 1 == turns ? depth : depth * (r + 1) / turns;
    for (; k + sets <= end; k += sets) {
#pragma GCC unroll 8
      for (int s = 0; s < sets; ++s) add(s, k + s);
    }
  }
  for (; k < depth; ++k) add(0, k);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      // Halves of halves, each by a loop that the compiler sees the end of: else acc is in memory.
#pragma GCC unroll 8
      for (int s = 0; s < (sets == 4 ? 2 : 0); ++s) {
        acc[s][r][v] = D::sum(acc[s][r][v], acc[(s + 2) % sets][r][v]);
      }
      if (sets >= 2) acc[0][r][v] = D::sum(acc[0][r][v], acc[1 % sets][r][v]);
      c[r][v] = acc[0][r][v];
    }
  }
}

// The same in memory; element (r, k) of the rows is at r * stride + k * k_stride. alone: the whole
// batch is one row.
template <class D, int R, int V, bool alone, int k_stride = 1, class Turn>
RNNKERN_INLINE void multiply_to(int64_t depth, const typename D::Element* __restrict rows,
                                int64_t stride, const typename D::Element* __restrict panel,
                                const Target<typename D::A>& to, const Turn& turn) {
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[R][V];
  multiply<D, R, V, kSets<V, alone>, true>(
      depth,
      [&](int r, int64_t k)
          __attribute__((always_inline)) { return rows[r * stride + k * k_stride]; },
      [&](int, int64_t k) __attribute__((always_inline)) { return panel + k * V * lanes; }, sums,
      turn);
  const auto each = [&](auto visit) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) visit(sums[r][v], v, to.first + r * to.stride + v * lanes);
    }
  };
  if (to.bias) each([&](Vec<A>& sum, int v, A*) { sum = D::sum(sum, to.bias[v]); });
  if (to.add) each([&](Vec<A>& sum, int, A* at) { sum = D::sum(sum, load_vec<Vec<A>>(at)); });
  each([&](Vec<A>& sum, int, A* at) { store_vec(at, sum); });
}

template <class D, int R, int V, bool alone>
void product(int64_t depth, const typename D::Element* rows, int64_t stride,
             const typename D::Element* panel, const Target<typename D::A>& to,
             const Fetch& fetch) {
  if constexpr (alone) {
    multiply_to<D, R, V, alone>(depth, rows, stride, panel, to, NoTurn());
  } else {
    multiply_to<D, R, V, alone>(depth, rows, stride, panel, to, fetch);
  }
}
template <class D>
using Product = void (*)(int64_t, const typename D::Element*, int64_t, const typename D::Element*,
                         const Target<typename D::A>&, const Fetch&);

template <class D, int V>
RNNKERN_INLINE Product<D> product_of_rows(int rows, bool alone) {
  if (alone) return product<D, 1, V, true>;
  constexpr Product<D> table[] = {product<D, 1, V, false>, product<D, 2, V, false>,
                                  product<D, 3, V, false>, product<D, 4, V, false>,
                                  product<D, 5, V, false>, product<D, 6, V, false>};
  return table[rows - 1];
}

// visit(the number of a panel's vectors, at most `most`, as a constant).
template <int most = kPanelVecs, class Visit>
RNNKERN_INLINE auto with_vecs(int64_t vecs, const Visit& visit) {
  if constexpr (most > 1) {
    if (vecs < most) return with_vecs<most - 1>(vecs, visit);
  }
  return visit(std::integral_constant<int, most>{});
}

template <class D>
RNNKERN_INLINE Product<D> find_product(int rows, int vecs, bool alone) {
  return with_vecs(vecs, [&](auto v) __attribute__((always_inline)) {
    return product_of_rows<D, decltype(v)::value>(rows, alone);
  });
}

// What can be done while the tiles of amx.h are multiplied, by units that are idle then, in pieces
// of some 200 instructions: of many more, the processor does not see the tiles beyond.
class Chore {
 public:
  int64_t left = 0;  // pieces
  // In how many turns to do them.
  RNNKERN_INLINE void spread(int64_t turns) { each_ = (left + turns - 1) / turns; }
  RNNKERN_INLINE void turn() {
    if (left > 0) take(min_of(each_, left));
  }
  RNNKERN_INLINE void rest() {
    if (left > 0) take(left);
  }

 protected:
  virtual void some(int64_t pieces) = 0;

 private:
  RNNKERN_INLINE void take(int64_t pieces) {
    left -= pieces;
    some(pieces);
  }
  int64_t each_ = 0;
};
template <class F>
class ChoreOf final : public Chore {
 public:
  explicit ChoreOf(const F& pieces) : pieces_(pieces) {}

 private:
  // Its code is not wanted in each of the products.
  __attribute__((noinline)) void some(int64_t pieces) override { pieces_(pieces); }
  const F& pieces_;
};

// The products of tiles, and how many rows are one.
template <class D>
class Products {
 public:
  static constexpr int kMostRows = kRows;
  explicit Products(bool alone) : alone_(alone) {}
  // Of elements [first, last) of the depth.
  RNNKERN_INLINE void operator()(int rows, int vecs, int64_t, int64_t first, int64_t last,
                                 const typename D::Element* state, int64_t stride,
                                 const typename D::Element* panel, const Target<typename D::A>& to,
                                 const Fetch& fetch = kNothingToFetch, Chore* = nullptr) {
    find_product<D>(rows, vecs, alone_)(last - first, state + first, stride,
                                        panel + first * vecs * kLanes<typename D::A>, to, fetch);
  }

 private:
  bool alone_;  // the whole batch is one row
};

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

}  // namespace rnnkern::cpu::RNNKERN_ISA
