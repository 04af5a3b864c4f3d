// The skeleton of the kernels in which a team of blocks runs a tile of batch rows together, each
// block with the weights of its own hidden units: cluster.cuh and grid.cuh, which differ in how the
// blocks exchange the state (their Exchange).
//
// Mapping. A block computes kUnits of the state's units for up to kRows rows. Units are a product's
// M, rows its N: that is what the tensor cores' shapes suit, for a tile may be as narrow as 8 rows.
// Its warps share the units, in kTiles tiles of 16 each, and the depth of the sum, in kSplits
// parts. A step:
//
//   1 wait for the state of the step before         Exchange::wait
//   2 each warp multiplies its tiles by its part of the state, and leaves the sums in shared memory
//   3 one block_sync
//   4 a thread finishes a pair of neighbouring units of a row: adds the parts, runs the epilogue,
//     writes the output, and sends the state on      Exchange::store, Exchange::send
//
// Requirements, beyond scan.h's: one of W's two strides is 1, the other a multiple of 16 bytes, as
// the groups' is.
//
// On chip. W in registers, as the fragments that the products want, 128 of them at most; what goes
// beyond kRegisterSteps in shared memory, in the same form. The state in atoms of 8 rows of 128
// bytes whose 16-byte chunks are permuted (state_at): no bank is asked twice by ldmatrix, and wgmma
// can read it.
//
// Traffic. The input (and aux) of a step is copied to shared memory kAhead - 1 steps before; every
// thread copies what it will need itself, so no other synchronisation is needed. The output is
// written once.
//
// Synchronisation. Partial sums may be overwritten once all threads have read them. They are in two
// buffers, which the block_sync of the step between keeps apart.
//
// Numerics. Sums in float32, in an order that depends on the kernel alone. The state is rounded
// once per step, to the storage type; Tf32's once more where it is multiplied, not where it is
// written.
#pragma once
#include "epilogue.cuh"
#include "kernel.h"
#include "steps.cuh"
#include "words.cuh"

namespace rnnkern::cuda {

template <class Element_, int hidden, int rows, int units, int warps, int splits, bool wgmma,
          int register_steps = 1 << 20>
struct TeamShape {
  using Element = Element_;
  static constexpr int kBytes = Element::kBytes;
  static constexpr int kHidden = hidden, kRows = rows, kUnits = units, kSplits = splits;
  static constexpr int kWarps = warps, kThreads = 32 * warps;
  static constexpr bool kWgmma = wgmma;
  static constexpr int kChunk = 16 / kBytes;                     // elements of 16 bytes
  static constexpr int kTiles = units / 16 * splits / warps;     // of 16 units, of a warp
  static constexpr int kSteps = hidden / splits / (2 * kChunk);  // products deep, of a warp
  static constexpr int kRegisterSteps = register_steps < kSteps ? register_steps : kSteps;
  static constexpr int kWeightBytes = warps * (kSteps - kRegisterSteps) * kTiles * 512;
  static constexpr int kRowGroups = rows / 8;
  static constexpr int kStateBytes = hidden * rows * kBytes;
  static constexpr int kPartialRow = units + 4;  // floats; 4 more, for the banks
  static constexpr int kPartialBytes = splits * rows * kPartialRow * 4;
  // Pairs of units: so many rows at a time, in so many passes; words of one.
  static constexpr int kPassRows = kThreads * 2 / units;
  static constexpr int kPasses = (rows + kPassRows - 1) / kPassRows;
  static constexpr int kWords = kBytes / 2;
  static constexpr int kAhead = rows > 16 ? 4 : 8;

  static_assert(units % 16 == 0 && rows % 8 == 0 && units / 16 * splits % warps == 0, "tiles");
  static_assert(hidden / splits * kBytes % 128 == 0, "a part of the depth is whole atoms");
  static_assert(kSteps % 2 == 0, "ldmatrix fetches two steps");
  static_assert(!wgmma || (kTiles == 1 && units == 64 && kBytes == 2 && kWeightBytes == 0),
                "wgmma");

  // Where in a state a row's chunk of 16 bytes is.
  static RNNKERN_DEV uint32_t state_at(int chunk, int row) {
    return (((chunk >> 3) * kRowGroups + (row >> 3)) << 10) + ((row & 7) << 7) +
           (((chunk & 7) ^ (row & 7)) << 4);
  }
};

// What an Exchange is told of the tile.
struct Tile {
  int group, first_row, rows;  // as many rows of the batch from the first
  int block;                   // which of the team's
  bool backwards;
};

template <class S, class Epilogue, class Exchange>
class Team {
  using Element = typename S::Element;
  static constexpr int kWords = S::kWords;
  static constexpr int kStreams = Epilogue::kAux ? 2 : 1;
  static constexpr int kSlot = S::kPasses * S::kThreads * kWords * 4;  // bytes of a step's input
  static constexpr int kRing = S::kAhead * kSlot;
  static constexpr int kPartialsAt = Exchange::kStates * S::kStateBytes;
  static constexpr int kRingAt = kPartialsAt + 2 * S::kPartialBytes;
  static constexpr int kWeightAt = kRingAt + kStreams * kRing;
  static constexpr int kExchangeAt = kWeightAt + S::kWeightBytes;
  static constexpr int kInUse = kExchangeAt + Exchange::kShared;
  // W comes in pieces of 2 KB, a block's all at once where they fit. Shared memory costs nothing up
  // to what one block may have, for there is one on a multiprocessor.
  static constexpr int kPieces = S::kTiles * S::kSteps / 4;
  static constexpr int kRoom = S::kWeightBytes ? kWeightAt : 128 * 1024;
  static constexpr int pieces_at_once(int most) {
    return kPieces % most == 0 ? most : pieces_at_once(most - 1);
  }
  static constexpr int kFitting = kRoom / (2048 * S::kWarps);
  static constexpr int kPiecesAtOnce = pieces_at_once(kFitting < kPieces ? kFitting : kPieces);
  static constexpr int kStaged = kPiecesAtOnce * 2048 * S::kWarps;

 public:
  static constexpr int kShared = kInUse > kStaged ? kInUse : kStaged;

  RNNKERN_DEV explicit Team(const Scan& p)
      : p_(p),
        epilogue_(p.activation),
        shared_(shared_base()),
        row_bytes_(p.row_stride * S::kBytes),
        warp_(thread() >> 5),
        lane_(thread() & 31),
        part_(warp_ / (S::kWarps / S::kSplits)),
        unit_(warp_ % (S::kWarps / S::kSplits) * S::kTiles * 16) {}

  RNNKERN_DEV uint32_t exchange_memory() const { return shared_ + kExchangeAt; }

  // The block's part of a group's matrix. Each warp copies its own to shared memory, where nothing
  // else is yet, in pieces of 16 units times 128 bytes of depth, and fetches fragments from there.
  RNNKERN_DEV void load_weight(int group, int block) {
    const uint32_t staged = shared_ + warp_ * kPiecesAtOnce * 2048;
    const bool by_unit =
        p_.weight.stride_k == 1;  // a unit's weights are neighbours; else a depth's are
    RNNKERN_UNROLL
    for (int begin = 0; begin < kPieces; begin += kPiecesAtOnce) {
      RNNKERN_UNROLL
      for (int i = 0; i < kPiecesAtOnce; ++i) {
        const int m = (begin + i) / (S::kSteps / 4), k = (begin + i) % (S::kSteps / 4) * 4;
        const int unit = block * S::kUnits + unit_ + m * 16;
        const int depth = (part_ * S::kSteps + k) * 2 * S::kChunk;
        by_unit ? copy_by_unit(group, unit, depth, staged + i * 2048)
                : copy_by_depth(group, unit, depth, staged + i * 2048);
      }
      copies_commit();
      copies_wait<0>();
      warp_sync();
      RNNKERN_UNROLL
      for (int i = 0; i < kPiecesAtOnce; ++i) {
        const int m = (begin + i) / (S::kSteps / 4), k = (begin + i) % (S::kSteps / 4) * 4;
        RNNKERN_UNROLL
        for (int j = 0; j < 4; ++j) {
          uint32_t words[4];
          by_unit ? fetch_by_unit(staged + i * 2048, j, words)
                  : fetch_by_depth(staged + i * 2048, j, words);
          keep(m, k + j, words);
        }
      }
      warp_sync();
    }
    block_sync();
  }

  RNNKERN_DEV void run(Exchange& exchange, const Tile& tile) {
    const int pair = thread() % (S::kUnits / 2), n0 = thread() / (S::kUnits / 2);
    const int unit = tile.block * S::kUnits + 2 * pair;
    const bool is_unit = unit < p_.hidden;
    // Of this thread's first pair; kPassRows rows on, the next.
    const int64_t at_rows = (tile.first_row + n0) * row_bytes_ +
                            (static_cast<int64_t>(tile.group) * p_.hidden + unit) * S::kBytes;
    const int64_t at_states =
        ((static_cast<int64_t>(tile.group) * p_.batch + tile.first_row + n0) * p_.hidden + unit) *
        S::kBytes;
    const int64_t pass_rows = S::kPassRows * row_bytes_;
    const int pass_states = S::kPassRows * p_.hidden * S::kBytes;
    const uint32_t own_ring = shared_ + kRingAt + thread() * kWords * 4;

    uint32_t state[S::kPasses][kWords];  // of each pair, as it is written
    RNNKERN_UNROLL
    for (int i = 0; i < S::kPasses; ++i) {
      RNNKERN_UNROLL
      for (int w = 0; w < kWords; ++w) state[i][w] = 0;
      if (p_.initial && is_unit && n0 + i * S::kPassRows < tile.rows) {
        load_words<kWords>(static_cast<const char*>(p_.initial) + at_states + i * pass_states,
                           state[i]);
      }
    }

    uint32_t asked = 0, used = 0;  // slots of the ring, in bytes
    const auto ask = [&](const Step& step) {
      const int here = step.size - tile.first_row;
      RNNKERN_UNROLL
      for (int i = 0; i < S::kPasses; ++i) {
        const int n = n0 + i * S::kPassRows;
        if (is_unit && n < tile.rows && n < here) {
          const uint32_t to = own_ring + asked + i * S::kThreads * kWords * 4;
          const int64_t at = step.offset + at_rows + i * pass_rows;
          if (p_.input) copy_async<kWords * 4>(to, static_cast<const char*>(p_.input) + at);
          if (kStreams == 2) {
            copy_async<kWords * 4>(to + kRing, static_cast<const char*>(p_.aux) + at);
          }
        }
      }
      copies_commit();
      asked = asked + kSlot == kRing ? 0 : asked + kSlot;
    };
    for (int t = 0; t < S::kAhead - 1; ++t) ask(step_at(p_, tile.backwards, t, row_bytes_));

    Step before = {0, 0}, now = step_at(p_, tile.backwards, 0, row_bytes_);
    for (int64_t t = 0; t < p_.steps; ++t) {
      const Step ahead = step_at(p_, tile.backwards, t + S::kAhead - 1, row_bytes_);
      const Step next = step_at(p_, tile.backwards, t + 1, row_bytes_);
      const uint32_t state_memory = exchange.wait(t, before, now);
      const uint32_t partials = shared_ + kPartialsAt + (t & 1 ? S::kPartialBytes : 0);
      multiply(state_memory, partials, [&] { ask(ahead); });
      copies_wait<S::kAhead - 1>();
      block_sync();

      const int here = now.size - tile.first_row, entered = before.size - tile.first_row;
      RNNKERN_UNROLL
      for (int i = 0; i < S::kPasses; ++i) {
        const int n = n0 + i * S::kPassRows;
        if (n >= tile.rows) continue;  // whole warps, where a row is a warp's
        if (n < here) {
          float pair_sum[2] = {};
          RNNKERN_UNROLL
          for (int part = 0; part < S::kSplits; ++part) {
            const Words2 sums =
                load_shared2(partials + ((part * S::kRows + n) * S::kPartialRow + 2 * pair) * 4);
            pair_sum[0] += number(sums.x);
            pair_sum[1] += number(sums.y);
          }
          float in[2] = {}, aux[2] = {}, entry[2] = {};
          const uint32_t slot = own_ring + used + i * S::kThreads * kWords * 4;
          if (p_.input) read_ring(slot, in);
          if (kStreams == 2) read_ring(slot + kRing, aux);
          if (p_.entry && n >= entered && is_unit) {
            uint32_t words[kWords];
            load_words<kWords>(static_cast<const char*>(p_.entry) + at_states + i * pass_states,
                               words);
            unpack<Element, kWords>(words, entry);
          }
          epilogue_(pair_sum, in, aux, entry);
          // f(0) may not be 0, and 0 * inf is not: what is no unit stays out of the next product.
          const float next_pair[] = {is_unit ? pair_sum[0] : 0.0f, is_unit ? pair_sum[1] : 0.0f};
          pack<Element, kWords>(next_pair, state[i]);
          if (is_unit) {
            char* to = static_cast<char*>(p_.output) + now.offset + at_rows + i * pass_rows;
            exchange.store(to, state[i]);
          }
        }
        if (t + 1 < p_.steps) exchange.send(t, n, 2 * pair, state[i]);
      }
      used = used + kSlot == kRing ? 0 : used + kSlot;
      before = now;
      now = next;
    }
    copies_wait<0>();

    RNNKERN_UNROLL
    for (int i = 0; i < S::kPasses; ++i) {
      if (p_.last && is_unit && n0 + i * S::kPassRows < tile.rows) {
        store_words<kWords>(static_cast<char*>(p_.last) + at_states + i * pass_states, state[i]);
      }
    }
  }

 private:
  static RNNKERN_DEV void read_ring(uint32_t slot, float (&pair)[2]) {
    uint32_t words[kWords];
    load_shared_words<kWords>(slot, words);
    unpack<Element, kWords>(words, pair);
  }

  // 16 bytes of the matrix, which begin at a unit and a depth, or zeros outside of it.
  RNNKERN_DEV void copy_chunk(int group, int unit, int depth, uint32_t to) const {
    if (unit < p_.hidden && depth < p_.hidden) {
      copy_async<16>(to, address_of<Element>(p_.weight, group, unit, depth));
    } else {
      store_shared4(to, {0, 0, 0, 0});
    }
  }
  // As 16 rows of 128 bytes, a unit each, whose chunks are permuted; a fragment is four of
  // ldmatrix's matrices.
  RNNKERN_DEV void copy_by_unit(int group, int unit, int depth, uint32_t to) const {
    const int chunk = lane_ & 7;
    RNNKERN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + (lane_ >> 3);
      copy_chunk(group, unit + row, depth + chunk * S::kChunk,
                 to + row * 128 + ((chunk ^ (row & 7)) << 4));
    }
  }
  RNNKERN_DEV void fetch_by_unit(uint32_t from, int step, uint32_t (&words)[4]) const {
    const int row = lane_ & 15, chunk = 2 * step + (lane_ >> 4);
    load_matrices(from + row * 128 + ((chunk ^ (row & 7)) << 4), words);
    operands(words);
  }
  // As rows of 16 units, a depth each: 64 of 32 bytes, or 32 of 64.
  RNNKERN_DEV void copy_by_depth(int group, int unit, int depth, uint32_t to) const {
    constexpr int kChunks = S::kBytes;  // of a row
    RNNKERN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = (i * 32 + lane_) / kChunks, chunk = lane_ % kChunks;
      copy_chunk(group, unit + chunk * S::kChunk, depth + row, to + (row * kChunks + chunk) * 16);
    }
  }
  RNNKERN_DEV void fetch_by_depth(uint32_t from, int step, uint32_t (&words)[4]) const {
    if constexpr (S::kBytes == 2) {
      const int row = 16 * step + (lane_ & 7) + (lane_ >> 4) * 8, chunk = (lane_ >> 3) & 1;
      load_transposed(from + row * 32 + chunk * 16, words);
    } else {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * step + (lane_ & 3) + (i >> 1) * 4, unit = (lane_ >> 2) + (i & 1) * 8;
        words[i] = load_shared(from + row * 64 + unit * 4);
      }
      operands(words);
    }
  }
  static RNNKERN_DEV void operands(uint32_t (&words)[4]) {
    if constexpr (S::kBytes == 4) {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) words[i] = Element::operand(words[i]);
    }
  }
  RNNKERN_DEV void keep(int m, int k, const uint32_t (&words)[4]) {
    if (k < S::kRegisterSteps) {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) weight_[m][k < S::kRegisterSteps ? k : 0][i] = words[i];
    } else {
      store_shared4(shared_weight(m, k), {words[0], words[1], words[2], words[3]});
    }
  }
  RNNKERN_DEV uint32_t shared_weight(int m, int k) const {
    const int at =
        (warp_ * (S::kSteps - S::kRegisterSteps) + k - S::kRegisterSteps) * S::kTiles + m;
    return shared_ + kWeightAt + at * 512 + lane_ * 16;
  }
  RNNKERN_DEV void fragment(int m, int k, uint32_t (&a)[4]) const {
    if (k < S::kRegisterSteps) {
      RNNKERN_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = weight_[m][k < S::kRegisterSteps ? k : 0][i];
    } else {
      const Words4 v = load_shared4(shared_weight(m, k));
      a[0] = v.x;
      a[1] = v.y;
      a[2] = v.z;
      a[3] = v.w;
    }
  }

  // This warp's tiles times its part of the state, into the partial sums.
  template <class Meanwhile>
  RNNKERN_DEV void multiply(uint32_t state, uint32_t partials, Meanwhile meanwhile) const {
    constexpr int kGroups = S::kRowGroups;
    const uint32_t from = state + part_ * (S::kSteps / 4) * kGroups * 1024;
    const int g = lane_ >> 2, q = lane_ & 3;
    const uint32_t to = partials + ((part_ * S::kRows + 2 * q) * S::kPartialRow + unit_ + g) * 4;
    const auto leave = [&](int m, int group, int i, float sum) {
      const int row = group * 8 + (i & 1), unit = m * 16 + (i >> 1) * 8;
      store_shared(to + (row * S::kPartialRow + unit) * 4, bits(sum));
    };
    if constexpr (S::kWgmma) {
      fence_for_wgmma();
      float even[S::kRows / 2], odd[S::kRows / 2];  // two sums, for products to wait less
      const uint64_t base = wgmma_operand(uniform(from));
      wgmma_fence();
      RNNKERN_UNROLL
      for (int k = 0; k < S::kSteps; ++k) {
        const uint64_t b = wgmma_operand_on(base, (k >> 2) * kGroups * 1024 + (k & 3) * 32);
        wgmma(Element{}, k & 1 ? odd : even, weight_[0][k], b, k > 1);
      }
      wgmma_commit();
      meanwhile();
      wgmma_wait();
      RNNKERN_UNROLL
      for (int j = 0; j < S::kRows / 2; ++j) leave(0, j >> 2, j & 3, even[j] + odd[j]);
    } else {
      constexpr int kSums = kGroups == 1 ? 2 : 1;  // of a tile, for products to wait less
      float sums[S::kTiles][kGroups * kSums][4] = {};
      const uint32_t lane_from = from + ((lane_ & 7) << 7) + (((lane_ >> 3) ^ (lane_ & 7)) << 4);
      RNNKERN_UNROLL
      for (int k = 0; k < S::kSteps; k += 2) {
        uint32_t a[2][S::kTiles][4];
        RNNKERN_UNROLL
        for (int m = 0; m < S::kTiles; ++m) {
          fragment(m, k, a[0][m]);
          fragment(m, k + 1, a[1][m]);
        }
        RNNKERN_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          uint32_t b[4];
          // The upper half of an atom's chunks is the lower with this bit flipped.
          const uint32_t at = (k >> 1) & 1 ? lane_from ^ 64u : lane_from;
          load_matrices(at + ((k >> 2) * kGroups + group) * 1024, b);
          RNNKERN_UNROLL
          for (int m = 0; m < S::kTiles; ++m) {
            cuda::multiply(Element{}, sums[m][group * kSums], a[0][m], b[0], b[1]);
          }
          RNNKERN_UNROLL
          for (int m = 0; m < S::kTiles; ++m) {
            cuda::multiply(Element{}, sums[m][group * kSums + kSums - 1], a[1][m], b[2], b[3]);
          }
        }
      }
      meanwhile();
      RNNKERN_UNROLL
      for (int m = 0; m < S::kTiles; ++m) {
        RNNKERN_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          RNNKERN_UNROLL
          for (int i = 0; i < 4; ++i) {
            float sum = sums[m][group * kSums][i];
            if (kSums == 2) sum += sums[m][group * kSums + kSums - 1][i];
            leave(m, group, i, sum);
          }
        }
      }
    }
  }

  const Scan& p_;
  const Epilogue epilogue_;
  const uint32_t shared_;
  const int64_t row_bytes_;
  const int warp_, lane_, part_, unit_;
  uint32_t weight_[S::kTiles][S::kRegisterSteps][4];
};

}  // namespace rnnkern::cuda
