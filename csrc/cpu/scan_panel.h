// The scan through a matrix of one panel, whose product stays in registers.
#pragma once
#include <type_traits>

#include "epilogues.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// A tile is R rows of one group or, of a batch of one row (alone), of as many groups, whose chains
// of operations then run side by side.
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
          c, NoTurn());
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

}  // namespace rnnkern::cpu::RNNKERN_ISA
