// The scan of several rows through a matrix of any size: each step multiplies the states of all
// rows by one panel of columns after another, so that a panel is read from cache once per step.
//
// The state is kept in the accumulation type, rounded to the storage type once per step.
#pragma once
#include <utility>

#include "epilogues.h"
#include "matmul.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// Both buffers start with the initial state: a row of a packed batch may enter at any step.
template <class S>
void start_rows(const ScanParams& p, int64_t group, int64_t begin, int64_t end, void* scratch) {
  using D = Dot<S>;
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  const int64_t stride = row_stride<D>(p.hidden), rows = end - begin;
  auto* state = static_cast<typename D::Element*>(scratch);
  auto* next = state + rows * stride;
  if (D::kTiles) __builtin_memset(state, 0, 2 * rows * stride * sizeof *state);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < p.hidden; j += lanes) {
      Vec<A> v = {};
      if (p.initial) {
        const auto* initial = static_cast<const S*>(p.initial);
        v = load_part(initial + (group * p.batch + begin + r) * p.hidden + j, p.hidden - j);
      }
      D::store(state + r * stride, j, v);
      D::store(next + r * stride, j, v);
    }
  }
}

// The state that row meets in step t, as it was before it became elements: the output of its step
// before, or the initial state; null: zeros.
template <class S>
const S* previous(const ScanParams& p, int64_t group, int64_t row, bool entered, int64_t t) {
  const auto *h = static_cast<const S*>(p.output), *initial = static_cast<const S*>(p.initial);
  if (!entered) return initial ? initial + (group * p.batch + row) * p.hidden : nullptr;
  const int64_t before = p.reverse[group] ? t + 1 : t - 1;
  return h + ((p.offset(before) + row) * p.groups + group) * p.hidden;
}

// What an epilogue will touch of a tile's rows, from the one on.
template <class S>
RNNKERN_INLINE Fetch rows_to_fetch(const ScanParams& p, int64_t row, int64_t group, int64_t column,
                                   int vecs) {
  constexpr int64_t size = sizeof(S);
  const int64_t lanes = kLanes<typename Storage<S>::Acc>;
  const int64_t stride = p.groups * p.hidden, at = row * stride + group * p.hidden + column;
  const int64_t input_at = row * p.input_stride + group * p.input_apart + column;
  const int64_t bytes = min_of(vecs * lanes, p.hidden - column) * size;
  const auto rows = [&](const void* all, int64_t at, int64_t stride) -> Fetch::Rows {
    if (!all) return {};
    return {static_cast<const char*>(all) + at * size, stride * size, bytes};
  };
  const bool has_input = p.recurrence != Recurrence::kLayer;
  return {{rows(has_input ? p.input : nullptr, input_at, p.input_stride), rows(p.aux, at, stride)},
          rows(p.output != p.input ? p.output : nullptr, at, stride)};
}

// A tile whose products are made, and its vectors, row by row, that an epilogue has yet to take.
template <class S>
struct Made {
  using A = typename Dot<S>::A;
  using Element = typename Dot<S>::Element;
  // Of the step: which, of which group, with the states that come next.
  int64_t group, t, begin, entered;  // rows from begin on; those below entered have taken a step
  Element *next, *own_state;         // own_state: one more place for a batch of one row, or null
  // Of the tile.
  const A* product;
  const Element* panel;
  int64_t row, column;
  int vecs, v;
  int64_t left;

  // In how many pieces an epilogue takes them.
  RNNKERN_INLINE int64_t pieces() const { return left / kInStep + left % kInStep; }
};

template <class S, class Epilogue, int n>
RNNKERN_INLINE void finish_vectors(const ScanParams& p, const Epilogue& epilogue, Made<S>& made) {
  using D = Dot<S>;
  using A = typename D::A;
  constexpr int lanes = kLanes<A>;
  Place places[n];
  typename D::Element* to[n];
  Vec<A> taken[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    Place& place = places[i];
    const int64_t row = p.offset(made.t) + made.row;
    place = {.group = made.group, .row = made.row, .column = made.column + made.v * lanes};
    place.count = p.hidden - place.column;
    place.in = made.group * p.input_apart + row * p.input_stride;
    place.at = (row * p.groups + made.group) * p.hidden + place.column;
    place.entry =
        made.row < made.entered ? -1 : (made.group * p.batch + made.row) * p.hidden + place.column;
    to[i] = made.next + (made.row - made.begin) * row_stride<D>(p.hidden);
    taken[i] = load_vec<Vec<A>>(made.product + i * lanes);
    if constexpr (D::kSums > 0) {
      const Vec<A> scale = load_part(p.scales[made.group] + place.column, place.count);
      const auto* added = made.panel + (elements<D>(p.hidden) * made.vecs + made.v) * lanes;
      taken[i] = D::finish(taken[i], added, scale);
    }
    if (++made.v == made.vecs) {
      made.v = 0;
      ++made.row;
    }
  }
  mend<D>(taken, p.hidden, [&](int i, int64_t k) {
    const int64_t r = places[i].row;
    const S* from = previous<S>(p, made.group, r, r < made.entered, made.t);
    return broadcast(from ? load_one(from + k) : A(0)) *
           load_columns<S>(p.matrices[made.group], k, places[i].column);
  });
  epilogue.template run<n>(taken, places);
  made.product += n * lanes;
  made.left -= n;
  const auto store = [&](int i, typename D::Element* row) __attribute__((always_inline)) {
    if constexpr (D::kTiles && D::kDepth == 2 && n % 2 == 0) {
      if (made.vecs % 2 == 0) {
        if (i % 2 == 0) D::store_pair(row, places[i].column, taken[i], taken[i + 1]);
        return;
      }
    }
    D::store(row, places[i].column, taken[i]);
  };
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) store(i, to[i]);
  if (!made.own_state) return;
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) store(i, made.own_state);
}

// What differs from recurrence to recurrence: so many pieces of a tile.
template <class S, class Epilogue>
inline void finish(const ScanParams& p, Made<S>& made, int64_t pieces) {
  const Epilogue epilogue(p);
  for (; pieces > 0; --pieces) {
    if (made.left >= kInStep) {
      finish_vectors<S, Epilogue, kInStep>(p, epilogue, made);
    } else {
      finish_vectors<S, Epilogue, 1>(p, epilogue, made);
    }
  }
}
template <class S>
using Finish = void (*)(const ScanParams&, Made<S>&, int64_t);

// One body for all epilogues: of copies for each, compiling took twice as long.
template <class S>
__attribute__((noinline, noclone)) void scan_rows(const ScanParams& p, const Part& part,
                                                  Member* member, Finish<S> finish) {
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;
  constexpr int lanes = kLanes<A>;
  const int64_t hidden = p.hidden, begin = part.begin, end = part.end;
  const int64_t stride = row_stride<D>(hidden), depth = elements<D>(hidden);
  ProductsOf<D> products(false);
  Member::Columns mine = {0, (hidden + kPanel<A> - 1) / kPanel<A>};
  struct {
    Element *state, *next;
    int64_t entered;  // rows below have taken a step
  } runs[kMostGroups];
  for (int64_t i = 0; i < part.groups; ++i) {
    auto* state = reinterpret_cast<Element*>(static_cast<char*>(part.state) + i * part.state_bytes);
    runs[i] = {state, state + (end - begin) * stride, begin};
  }

  Made<S> made = {};
  const auto finish_some = [&](int64_t pieces) { finish(p, made, pieces); };
  ChoreOf chore(finish_some);
  alignas(64) A sums[D::kTiles ? 2 : 1][ProductsOf<D>::kMostRows * kPanel<A>];
  int filled = 0;  // of these, last

  const auto step = [&](int64_t k, int64_t group) __attribute__((always_inline)) {
    auto& [state, next, entered] = runs[group - part.group];
    const auto* panels = static_cast<const Element*>(p.panels[group]);
    const int64_t t = p.reverse[group] ? p.steps - 1 - k : k;
    const int64_t active = min_of(p.size(t), end);
    if (active <= begin) return true;
    if (member) mine = member->begin(k);
    if (mine.first == mine.last) return false;
    made = {group, t, begin, entered, next, nullptr};
    for (int64_t i = mine.first; i < mine.last; ++i) {
      // There and back again: what a step reads last, the next finds in cache, where not all fits.
      const int64_t column = (k % 2 ? mine.first + mine.last - 1 - i : i) * kPanel<A>;
      const int vecs = static_cast<int>(panel_width<A>(column, hidden) / lanes);
      const Element* panel = panels + column * panel_depth<D>(hidden);
      for_each_tile<ProductsOf<D>::kMostRows>(begin, active, [&](int64_t row, int64_t tile_end) {
        const int tile_rows = static_cast<int>(tile_end - row);
        if constexpr (D::kTiles) filled = !filled;
        A* const c = sums[filled];
        if (p.from_zero && row >= entered) {
          for (int i = 0; i < tile_rows * vecs; ++i) store_vec(c + i * lanes, Vec<A>{});
        } else {
          products(tile_rows, vecs, depth, 0, depth, state + (row - begin) * stride, stride, panel,
                   {c, vecs * lanes}, rows_to_fetch<S>(p, p.offset(t) + row, group, column, vecs),
                   &chore);
        }
        // Of tiles, while the next is multiplied.
        chore.rest();
        made.product = c;
        made.panel = panel;
        made.row = row;
        made.column = column;
        made.vecs = vecs;
        made.v = 0;
        made.left = tile_rows * vecs;
        if constexpr (D::kTiles) {
          chore.left = made.pieces();
        } else {
          finish_some(made.pieces());
        }
      });
    }
    chore.rest();
    if (member) member->end(k);
    entered = entered < active ? active : entered;
    std::swap(state, next);
    return true;
  };
  for (int64_t k = 0; k < p.steps; ++k) {
    for (int64_t i = 0; i < part.groups; ++i) {
      if (!step(k, part.group + i)) return;  // others go on
    }
  }
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
