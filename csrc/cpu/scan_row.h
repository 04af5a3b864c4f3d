// The scan of a batch of one row through a matrix of more than one panel. Its steps are short: what
// one waits for counts as much as what it multiplies. Cycles of a step on one thread of a Zen 3 by
// scan_rows, and here: 660 and 300 for H 24, 560 and 380 for 32, 1190 and 900 for 64, 3360 and 2770
// for 128, 11100 and 9900 for 256.
#pragma once
#include <utility>

#include "scan_rows.h"

namespace rnnkern::cpu::RNNKERN_ISA {

// A large product of one row is the sum of two halves of its k's, so that each of two members can
// begin with the half that it has. Steps on two threads, without and with: float32 of H 256 1.52 us
// and 1.34, of H 512 4.6 and 4.3; bfloat16 1.58 and 1.0, 3.8 and 3.15. Not of a matrix that the
// members' caches do not hold, of which a step then finds less of the one before: 28 us and 35 for
// H 1024, 277 and 334 for H 2048. A member has its own half of the state twice: to read what the
// other has just read takes as long as to fetch it, some 600 of 5000 cycles of its half at H 512.
constexpr int64_t kHalvedDepth = 256, kMostEarly = 5 << 19, kEarlyColumns = 2048;

// finish(p, made, pieces) as in scan_rows.h: a Finish<S>, or its code itself, of what is used most.
template <class S, class F>
__attribute__((noinline, noclone)) void scan_row(const ScanParams& p, const Part& part,
                                                 Member* member, const F& finish) {
  using D = Dot<S>;
  using A = typename D::A;
  using Element = typename D::Element;
  constexpr int lanes = kLanes<A>;
  // Panels whose products an epilogue takes together; one, where column sums lie behind each.
  constexpr int64_t together = D::kSums || kPanelVecs >= kInStep ? 1 : kInStep / kPanelVecs;
  const int64_t hidden = p.hidden;
  const int64_t stride = row_stride<D>(hidden), depth = elements<D>(hidden);
  const int64_t panel_size = kPanel<A> * panel_depth<D>(hidden);
  ProductsOf<D> products(true);
  Member::Columns mine = {0, (hidden + kPanel<A> - 1) / kPanel<A>};
  const bool halves = hidden >= kHalvedDepth;
  const bool may_be_early = halves && member &&
                            depth * hidden * int64_t(sizeof(Element)) <= kMostEarly &&
                            mine.last * kPanel<A> <= kEarlyColumns;
  const int64_t half = mine.last / 2 * kPanel<A> / D::kDepth;  // in elements
  alignas(64) A early_sums[kEarlyColumns];
  alignas(64) Element own_state[kEarlyColumns];
  struct {
    Element *state, *next;
  } runs[kMostGroups];
  for (int64_t i = 0; i < part.groups; ++i) {
    auto* state = reinterpret_cast<Element*>(static_cast<char*>(part.state) + i * part.state_bytes);
    runs[i] = {state, state + stride};
  }
  const auto vectors = [&](int64_t column) __attribute__((always_inline)) {
    return static_cast<int>(panel_width<A>(column, hidden) / lanes);
  };

  const auto step = [&](int64_t k, int64_t group) __attribute__((always_inline)) {
    auto& [state, next] = runs[group - part.group];
    const auto* panels = static_cast<const Element*>(p.panels[group]);
    const int64_t t = p.reverse[group] ? p.steps - 1 - k : k;
    if (halves) {
      const int64_t vecs = (mine.last - mine.first) * kPanelVecs;
      rows_to_fetch<S>(p, t, group, mine.first * kPanel<A>, static_cast<int>(vecs))(0);
    }
    // What a member can make of its own half of the state, while the other half is on its way.
    const Member::Columns own = may_be_early ? member->own_half() : Member::Columns{0, 0};
    const bool early = own.first < own.last, lower = own.first == 0;
    const int64_t own_begin = lower ? 0 : half, own_end = lower ? half : depth;
    for (int64_t i = own_begin; early && k == 0 && i < own_end; ++i) own_state[i] = state[i];
    for (int64_t i = own.first; i < own.last; ++i) {
      const int64_t column = i * kPanel<A>;
      products(1, vectors(column), depth, own_begin, own_end, own_state, stride,
               panels + i * panel_size, {early_sums + column, kPanel<A>});
    }
    if (member) mine = member->begin(k);
    if (mine.first == mine.last) return false;
    // The other's half, all of it at once: the processor would see but a few lines ahead.
    const int64_t other_end = lower ? depth : half, line = 64 / int64_t{sizeof(Element)};
    for (int64_t i = lower ? half : 0; early && i < other_end; i += line) {
      __builtin_prefetch(state + i);
    }

    // Of panel i, which may be among those that begin() gave beyond what own_half() said.
    const auto multiply = [&](int64_t i, A* c) __attribute__((always_inline)) {
      const int vecs = vectors(i * kPanel<A>);
      const Element* panel = panels + i * panel_size;
      if (p.from_zero && k == 0) {
        for (int v = 0; v < vecs; ++v) store_vec(c + v * lanes, Vec<A>{});
      } else if (!halves) {
        products(1, vecs, depth, 0, depth, state, stride, panel, {c, kPanel<A>});
      } else {
        alignas(64) A half_sums[2][kPanel<A>];
        const A* parts[] = {half_sums[0], half_sums[1]};
        for (int h = 0; h < 2; ++h) {
          if (own.first <= i && i < own.last && lower == (h == 0)) {
            parts[h] = early_sums + i * kPanel<A>;
          } else {
            products(1, vecs, depth, h ? half : 0, h ? depth : half, state, stride, panel,
                     {half_sums[h], kPanel<A>});
          }
        }
        for (int64_t j = 0; j < vecs * lanes; j += lanes) {
          store_vec(c + j, D::sum(load_vec<Vec<A>>(parts[0] + j), load_vec<Vec<A>>(parts[1] + j)));
        }
      }
    };
    alignas(64) A sums[together * kPanel<A>];
    const int64_t first = mine.first / together, last = (mine.last + together - 1) / together;
    for (int64_t i = first; i < last; ++i) {
      // There and back again: what a step reads last, the next finds in cache, where not all fits.
      const int64_t at = (k % 2 ? first + last - 1 - i : i) * together;
      const int64_t from = at < mine.first ? mine.first : at;
      const int64_t to = min_of(at + together, mine.last);
      for (int64_t j = from; j < to; ++j) multiply(j, sums + (j - from) * kPanel<A>);
      const int64_t width = min_of(to * kPanel<A>, padded<A>(hidden)) - from * kPanel<A>;
      Made<S> made = {group, t, 0, k > 0, next, early ? own_state : nullptr};
      made.product = sums;
      made.panel = panels + from * panel_size;
      made.column = from * kPanel<A>;
      made.left = made.vecs = static_cast<int>(width / lanes);
      finish(p, made, made.pieces());
    }
    if (member) member->end(k);
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
