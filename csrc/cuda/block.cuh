// H from 64 up to 256 in 16-bit types, 128 in float32: one block runs a tile of rows, and a state
// travels through its shared memory.
//
// Mapping. Units are a product's M, rows its N: tiles of 8 rows, hidden / 16 warps with 16 units
// each. A warp multiplies its units' weights by the whole state. Lane 4 g + q has the sums of units
// g and g + 8 of the warp's, for rows 2 q and 2 q + 1, and finishes them: a step is products, an
// epilogue, and the state's way to the other warps.
//
// On chip. W in registers, as the products' first factor, 64 of them at most. Two states in shared
// memory, read and written in turns; their rows are padded by 16 bytes, so that no bank is asked
// twice. Each lane keeps its own units' state in registers too, for the rows that take no part in a
// step.
//
// Traffic. The input (and aux) of a step is copied to shared memory kAhead - 1 steps before, a
// thread's 16 bytes each, or x of few features by one warp (features.cuh). Of 16-bit types the
// output is written in such pieces, from the state in shared memory while the next step's products
// run; a float32 state is there as its products want it, rounded or split, so it is written by the
// lanes that have it, 32 bytes of a row from a warp.
//
// Synchronisation. One block_sync in a step: what is read in a step, state or input, is overwritten
// in the next at the earliest.
//
// Numerics. Sums in float32, of even and of odd parts of the depth. The state is rounded once per
// step, to the storage type; Tf32's once more where it is multiplied, not where it is written.
//
// Requirements: compute capability 8.0; before 9.0 single stores stand for stmatrix.
#pragma once
#include <type_traits>

#include "epilogue.cuh"
#include "features.cuh"
#include "kernel.h"
#include "steps.cuh"
#include "words.cuh"

namespace rnnkern::cuda {

template <class Element, int hidden, class Epilogue>
struct BlockScan {
  static constexpr Regime kRegime = Regime::kBlock;
  static constexpr int kCapability = 80;
  static constexpr bool kHopper = false;
  static constexpr int kHidden = hidden, kRows = 8, kUnits = hidden, kThreads = 2 * hidden;

 private:
  static constexpr int kBytes = Element::kBytes;
  static constexpr int kDeep = hidden * kBytes / 32;  // products
  static constexpr int kRow = hidden * kBytes + 16;
  static constexpr int kTile = kRows * kRow;
  // A state is split for its products where it is made, once, instead of by each warp.
  static constexpr bool kSplit = std::is_same<Element, Tf32x3>::value;
  static constexpr int kState = kSplit ? 2 * kTile : kTile;
  static constexpr int kStreams = Epilogue::kAux ? 2 : 1;
  static constexpr int kAhead = 8;
  using X = Features<Element, kAhead>;
  static constexpr int kSlot = Epilogue::kFeatures ? X::k8Rows : kStreams * kTile;
  static constexpr int kRing = kAhead * kSlot;
  static constexpr int kPieces = hidden * kBytes / 16;  // of a row
  static constexpr int kNone = 0x7fffffff;              // a row that no step has
  static_assert(hidden % 32 == 0 && kDeep % 2 == 0, "load_matrices fetches two products");

 public:
  static constexpr int kShared = 2 * kState + kRing;

  static RNNKERN_DEV void run(const Scan& p) { p.table ? run_tile<true>(p) : run_tile<false>(p); }

 private:
  template <bool packed>
  static RNNKERN_DEV void run_tile(const Scan& p) {
    const int warp = thread() >> 5, lane = thread() & 31, g = lane >> 2, q = lane & 3;
    const int group = block_y(), first_row = block_x() * p.tile_rows;
    int unit = 16 * warp + g;
    const Epilogue epilogue(p.activation);

    uint32_t weight_ih[4];
    float bias[2] = {};
    if constexpr (Epilogue::kFeatures) {
      RNNKERN_UNROLL
      for (int i = 0; i < 2; ++i) {
        X::load_weight(p, group, unit + 8 * i, weight_ih[i], weight_ih[2 + i]);
        bias[i] = X::load_bias(p, group, unit + 8 * i);
      }
    }

    uint32_t weight[kDeep][4];
    RNNKERN_UNROLL
    for (int k = 0; k < kDeep; ++k) {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) {
        weight[k][i] = weight_word<Element>(p, group, unit + i % 2 * 8,
                                            (8 * k + q + i / 2 * 4) * (4 / kBytes));
      }
    }

    // Of element i of this lane: unit + i / 2 * 8 of row[i % 2].
    int row[2];
    RNNKERN_UNROLL
    for (int i = 0; i < 2; ++i) row[i] = 2 * q + i < p.tile_rows ? first_row + 2 * q + i : kNone;
    if (kBytes == 4) {  // H of 256 has no registers to spare
      hold(unit);
      hold(row[0]);
      hold(row[1]);
    }
    const bool is_unit[2] = {unit < p.hidden, unit + 8 < p.hidden};
    const int64_t row_bytes = p.row_stride * kBytes;
    const int64_t group_bytes = static_cast<int64_t>(group) * p.hidden * kBytes;
    const int64_t at_rows = (first_row + 2 * q) * row_bytes + group_bytes + unit * kBytes;
    const auto at_state = [&](int i) {
      const int64_t at = static_cast<int64_t>(group) * p.batch + row[i % 2];
      return (at * p.hidden + unit + i / 2 * 8) * kBytes;
    };

    // Of this thread's 16 bytes of a step.
    const int n = thread() / kPieces, piece = thread() % kPieces;
    const bool has_piece = n < p.tile_rows && n < kRows && piece * 16 < p.hidden * kBytes;
    const int piece_row = has_piece ? first_row + n : kNone;
    const int64_t at_piece = (first_row + n) * row_bytes + group_bytes + piece * 16;

    const uint32_t states = shared_base(), ring = states + 2 * kState;
    const uint32_t own_piece = n * kRow + piece * 16;
    // Of this lane in load_matrices, and in fragments of 16 units.
    const uint32_t own_row = (lane & 7) * kRow + (lane >> 3) * 16;
    const uint32_t own_fragment = fragment_at(warp, lane);

    float state[4];  // what is no unit stays zero
    RNNKERN_UNROLL
    for (int i = 0; i < 4; ++i) {
      state[i] = 0.0f;
      if (p.initial && row[i % 2] < p.batch && is_unit[i / 2]) {
        state[i] = load_element<Element>(static_cast<const char*>(p.initial) + at_state(i));
      }
    }
    store_fragment(states + own_fragment, state);

    if (!Epilogue::kFeatures && !p.input) {
      for (int i = thread(); i < kAhead * kTile / 16; i += kThreads) {
        const int slot = i / (kTile / 16), at = i % (kTile / 16) * 16;
        store_shared4(ring + slot * kSlot + at, {0, 0, 0, 0});
      }
    }
    X x(p);
    const int x_row[] = {warp == 0 && g < p.tile_rows ? first_row + g : kNone};
    auto ahead = Epilogue::kFeatures ? x.template steps<packed>(p, group, first_row)
                                     : Steps<packed>(p, group, row_bytes, at_piece);
    // A float32 state is written by the lanes that have it, one of 16 bits in pieces, later.
    Steps<packed> now(p, group, row_bytes, kBytes == 4 ? at_rows : at_piece);
    uint32_t used = 0, free = kRing - kSlot;  // slots of the ring, in bytes
    const auto ask = [&](uint32_t slot, bool is_step) {
      if constexpr (Epilogue::kFeatures) {
        x.ask(ring + slot, ahead, is_step, x_row);
      } else if (is_step && piece_row < ahead.size) {
        const uint32_t to = ring + slot + own_piece;
        const int64_t at = ahead.offset;
        if (p.input) copy_async<16>(to, static_cast<const char*>(p.input) + at);
        if (kStreams == 2) copy_async<16>(to + kTile, static_cast<const char*>(p.aux) + at);
      }
      copies_commit();
      ahead.next();
    };
    for (int i = 0; i < kAhead - 1; ++i) ask(i * kSlot, i < p.steps);
    copies_wait<kAhead - 2>();
    block_sync();

    uint32_t from = states, to = states + kState;
    int entered = 0;  // rows below have taken a step
    Step before = {0, 0};
    // This thread's piece of the step before.
    const auto write = [&] {
      if (piece_row < before.size) {
        store_global4(static_cast<char*>(p.output) + before.offset, load_shared4(from + own_piece));
      }
    };
    for (int64_t left = p.steps; left > 0; --left) {
      float in[4], aux[4] = {}, entry[4] = {};
      float sums[2][4] = {};  // two, for products to wait less
      if constexpr (Epilogue::kFeatures) {
        uint32_t word, moved;
        x.load(ring + used, 0, word, moved);
        RNNKERN_UNROLL
        for (int i = 0; i < 4; ++i) sums[1][i] = bias[i / 2];
        multiply(Element{}, sums[1], weight_ih, word, moved);
      } else {
        load_fragment(ring + used + own_fragment, in);
      }
      if (kStreams == 2) load_fragment(ring + used + kTile + own_fragment, aux);

      RNNKERN_UNROLL
      for (int k = 0; k < kDeep; k += 2) {
        uint32_t b[4];
        load_matrices(from + own_row + k * 32, b);
        if constexpr (kSplit) {
          uint32_t low[4];
          load_matrices(from + kTile + own_row + k * 32, low);
          multiply(Element{}, sums[0], weight[k], {b[0], b[1]}, {low[0], low[1]});
          multiply(Element{}, sums[1], weight[k + 1], {b[2], b[3]}, {low[2], low[3]});
        } else {
          multiply(Element{}, sums[0], weight[k], b[0], b[1]);
          multiply(Element{}, sums[1], weight[k + 1], b[2], b[3]);
        }
      }
      if (kBytes == 2) write();
      ask(free, left >= kAhead);
      free = used;
      used = used + kSlot == kRing ? 0 : used + kSlot;

      if (Epilogue::kEntry && p.entry && now.size > entered) {
        RNNKERN_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (row[i % 2] >= entered && row[i % 2] < now.size && is_unit[i / 2]) {
            entry[i] = load_element<Element>(static_cast<const char*>(p.entry) + at_state(i));
          }
        }
      }
      float next[4];
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) next[i] = sums[0][i] + sums[1][i];
      epilogue(next, in, aux, entry);
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) {
        // f(0) may not be 0, and 0 * inf is not: what is no unit stays out of the next product.
        // What is no row at all may become anything.
        const bool here = row[i % 2] < now.size;
        state[i] = is_unit[i / 2] && (!packed || here) ? next[i] : state[i];
        if (kBytes == 4 && is_unit[i / 2] && here) {
          const int64_t at = now.offset + i % 2 * row_bytes + i / 2 * 8 * kBytes;
          store_global(static_cast<char*>(p.output) + at, bits(state[i]));
        }
      }
      store_fragment(to + own_fragment, state);
      if (Epilogue::kEntry) entered = now.size > entered ? now.size : entered;
      before = {now.size, now.offset};
      now.next();
      copies_wait<kAhead - 2>();
      block_sync();
      const uint32_t other = from;
      from = to;
      to = other;
    }
    if constexpr (kBytes == 2) {
      write();
      if (p.last && piece_row < p.batch) {
        const int64_t at = static_cast<int64_t>(group) * p.batch + piece_row;
        store_global4(static_cast<char*>(p.last) + at * p.hidden * kBytes + piece * 16,
                      load_shared4(from + own_piece));
      }
    } else {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (p.last && row[i % 2] < p.batch && is_unit[i / 2]) {
          store_global(static_cast<char*>(p.last) + at_state(i), bits(state[i]));
        }
      }
    }
    copies_wait<0>();
  }

  // A warp's 16 units of 8 rows, as its lanes have them of a product.
  static RNNKERN_DEV uint32_t fragment_at(int warp, int lane) {
    if constexpr (kBytes == 2) return (lane & 7) * kRow + (warp * 16 + (lane >> 3 & 1) * 8) * 2;
    return (lane & 3) * 2 * kRow + (warp * 16 + (lane >> 2)) * 4;
  }
  static RNNKERN_DEV void load_fragment(uint32_t at, float (&x)[4]) {
    if constexpr (kBytes == 2) {
      uint32_t words[2];
      load_transposed(at, words);
      unpack<Element, 2>(words, x);
    } else {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) x[i] = number(load_shared(at + i % 2 * kRow + i / 2 * 32));
    }
  }
  // To be multiplied.
  static RNNKERN_DEV void store_fragment(uint32_t at, const float (&x)[4]) {
    if constexpr (kBytes == 2) {
      uint32_t words[2];
      pack<Element, 2>(x, words);
      store_transposed(at, words);
    } else {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t to = at + i % 2 * kRow + i / 2 * 32;
        if constexpr (kSplit) {
          uint32_t high, low;
          split(bits(x[i]), high, low);
          store_shared(to, high);
          store_shared(to + kTile, low);
        } else {
          store_shared(to, Element::operand(bits(x[i])));
        }
      }
    }
  }
};

}  // namespace rnnkern::cuda
