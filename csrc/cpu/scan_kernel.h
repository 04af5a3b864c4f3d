// The scan on one instruction set: a state vector per row, multiplied each step by a stationary
// matrix, then an elementwise epilogue that makes the next state and the output. Forward, backward
// and linear differ only in the epilogue (and in which way round the matrix was packed, and the
// direction).
//
// Panels are the outer loop of a step, so a panel is read from cache once per step for all rows.
//
// The state is kept in the accumulation type, rounded to the storage type once per step.
#pragma once
#include <type_traits>
#include <utility>

#include "matmul.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// ---- the epilogues ----
// Each takes n vectors of the product and where they belong, stores the output there, and leaves
// the next state in their place.

// A large product of one row is the sum of two halves of its k's, so that each of two members can
// begin with the half that it has. Steps on two threads, without and with: float32 of H 256 1.52 us
// and 1.34, of H 512 4.6 and 4.3; bfloat16 1.58 and 1.0, 3.8 and 3.15. Not of a matrix that the
// members' caches do not hold, of which a step then finds less of the one before: 28 us and 35 for
// H 1024, 277 and 334 for H 2048. A member has its own half of the state twice: to read what the
// other has just read takes as long as to fetch it, some 600 of 5000 cycles of its half at H 512.
constexpr int64_t kHalvedDepth = 256, kMostEarly = 5 << 19, kEarlyColumns = 2048;
constexpr int kInStep = 4;  // vectors that an epilogue takes at most

struct Place {
  int64_t group;
  int64_t row;     // of the batch
  int64_t column;  // of the group's H
  int64_t count;   // of the vector's lanes that lie within H
  int64_t in;      // where the group's input of the row begins
  int64_t at;      // the element of the (N, G*H) rows
  int64_t entry;   // the element of (G, B, H) if the row enters the scan in this step, else -1
};

// f of n vectors. Tanh's are computed in step.
template <class F, int n, class V>
RNNKERN_INLINE void activate(V* a) {
  using Math = VecMath<std::decay_t<decltype(V{}[0])>>;
  if constexpr (std::is_same_v<F, Tanh<Math>>) {
    Math::template tanh<n>(a);
  } else {
    for (int i = 0; i < n; ++i) a[i] = F::f(a[i]);
  }
}

template <class S, class F>
struct ForwardEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S* x_proj;
  S* h;
  explicit ForwardEpilogue(const ScanParams& p)
      : x_proj(static_cast<const S*>(p.input)), h(static_cast<S*>(p.output)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] += load_part(x_proj + p[i].in + p[i].column, p[i].count);
    }
    activate<F, n>(c);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] = rounded<S>(c[i]);
      store_part(h + p[i].at, c[i], p[i].count);
    }
  }
};

// Forward from x itself, for few features: x_proj is made where it is used.
template <class S, class F>
struct LayerEpilogue {
  using A = typename Storage<S>::Acc;
  using V = Vec<A>;
  const S* x;
  const A* weight;  // G (I + 1, padded H), the last row of each the bias
  S* h;
  int64_t features, stride;
  explicit LayerEpilogue(const ScanParams& p)
      : x(static_cast<const S*>(p.input)),
        weight(static_cast<const A*>(p.input_panels)),
        h(static_cast<S*>(p.output)),
        features(p.features),
        stride(padded<A>(p.hidden)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
    // Added up without c, which the processor still waits for.
    const A* w[n];
    V sums[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      w[i] = weight + p[i].group * (features + 1) * stride + p[i].column;
      sums[i] = load_vec<V>(w[i] + features * stride);
    }
    for (int64_t k = 0; k < features; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        const A feature = load_one(x + p[i].in + k);
        sums[i] += broadcast(feature) * load_vec<V>(w[i] + k * stride);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) c[i] += sums[i];
    activate<F, n>(c);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] = rounded<S>(c[i]);
      store_part(h + p[i].at, c[i], p[i].count);
    }
  }
};

template <class S, class F>
struct BackwardEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S *grad_h, *grad_h_n, *h;
  S* v;
  explicit BackwardEpilogue(const ScanParams& p)
      : grad_h(static_cast<const S*>(p.input)),
        grad_h_n(static_cast<const S*>(p.entry)),
        h(static_cast<const S*>(p.aux)),
        v(static_cast<S*>(p.output)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      if (grad_h) c[i] += load_part(grad_h + p[i].at, p[i].count);
      if (grad_h_n && p[i].entry >= 0) c[i] += load_part(grad_h_n + p[i].entry, p[i].count);
      c[i] = rounded<S>(F::df(load_part(h + p[i].at, p[i].count)) * c[i]);
      store_part(v + p[i].at, c[i], p[i].count);
    }
  }
};

template <class S>
struct LinearEpilogue {
  using V = Vec<typename Storage<S>::Acc>;
  const S *u, *gain;
  S* s;
  explicit LinearEpilogue(const ScanParams& p)
      : u(static_cast<const S*>(p.input)),
        gain(static_cast<const S*>(p.aux)),
        s(static_cast<S*>(p.output)) {}
  template <int n>
  RNNKERN_INLINE void run(V* c, const Place* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      c[i] = rounded<S>(load_part(u + p[i].at, p[i].count) +
                        load_part(gain + p[i].at, p[i].count) * c[i]);
      store_part(s + p[i].at, c[i], p[i].count);
    }
  }
};

// ---- the skeleton ----

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

// What an epilogue will touch, asked for before the products: the processor does not foresee it.
template <class S>
RNNKERN_INLINE void fetch_rows(const ScanParams& p, int64_t first, int64_t rows, int64_t group,
                               int64_t column, int vecs) {
  constexpr int64_t line = 64, size = sizeof(S);
  const int64_t lanes = kLanes<typename Storage<S>::Acc>;
  const int64_t bytes = min_of(vecs * lanes, p.hidden - column) * size;
  const int64_t stride = p.groups * p.hidden * size, at = (group * p.hidden + column) * size;
  const int64_t input_at = (group * p.input_apart + column) * size;
  const bool has_input = p.input && p.recurrence != Recurrence::kLayer;
  for (int64_t row = first; row < first + rows; ++row) {
    for (int64_t i = 0; i < bytes; i += line) {
      const auto in = [&](const void* all, int64_t at) {
        return static_cast<const char*>(all) + at + i;
      };
      if (has_input) __builtin_prefetch(in(p.input, input_at + row * p.input_stride * size));
      if (p.aux) __builtin_prefetch(in(p.aux, at + row * stride));
      if (p.output != p.input) __builtin_prefetch(in(p.output, at + row * stride), 1);
    }
  }
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
void finish(const ScanParams& p, Made<S>& made, int64_t pieces) {
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
  ProductsOf<D> products(p.batch == 1);
  Member::Columns mine = {0, (hidden + kPanel<A> - 1) / kPanel<A>};
  const bool halves = p.batch == 1 && hidden >= kHalvedDepth;
  const bool may_be_early = halves && member &&
                            depth * hidden * int64_t(sizeof(Element)) <= kMostEarly &&
                            mine.last * kPanel<A> <= kEarlyColumns;
  const int64_t half = mine.last / 2 * kPanel<A> / D::kDepth;  // in elements
  alignas(64) A early_sums[kEarlyColumns];
  alignas(64) Element own_state[kEarlyColumns];
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
    if (halves) {
      const int64_t vecs = (mine.last - mine.first) * kPanelVecs;
      fetch_rows<S>(p, p.offset(t), 1, group, mine.first * kPanel<A>, static_cast<int>(vecs));
    }
    // What a member can make of its own half of the state, while the other half is on its way.
    const Member::Columns own = may_be_early ? member->own_half() : Member::Columns{0, 0};
    const bool early = own.first < own.last, lower = own.first == 0;
    const int64_t own_begin = lower ? 0 : half, own_end = lower ? half : depth;
    for (int64_t i = own_begin; early && k == 0 && i < own_end; ++i) own_state[i] = state[i];
    for (int64_t i = own.first; i < own.last; ++i) {
      const int64_t column = i * kPanel<A>;
      const int vecs = static_cast<int>(panel_width<A>(column, hidden) / lanes);
      products(1, vecs, depth, own_begin, own_end, own_state, stride,
               panels + column * panel_depth<D>(hidden), early_sums + column);
    }
    if (member) mine = member->begin(k);
    if (mine.first == mine.last) return false;
    // The other's half, all of it at once: the processor would see but a few lines ahead.
    const int64_t other_end = lower ? depth : half, line = 64 / int64_t{sizeof(Element)};
    for (int64_t i = lower ? half : 0; early && i < other_end; i += line) {
      __builtin_prefetch(state + i);
    }

    // Of all panels, where begin() gives more than own_half() said.
    made = {group, t, begin, entered, next, early ? own_state : nullptr};
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
          if (!halves) fetch_rows<S>(p, p.offset(t) + row, tile_rows, group, column, vecs);
          const Element* from = state + (row - begin) * stride;
          if (!halves) {
            products(tile_rows, vecs, depth, 0, depth, from, stride, panel, c, &chore);
          } else {
            alignas(64) A half_sums[2][kPanel<A>];
            const A* parts[] = {half_sums[0], half_sums[1]};
            const bool made_early =
                own.first * kPanel<A> <= column && column < own.last * kPanel<A>;
            for (int i = 0; i < 2; ++i) {
              if (made_early && lower == (i == 0)) {
                parts[i] = early_sums + column;
              } else {
                products(1, vecs, depth, i ? half : 0, i ? depth : half, from, stride, panel,
                         half_sums[i]);
              }
            }
            for (int64_t j = 0; j < vecs * lanes; j += lanes) {
              store_vec(c + j,
                        D::sum(load_vec<Vec<A>>(parts[0] + j), load_vec<Vec<A>>(parts[1] + j)));
            }
          }
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

// ---- small matrices ----

// A matrix of one panel, whose product stays in registers. A tile is R rows of one group or, of a
// batch of one row (alone), of as many groups, whose chains of operations then run side by side.
template <class S, class Epilogue, int V, bool alone>
void scan_panel(const ScanParams& p, const Part& part) {
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;
  constexpr int lanes = kLanes<A>, sets = kSets<V, alone>;
  constexpr int most = alone ? (kPanelVecs == 4 ? 16 : 8) / (sets * V) : 4;
  const int64_t stride = row_stride<D>(p.hidden), depth = elements<D>(p.hidden);
  const int64_t row_size = p.groups * p.hidden;
  const Epilogue epilogue(p);
  // Nothing here is added to in each step: what is stored in parts and loaded as a vector, the
  // processor waits for.
  struct Run {
    const Element* panel;
    Element* states;           // of the part's first row, read in even steps, and in odd ones
    int64_t group, in, at;     // of the batch's first row in the first step; as in Place
    int64_t in_step, at_step;  // from step to step
    int64_t entered;           // rows below have taken a step
  } runs[kMostGroups];
  const int64_t odd = (part.end - part.begin) * stride;
  const auto place_run = [&](Run& run, int64_t row) __attribute__((always_inline)) {
    run.in = run.group * p.input_apart + row * p.input_stride;
    run.at = row * row_size + run.group * p.hidden;
  };
  for (int64_t i = 0; i < part.groups; ++i) {
    const int64_t g = part.group + i;
    runs[i] = {
        .panel = static_cast<const Element*>(p.panels[g]),
        .states = reinterpret_cast<Element*>(static_cast<char*>(part.state) + i * part.state_bytes),
        .group = g,
        .entered = part.begin};
    if (p.offsets && !alone) continue;  // placed in each step
    const int64_t rows = p.reverse[g] ? -p.batch : p.batch;
    place_run(runs[i], p.reverse[g] ? (p.steps - 1) * p.batch : 0);
    runs[i].in_step = rows * p.input_stride;
    runs[i].at_step = rows * row_size;
  }
  const auto tile = [&](auto rows, const Run* run, int64_t first,
                        int64_t k) __attribute__((always_inline)) {
    constexpr int R = decltype(rows)::value;
    Vec<A> c[R][V] = {};
    Place places[R * V];
    const Element *states[R], *panels[R];
    Element* next[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Run& of = run[alone ? r : 0];
      const int64_t row = alone ? 0 : first + r;
      panels[r] = of.panel;
      Element* const state = of.states + (alone ? 0 : first - part.begin + r) * stride;
      states[r] = state + (k % 2 ? odd : 0);
      next[r] = state + (k % 2 ? 0 : odd);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        Place& place = places[r * V + v];
        place = {.group = of.group, .row = row, .column = v * lanes};
        place.count = p.hidden - place.column;
        place.in = of.in + k * of.in_step + row * p.input_stride;
        place.at = of.at + k * of.at_step + row * row_size + place.column;
        place.entry = row < of.entered ? -1 : (of.group * p.batch + row) * p.hidden + place.column;
      }
    }
    if (!p.from_zero || first < run->entered) {
      multiply<D, R, V, sets, !alone>(
          depth, [&](int r, int64_t k) __attribute__((always_inline)) { return states[r][k]; },
          [&](int r, int64_t k)
              __attribute__((always_inline)) { return panels[r] + k * V * lanes; },
          c);
    }
    constexpr int all = R * V, whole = all / kInStep * kInStep;
#pragma GCC unroll 8
    for (int i = 0; i < whole; i += kInStep) {
      epilogue.template run<kInStep>(&c[0][0] + i, places + i);
    }
    if constexpr (all > whole) epilogue.template run<all - whole>(&c[0][0] + whole, places + whole);
#pragma GCC unroll 8
    for (int i = 0; i < all; ++i) D::store(next[i / V], i % V * lanes, c[i / V][i % V]);
  };
  const auto tiles = [&](int64_t begin, int64_t end, auto visit) __attribute__((always_inline)) {
    if constexpr (most >= 4) {
      for (; begin + 4 <= end; begin += 4) visit(std::integral_constant<int, 4>{}, begin);
    }
    if constexpr (most >= 2) {
      for (; begin + 2 <= end; begin += 2) visit(std::integral_constant<int, 2>{}, begin);
    }
    for (; begin < end; ++begin) visit(std::integral_constant<int, 1>{}, begin);
  };
  for (int64_t k = 0; k < p.steps; ++k) {
    if constexpr (alone) {
      if (k == 1) {
        for (int64_t i = 0; i < part.groups; ++i) runs[i].entered = 1;
      }
      tiles(0, part.groups, [&](auto groups, int64_t i) __attribute__((always_inline)) {
        tile(groups, runs + i, 0, k);
      });
      continue;
    }
    for (int64_t i = 0; i < part.groups; ++i) {
      Run& run = runs[i];
      const int64_t t = p.reverse[run.group] ? p.steps - 1 - k : k;
      const int64_t active = min_of(p.size(t), part.end);
      if (p.offsets) place_run(run, p.offsets[t]);
      tiles(part.begin, active, [&](auto rows, int64_t first) __attribute__((always_inline)) {
        tile(rows, &run, first, k);
      });
      run.entered = run.entered < active ? active : run.entered;
    }
  }
}

template <class S, class Epilogue, int V = 1>
void scan_small(const ScanParams& p, const Part& part) {
  if constexpr (V < kPanelVecs) {
    if (p.hidden > V * kLanes<typename Dot<S>::A>) return scan_small<S, Epilogue, V + 1>(p, part);
  }
  if (p.batch == 1) return scan_panel<S, Epilogue, V, true>(p, part);
  scan_panel<S, Epilogue, V, false>(p, part);
}

// small: whether there is code for small matrices. All types and activations would double the
// library.
template <bool small, class S, class Epilogue>
void scan_any(const ScanParams& p, const Part& part, Member* member) {
  if constexpr (small) {
    if (!member && p.hidden <= kPanel<S>) return scan_small<S, Epilogue>(p, part);
  }
  scan_rows<S>(p, part, member, finish<S, Epilogue>);
}

// ---- options become types ----

template <class S>
void scan_storage(const ScanParams& p, const Part& part, Member* member) {
  using Math = VecMath<typename Storage<S>::Acc>;
  constexpr bool single = std::is_same_v<S, float>;
  if (p.recurrence == Recurrence::kLinear) {
    return scan_any<single, S, LinearEpilogue<S>>(p, part, member);
  }
  with_activation<Math>(p.activation, [&](auto functor) {
    using F = decltype(functor);
    constexpr bool small =
        single && (std::is_same_v<F, Tanh<Math>> || std::is_same_v<F, Relu<Math>>);
    if (p.recurrence == Recurrence::kForward || std::is_same_v<S, Quantized>) {
      scan_any<small, S, ForwardEpilogue<S, F>>(p, part, member);
    } else if constexpr (std::is_same_v<S, Quantized>) {
    } else if (p.recurrence == Recurrence::kLayer) {
      scan_any<small, S, LayerEpilogue<S, F>>(p, part, member);
    } else {
      scan_any<small, S, BackwardEpilogue<S, F>>(p, part, member);
    }
  });
}

// visit(S{}) with the storage type that dtype names.
template <class Visit>
RNNKERN_INLINE auto with_storage(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kDouble:
      return visit(double{});
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kHalf:
      return visit(Half{});
    case DType::kInt8:
      return visit(Quantized{});
#ifdef __AMX_BF16__
    case DType::kSplit:
      return visit(Split{});
#endif
    default:
      break;
  }
  return visit(float{});
}

static int64_t panel_columns(DType dtype) {
  return with_storage(
      dtype, [&](auto s) -> int64_t { return kPanel<typename Storage<decltype(s)>::Acc>; });
}

static int64_t packed_bytes(DType dtype, int64_t depth, int64_t width) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using D = Dot<decltype(s)>;
    const auto size = static_cast<int64_t>(sizeof(typename D::Element));
    return panel_depth<D>(depth) * padded<typename D::A>(width) * size;
  });
}

static int64_t row_bytes(DType dtype, int64_t width) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using D = Dot<decltype(s)>;
    return row_stride<D>(width) * static_cast<int64_t>(sizeof(typename D::Element));
  });
}

static int64_t input_bytes(DType dtype, int64_t hidden, int64_t features) {
  return with_storage(dtype, [&](auto s) -> int64_t {
    using A = typename Storage<decltype(s)>::Acc;
    return (features + 1) * padded<A>(hidden) * static_cast<int64_t>(sizeof(A));
  });
}

#ifdef __AMX_BF16__
constexpr bool kSplits = true;
#else
constexpr bool kSplits = false;
#endif

// Whether there are large products of bfloat16, which are multiplied as float32. Where pairs of
// them are multiplied, torch does that too.
constexpr bool kWidens = Dot<BFloat16>::kDepth == 1;

static bool has_products(DType dtype) {
  return dtype != DType::kInt8 && (dtype != DType::kBFloat16 || kWidens) &&
         (dtype != DType::kSplit || kSplits);
}

// visit(S{}) with the storage type of a large product.
template <class Visit>
RNNKERN_INLINE auto with_product(DType dtype, Visit visit) {
#ifdef __AMX_BF16__
  if (dtype == DType::kSplit) return visit(Split{});
#endif
  if (dtype == DType::kDouble) return visit(double{});
  if (dtype == DType::kHalf) return visit(Half{});
  if constexpr (kWidens) {
    if (dtype == DType::kBFloat16) return visit(BFloat16{});
  }
  return visit(float{});
}

static int64_t outer_tiles(DType dtype, int64_t m) {
  return with_product(dtype, [&](auto s) -> int64_t {
    constexpr int64_t rows = kOuterTile<Dot<decltype(s)>>;
    return (m + rows - 1) / rows;
  });
}

static int64_t outer_bytes(DType dtype, int64_t n, int64_t m, int64_t width) {
  return with_product(dtype, [&](auto s) -> int64_t {
    using D = Dot<decltype(s)>;
    const int64_t deep = min_of(n, kOuterDepth<D>);
    const int64_t rows = min_of(outer_tiles(dtype, m) * kOuterTile<D>, kOuterRows);
    const int64_t columns = min_of(padded<typename D::A>(width), kOuterWidth<D>);
    return (D::kTiles ? 2 : 1) * (elements<D>(deep) * columns + row_stride<D>(deep) * rows) *
           static_cast<int64_t>(sizeof(typename D::Element));
  });
}

static void pack_matrix(DType dtype, const MatrixView& matrix, int64_t first, int64_t last,
                        void* dst) {
  with_storage(dtype, [&](auto s) { pack<decltype(s)>(matrix, first, last, dst); });
}

static void pack_input_weights(DType dtype, const InputWeights& w, void* dst) {
  with_storage(dtype, [&](auto s) { pack_input<decltype(s)>(w, dst); });
}

static void start(const ScanParams& params, const Part& part) {
  with_storage(params.dtype, [&](auto s) {
    for (int64_t i = 0; i < part.groups; ++i) {
      start_rows<decltype(s)>(params, part.group + i, part.begin, part.end,
                              static_cast<char*>(part.state) + i * part.state_bytes);
    }
  });
}

static void scan(const ScanParams& params, const Part& part, Member* member) {
  with_storage(params.dtype, [&](auto s) { scan_storage<decltype(s)>(params, part, member); });
}

static void matmul_rows(DType dtype, const MatmulParams& params, int64_t begin, int64_t end,
                        int64_t first, int64_t last, void* scratch) {
  with_product(dtype,
               [&](auto s) { matmul<decltype(s)>(params, begin, end, first, last, scratch); });
}

static void outer_sums(DType dtype, const OuterParams& params, int64_t first, int64_t last,
                       void* scratch) {
  with_product(dtype, [&](auto s) { outer<decltype(s)>(params, first, last, scratch); });
}

static void sum_columns(DType dtype, const void* v, int64_t n, int64_t v_stride, int64_t width,
                        int64_t first, int64_t last, void* out) {
  with_product(dtype, [&](auto s) {
    using S = std::conditional_t<std::is_same_v<decltype(s), Split>, float, decltype(s)>;
    column_sums(static_cast<const S*>(v), n, v_stride, width, first, last, static_cast<S*>(out));
  });
}

constexpr Kernels make_kernels(const char* name) {
  return {
      .name = name,
      .splits = kSplits,
      .has_products = has_products,
      .panel_columns = panel_columns,
      .packed_bytes = packed_bytes,
      .row_bytes = row_bytes,
      .input_bytes = input_bytes,
      .pack = pack_matrix,
      .pack_input = pack_input_weights,
      .start = start,
      .scan = scan,
      .matmul = matmul_rows,
      .outer_tiles = outer_tiles,
      .outer_bytes = outer_bytes,
      .outer = outer_sums,
      .column_sums = sum_columns,
  };
}

}  // namespace rnnkern::cpu::RNNKERN_ISA
