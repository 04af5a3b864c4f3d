// H up to 192 in float32, of few rows: one block runs a tile of up to four, and multiplies by what
// is not a tensor core. Those want 8 rows at least, and three products for float32's accuracy; one
// row a multiprocessor is what a batch of up to a hundred rows comes to.
//
// Mapping. A thread has kOwn units and, of every kSplits chunks of 4 of the depth, one:
// neighbouring threads the others. So a vector from shared memory serves 4 kOwn products of each
// row. The sums then go to and fro between the kSplits threads (fold), until each has whole ones,
// of units and rows of its own, and finishes those.
//
// On chip. W in registers, 96 of a thread's at most. Two states in shared memory, read and written
// in turns.
//
// Traffic. The input (and aux) of a step is copied to shared memory kAhead - 1 steps before by the
// threads that will need it, or x of few features by one warp (features.cuh). The output is written
// once, 4 bytes of a thread.
//
// Synchronisation. One block_sync in a step, or of one warp a warp_sync: what is read in a step is
// overwritten in the next at the earliest.
//
// Numerics. All in float32; sums in parts of the depth, as many as kSplits.
//
// Requirements: compute capability 8.0.
#pragma once
#include "epilogue.cuh"
#include "features.cuh"
#include "kernel.h"
#include "steps.cuh"
#include "words.cuh"

namespace rnnkern::cuda {

template <class Element, int hidden, class Epilogue>
struct FmaScan {
  static constexpr Regime kRegime = Regime::kFma;
  static constexpr int kCapability = 80;
  static constexpr bool kHopper = false;

 private:
  // One warp up to 32 units.
  static constexpr int kOwn = hidden == 16 ? 2 : 4, kSplits = hidden <= 32 ? 4 : 8;

 public:
  static constexpr int kHidden = hidden, kRows = 4, kUnits = hidden;
  static constexpr int kThreads = hidden / kOwn * kSplits;

  static RNNKERN_DEV void run(const Scan& p) {
    if (p.table) {
      p.tile_rows == 1   ? run_tile<1, true>(p)
      : p.tile_rows == 2 ? run_tile<2, true>(p)
                         : run_tile<4, true>(p);
    } else {
      p.tile_rows == 1   ? run_tile<1, false>(p)
      : p.tile_rows == 2 ? run_tile<2, false>(p)
                         : run_tile<4, false>(p);
    }
  }

 private:
  static constexpr int kChunks = hidden / (4 * kSplits);  // of 16 bytes, of a thread's part
  static constexpr int kRow = hidden * 4 + 64;            // two rows' units are written at once
  static constexpr int kState = kRows * kRow;
  static constexpr int kStreams = Epilogue::kAux ? 2 : 1;
  static constexpr int kAhead = 8;
  using X = Features<Element, kAhead>;
  static constexpr int kStream = kRows * hidden * 4;
  static constexpr int kSlot = Epilogue::kFeatures ? X::k8Rows : kStreams * kStream;
  static constexpr int kRing = kAhead * kSlot;
  static constexpr int kNone = 0x7fffffff;  // a row that no step has
  static_assert(Element::kBytes == 4 && hidden % (4 * kSplits) == 0, "whole chunks of floats");

 public:
  static constexpr int kShared = 2 * kState + kRing;

 private:
  template <int rows, bool packed>
  static RNNKERN_DEV void run_tile(const Scan& p) {
    // Of the sums of rows times kOwn units a thread ends with kEach, which are neighbouring units;
    // with the same as its neighbours, where there are fewer sums than threads.
    constexpr int kSums = rows * kOwn, kEach = kSums > kSplits ? kSums / kSplits : 1;
    constexpr int kSame = kSums < kSplits ? kSplits / kSums : 1;
    const int split = thread() % kSplits, units = thread() / kSplits * kOwn, group = block_y();
    const int first_row = block_x() * p.tile_rows;
    const Epilogue epilogue(p.activation);

    // This thread's part of W.
    const uint32_t states = shared_base(), ring = states + 2 * kState;
    float weight[kChunks][kOwn][4];
    RNNKERN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      RNNKERN_UNROLL
      for (int u = 0; u < kOwn; ++u) {
        const Words4 w = weight_words(p, group, units + u, (c * kSplits + split) * 4);
        weight[c][u][0] = number(w.x);
        weight[c][u][1] = number(w.y);
        weight[c][u][2] = number(w.z);
        weight[c][u][3] = number(w.w);
      }
    }

    // What this thread finishes: kEach units from `unit` on, of one row.
    const int first = split / kSame * kEach, unit = units + first % kOwn, n = first / kOwn;
    const bool is_first = split % kSame == 0;  // of those that have the same
    const int row = is_first && n < p.tile_rows ? first_row + n : kNone;
    bool is_unit[kEach];
    RNNKERN_UNROLL
    for (int i = 0; i < kEach; ++i) is_unit[i] = unit + i < p.hidden;
    const int64_t row_bytes = p.row_stride * 4;
    const int64_t at_rows =
        (first_row + n) * row_bytes + (static_cast<int64_t>(group) * p.hidden + unit) * 4;
    const int64_t at_state =
        ((static_cast<int64_t>(group) * p.batch + first_row + n) * p.hidden + unit) * 4;

    float weight_ih[kEach][4], bias[kEach] = {};
    if constexpr (Epilogue::kFeatures) {
      RNNKERN_UNROLL
      for (int i = 0; i < kEach; ++i) {
        RNNKERN_UNROLL
        for (int k = 0; k < 4; ++k) weight_ih[i][k] = weight_of_feature(p, group, unit + i, k);
        bias[i] = X::load_bias(p, group, unit + i);
      }
    }

    float state[kEach];  // what is no unit stays zero
    RNNKERN_UNROLL
    for (int i = 0; i < kEach; ++i) {
      state[i] = 0.0f;
      if (p.initial && row < p.batch && is_unit[i]) {
        state[i] = load_element<Element>(static_cast<const char*>(p.initial) + at_state + 4 * i);
      }
    }
    const uint32_t own_state = n * kRow + unit * 4;
    const auto put = [&](uint32_t to) {
      if (!is_first) return;
      RNNKERN_UNROLL
      for (int i = 0; i < kEach; ++i) store_shared(to + own_state + 4 * i, bits(state[i]));
    };
    put(states);

    X x(p);
    const int x_row[] = {thread() < 32 && thread() / 4 < p.tile_rows ? first_row + thread() / 4
                                                                     : kNone};
    auto ahead = Epilogue::kFeatures ? x.template steps<packed>(p, group, first_row)
                                     : Steps<packed>(p, group, row_bytes, at_rows);
    Steps<packed> now(p, group, row_bytes, at_rows);
    const uint32_t own_ring = ring + thread() * 4;
    uint32_t used = 0, free = kRing - kSlot;  // slots of the ring, in bytes
    const auto ask = [&](uint32_t slot, bool is_step) {
      if constexpr (Epilogue::kFeatures) {
        x.ask(ring + slot, ahead, is_step, x_row);
      } else if (is_step && row < ahead.size) {
        RNNKERN_UNROLL
        for (int i = 0; i < kEach; ++i) {
          if (!is_unit[i]) continue;
          const uint32_t to = own_ring + slot + i * kThreads * 4;
          const int64_t at = ahead.offset + 4 * i;
          if (p.input) copy_async<4>(to, static_cast<const char*>(p.input) + at);
          if (kStreams == 2) copy_async<4>(to + kStream, static_cast<const char*>(p.aux) + at);
        }
      }
      copies_commit();
      ahead.next();
    };
    for (int i = 0; i < kAhead - 1; ++i) ask(i * kSlot, i < p.steps);
    copies_wait<kAhead - 2>();
    sync();

    uint32_t from = states, to = states + kState;
    int entered = 0;  // rows below have taken a step
    for (int64_t left = p.steps; left > 0; --left) {
      float in[kEach] = {}, aux[kEach] = {}, entry[kEach] = {}, next[kEach];
      if constexpr (Epilogue::kFeatures) {
        const Words4 v = load_shared4(ring + used + 16 * n);
        RNNKERN_UNROLL
        for (int i = 0; i < kEach; ++i) {
          const float (&w)[4] = weight_ih[i];
          in[i] = bias[i] + w[0] * number(v.x) + w[1] * number(v.y) + w[2] * number(v.z) +
                  w[3] * number(v.w);
        }
      } else {
        RNNKERN_UNROLL
        for (int i = 0; i < kEach; ++i) {
          const uint32_t at = own_ring + used + i * kThreads * 4;
          if (p.input) in[i] = number(load_shared(at));
          if (kStreams == 2) aux[i] = number(load_shared(at + kStream));
        }
      }

      float sums[kSums] = {};
      RNNKERN_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        RNNKERN_UNROLL
        for (int r = 0; r < rows; ++r) {
          const Words4 h = load_shared4(from + r * kRow + (c * kSplits + split) * 16);
          RNNKERN_UNROLL
          for (int u = 0; u < kOwn; ++u) {
            float& sum = sums[r * kOwn + u];
            sum += weight[c][u][0] * number(h.x);
            sum += weight[c][u][1] * number(h.y);
            sum += weight[c][u][2] * number(h.z);
            sum += weight[c][u][3] * number(h.w);
          }
        }
      }
      ask(free, left >= kAhead);
      free = used;
      used = used + kSlot == kRing ? 0 : used + kSlot;
      fold<kSums, kSplits / 2>(split, sums);

      if (Epilogue::kEntry && p.entry && now.size > entered) {
        RNNKERN_UNROLL
        for (int i = 0; i < kEach; ++i) {
          if (row >= entered && row < now.size && is_unit[i]) {
            entry[i] = load_element<Element>(static_cast<const char*>(p.entry) + at_state + 4 * i);
          }
        }
      }
      RNNKERN_UNROLL
      for (int i = 0; i < kEach; ++i) next[i] = Epilogue::kFeatures ? sums[i] + in[i] : sums[i];
      epilogue(next, in, aux, entry);
      RNNKERN_UNROLL
      for (int i = 0; i < kEach; ++i) {
        // f(0) may not be 0, and 0 * inf is not: what is no unit stays out of the next product.
        // What is no row at all may become anything.
        const bool here = row < now.size;
        state[i] = is_unit[i] && (!packed || here) ? next[i] : state[i];
        if (is_unit[i] && here) {
          store_global(static_cast<char*>(p.output) + now.offset + 4 * i, bits(state[i]));
        }
      }
      put(to);
      if (Epilogue::kEntry) entered = now.size > entered ? now.size : entered;
      now.next();
      copies_wait<kAhead - 2>();
      sync();
      const uint32_t other = from;
      from = to;
      to = other;
    }
    copies_wait<0>();
    RNNKERN_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (p.last && row < p.batch && is_unit[i]) {
        store_global(static_cast<char*>(p.last) + at_state + 4 * i, bits(state[i]));
      }
    }
  }

  static RNNKERN_DEV void sync() {
    if constexpr (kThreads == 32) {
      warp_sync();
    } else {
      block_sync();
    }
  }

  // Adds up kSplits threads' sums: of pairs of threads `apart`, each keeps one half of what it has
  // and gives the other away, and so on with the half; a single one both keep.
  template <int count, int apart>
  static RNNKERN_DEV void fold(int split, float* sums) {
    if constexpr (apart > 0) {
      const bool is_upper = split & apart;
      constexpr int kHalf = count > 1 ? count / 2 : 1;
      RNNKERN_UNROLL
      for (int i = 0; i < kHalf; ++i) {
        const float lower = sums[i], upper = count > 1 ? sums[kHalf + i] : lower;
        const float given = is_upper ? lower : upper, kept = is_upper ? upper : lower;
        sums[i] = kept + number(shuffle(bits(given), (thread() ^ apart) & 31));
      }
      fold<kHalf, apart / 2>(split, sums);
    }
  }

  static RNNKERN_DEV float weight_of_feature(const Scan& p, int group, int n, int k) {
    if (n >= p.hidden || k >= p.features) return 0.0f;
    return load_element<Element>(address_of<Element>(p.weight_ih, group, n, k));
  }

  // W's (n, k) to (n, k + 3); zeros outside of the matrix. H is a multiple of 4.
  static RNNKERN_DEV Words4 weight_words(const Scan& p, int group, int n, int k) {
    if (n >= p.hidden || k >= p.hidden) return {0, 0, 0, 0};
    if (p.weight.stride_k == 1) return load_global4(address_of<Element>(p.weight, group, n, k));
    return {weight_word<Element>(p, group, n, k), weight_word<Element>(p, group, n, k + 1),
            weight_word<Element>(p, group, n, k + 2), weight_word<Element>(p, group, n, k + 3)};
  }
};

}  // namespace rnnkern::cuda
