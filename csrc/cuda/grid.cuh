// H up to 4096 in 16-bit types, 2048 in float32: the blocks of the whole GPU, in one team or
// several, run the tiles of rows in turns, and a state travels through the level 2 cache. (team.cuh
// is the skeleton.)
//
// Mapping. A block has 16 units (of a team of ceil(H / 16) blocks), or 32 where W would not fit
// otherwise; each of its warps a part of the depth, which it alone reads.
//
// Exchange. The output is the mailbox: the launcher has filled it with kNotYet, a word that no
// result is (NaNs are written with other bits), and each word of it is written once. So whoever
// reads something else has read the result: there is no flag, no fence, and no barrier between
// blocks. A warp gathers its own part of the last step's rows, looks again for what was not there
// yet, and goes on, at its own pace.
//
// Synchronisation. The part of the state in shared memory is a warp's own.
//
// Requirements: all blocks resident at once (a cooperative launch); an output apart from the input.
#pragma once
#include "team.cuh"

namespace rnnkern::cuda {

template <class S>
class GridExchange {
 public:
  static constexpr int kStates = 1, kShared = 0;
  static_assert(S::kWarps == S::kSplits,
                "a warp gathers the part of the state that it alone reads");

  RNNKERN_DEV GridExchange(const Scan& p, const Tile& tile)
      : p_(p),
        tile_(tile),
        state_(shared_base()),
        row_bytes_(p.row_stride * S::kBytes),
        output_(static_cast<const char*>(p.output) + tile.first_row * row_bytes_ +
                static_cast<int64_t>(tile.group) * p.hidden * S::kBytes),
        some_((tile.rows * kChunks + 31) / 32) {
    RNNKERN_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (row(i) < tile.rows && chunk(i) * S::kChunk < p.hidden) mine_ |= 1u << i;
      store_shared4(state_ + S::state_at(chunk(i), row(i)), {0, 0, 0, 0});  // if nothing comes
    }
  }

  RNNKERN_DEV uint32_t wait(int64_t, const Step& before, const Step& now) const {
    const char* rows = output_ + before.offset;
    // Rows from here on have not run yet: they have their initial state, or take no part in the
    // step.
    const int running = (before.size < now.size ? before.size : now.size) - tile_.first_row;
    uint32_t wanted = mine_;
    if (running < tile_.rows) {
      RNNKERN_UNROLL
      for (int i = 0; i < kEach; ++i) {
        if (row(i) >= running) wanted &= ~(1u << i);
      }
    }
    some_ == kEach ? gather<true>(rows, wanted) : gather<false>(rows, wanted);
    const int here = now.size - tile_.first_row;
    if (p_.initial && running < tile_.rows && running < here) {
      for (int i = 0; i < kEach; ++i) {
        if (!(mine_ >> i & 1) || row(i) < running || row(i) >= here) continue;
        const int64_t at = static_cast<int64_t>(tile_.group) * p_.batch + tile_.first_row + row(i);
        put(i, load_global4(static_cast<const char*>(p_.initial) + at * p_.hidden * S::kBytes +
                            chunk(i) * 16));
      }
    }
    warp_sync();
    return state_;
  }

  RNNKERN_DEV void store(char* to, const uint32_t (&words)[S::kWords]) const {
    RNNKERN_UNROLL
    for (int w = 0; w < S::kWords; ++w) {
      // One NaN's bits are kNotYet; another's do as well. Two rounded to 16 bits are never.
      const bool taken = S::kWords == 2 && words[w] == kNotYet;
      store_relaxed(to + 4 * w, taken ? kNotYet >> 1 : words[w]);
    }
  }
  // They find it where it was stored.
  RNNKERN_DEV void send(int64_t, int, int, const uint32_t (&)[S::kWords]) const {}

 private:
  static constexpr int kChunks = S::kHidden / S::kSplits / S::kChunk;  // of a row, for a warp
  static constexpr int kEach = S::kRows * kChunks / 32;                // for a lane
  static constexpr int kAtOnce = kEach < 8 ? kEach : 8;
  static_assert(S::kRows * kChunks % 32 == 0 && kEach % kAtOnce == 0, "each lane has as many");
  static_assert(kEach <= 32, "a bit for each");

  // Where the i-th chunk of this lane belongs.
  static RNNKERN_DEV int row(int i) { return (i * 32 + (thread() & 31)) / kChunks; }
  static RNNKERN_DEV int chunk(int i) {
    return (thread() >> 5) * kChunks + (i * 32 + (thread() & 31)) % kChunks;
  }
  RNNKERN_DEV void put(int i, Words4 v) const {
    if constexpr (S::kBytes == 4) {
      v = {S::Element::operand(v.x), S::Element::operand(v.y), S::Element::operand(v.z),
           S::Element::operand(v.w)};
    }
    store_shared4(state_ + S::state_at(chunk(i), row(i)), v);
  }

  // Waits for what is wanted of the step's rows, and puts it, or zeros, where it belongs. A tile of
  // few rows has not so many chunks of each lane: to pass the others over takes time that a whole
  // tile need not spend.
  template <bool whole>
  RNNKERN_DEV void gather(const char* rows, uint32_t wanted) const {
    RNNKERN_UNROLL
    for (int begin = 0; begin < kEach; begin += kAtOnce) {
      if (!whole && begin >= some_) break;
      const auto load = [&](int i) {  // the address anew: there are no registers for so many
        return load_relaxed4(rows + row(begin + i) * row_bytes_ + chunk(begin + i) * 16);
      };
      Words4 v[kAtOnce];
      RNNKERN_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        v[i] = {0, 0, 0, 0};
        if (wanted >> (begin + i) & 1) v[i] = load(i);
      }
      for (bool missing = true; missing;) {
        missing = false;
        RNNKERN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const bool is_there =
              v[i].x != kNotYet && v[i].y != kNotYet && v[i].z != kNotYet && v[i].w != kNotYet;
          if (!is_there) {
            v[i] = load(i);
            missing = true;
          }
        }
        if (missing) spin();
      }
      RNNKERN_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (whole || begin + i < some_) put(begin + i, v[i]);
      }
    }
  }

  const Scan& p_;
  const Tile tile_;
  const uint32_t state_;
  const int64_t row_bytes_;
  const char* const output_;  // the group's part of the tile's first row
  const int some_;            // so many of a lane's chunks may be of the tile's rows
  uint32_t mine_ = 0;         // which chunks there are
};

template <class Element, int hidden, int rows, class Epilogue, int units = 16,
          int register_steps = 1 << 20>
struct GridScan {
  using S = TeamShape<Element, hidden, rows, units, 8, 8, false, register_steps>;
  using Exchange = GridExchange<S>;
  static constexpr Regime kRegime = Regime::kGrid;
  static constexpr int kCapability = 80;
  static constexpr bool kHopper = false;
  static constexpr int kHidden = hidden, kRows = rows, kUnits = units;
  static constexpr int kThreads = S::kThreads, kShared = Team<S, Epilogue, Exchange>::kShared;

  static RNNKERN_DEV void run(const Scan& p) {
    const int blocks = blocks_of_tile(kRegime, p.hidden, units), teams = blocks_x() / blocks;
    const int block = block_x() % blocks;
    const int tiles = (p.batch + p.tile_rows - 1) / p.tile_rows;
    Team<S, Epilogue, Exchange> team(p);
    int loaded = -1;
    for (int64_t i = block_x() / blocks; i < static_cast<int64_t>(tiles) * p.groups; i += teams) {
      const int group = static_cast<int>(i / tiles),
                first_row = static_cast<int>(i % tiles) * p.tile_rows;
      const int rows_left = p.batch - first_row;
      const Tile tile = {group, first_row, rows_left < p.tile_rows ? rows_left : p.tile_rows, block,
                         runs_backwards(p, group)};
      if (group != loaded) team.load_weight(group, block);
      loaded = group;
      Exchange exchange(p, tile);
      team.run(exchange, tile);
      block_sync();  // before the next tile's partial sums
    }
  }
};

}  // namespace rnnkern::cuda
