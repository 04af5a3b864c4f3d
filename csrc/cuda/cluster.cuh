// H up to 1024 in 16-bit types, 512 in float32: a cluster of blocks runs a tile of rows, and a
// state travels through its blocks' shared memory. (team.cuh is the skeleton.)
//
// Mapping. Block r of the ceil(H / 64) of a cluster, two at least, has units 64 r to 64 r + 63. Up
// to 16 rows the products are mma.sync's, 8 warps by halves of the units and quarters of the depth;
// from 16 rows of 16-bit types on they can be wgmma's, each warpgroup with a part of the depth.
//
// Exchange. Every block has two states, and sends its 64 units of the next one to every block,
// itself included, in messages of 16 bytes that the receiver's barrier of that state counts
// (st.async, an mbarrier of transactions). There is no barrier between blocks in the loop.
//
// Why two states and no "empty" signal are enough. Step t reads state t % 2, and sends to the
// other.
//  - Overwriting: A writes P's other state at step t. P last read it at step t - 1. A is in step t
//    only since it has all of state t, P's part too, which P sent after its own block_sync of step
//    t - 1, when all its warps had read.
//  - Phases: bytes of a barrier's next phase can come only after all blocks, P included, sent the
//    state between, hence after P saw the present phase complete; and they cannot complete it
//    before P has armed it, for that is its one arrival. To arm late is harmless.
//  - Parity: a warp of P that still waits for a phase holds back P's block_sync, so P's sends, so
//    the phase after the next.
//  - No deadlock: a cluster's blocks run at the same time, every row of the tile is sent at every
//    step but the last, whether it takes part or not, and the barriers expect just these bytes.
// tests/cuda checks this under adversarial schedules, and a model of it in all interleavings.
//
// Requirements: compute capability 9.0, clusters of up to 16 blocks (beyond 8 the launch must ask).
#pragma once
#include "team.cuh"

namespace rnnkern::cuda {

template <class S>
class ClusterExchange {
 public:
  static constexpr int kStates = 2, kShared = 16;

  RNNKERN_DEV ClusterExchange(const Scan& p, const Tile& tile, uint32_t barriers)
      : states_(shared_base()),
        barriers_(barriers),
        tile_(tile),
        blocks_(blocks_of_tile(Regime::kCluster, p.hidden, S::kUnits)),
        bytes_(tile.rows * blocks_ * S::kUnits * S::kBytes) {
    RNNKERN_UNROLL
    for (int i = 0; i < kPeers; ++i) {
      const int rank = i * kLanes + thread() % kLanes;
      peers_[i] = shared_of(states_, rank < blocks_ ? rank : 0);
    }
    if (thread() == 0) {
      RNNKERN_UNROLL
      for (int i = 0; i < 2; ++i) barrier_init(barriers_ + 8 * i, 1);
      barrier_init_fence();
    }
    // The first state, and zeros for what nobody sends.
    constexpr int kChunks = S::kHidden / S::kChunk;
    for (int i = thread(); i < S::kRows * kChunks; i += S::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      Words4 v = {0, 0, 0, 0};
      if (p.initial && row < tile.rows && chunk * S::kChunk < p.hidden) {
        const int64_t at = static_cast<int64_t>(tile.group) * p.batch + tile.first_row + row;
        v = load_global4(static_cast<const char*>(p.initial) + at * p.hidden * S::kBytes +
                         chunk * 16);
        if constexpr (S::kBytes == 4) {
          v = {S::Element::operand(v.x), S::Element::operand(v.y), S::Element::operand(v.z),
               S::Element::operand(v.w)};
        }
      }
      store_shared4(states_ + S::state_at(chunk, row), v);
      store_shared4(states_ + S::kStateBytes + S::state_at(chunk, row), {0, 0, 0, 0});
    }
    if (S::kWgmma) fence_for_wgmma();
    cluster_sync();  // before anybody sends
    if (thread() == 0) {
      RNNKERN_UNROLL
      for (int i = 0; i < 2; ++i) barrier_expect(barriers_ + 8 * i, bytes_);
    }
  }

  RNNKERN_DEV uint32_t wait(int64_t t, const Step&, const Step&) const {
    const uint32_t at = static_cast<uint32_t>(t) & 1;
    if (t > 0) {
      barrier_wait(barriers_ + 8 * at, static_cast<uint32_t>((t - 1) >> 1) & 1);
      if (thread() == 0) barrier_expect(barriers_ + 8 * at, bytes_);  // of two steps on
    }
    return states_ + at * S::kStateBytes;
  }

  RNNKERN_DEV void store(char* to, const uint32_t (&words)[S::kWords]) const {
    store_words<S::kWords>(to, words);
  }

  // Lanes with the pairs of 16 bytes each gather them, and send them to a share of the blocks.
  RNNKERN_DEV void send(int64_t t, int row, int unit, const uint32_t (&words)[S::kWords]) const {
    const int lane = thread() & 31, first = lane & ~(kLanes - 1);
    Words4 v;
    if constexpr (S::kWords == 1) {
      v = {shuffle(words[0], first), shuffle(words[0], first + 1), shuffle(words[0], first + 2),
           shuffle(words[0], first + 3)};
    } else {
      const uint32_t x = S::Element::operand(words[0]), y = S::Element::operand(words[1]);
      v = {shuffle(x, first), shuffle(y, first), shuffle(x, first + 1), shuffle(y, first + 1)};
    }
    const uint32_t to = static_cast<uint32_t>(t + 1) & 1;
    const int chunk = (tile_.block * S::kUnits + unit) / S::kChunk;
    const uint32_t at = to * S::kStateBytes + S::state_at(chunk, row);
    const uint32_t barrier = barriers_ - states_ + 8 * to;
    RNNKERN_UNROLL
    for (int i = 0; i < kPeers; ++i) {
      if (i * kLanes + thread() % kLanes < blocks_) {
        cuda::send(peers_[i] + at, v, peers_[i] + barrier);
      }
    }
  }

 private:
  static constexpr int kLanes = 4 / S::kWords;  // with the pairs of 16 bytes
  static constexpr int kPeers = (S::kHidden / S::kUnits + kLanes - 1) / kLanes;

  const uint32_t states_, barriers_;
  const Tile tile_;
  const int blocks_;
  const uint32_t bytes_;
  uint32_t peers_[kPeers];  // the states of this lane's share of the blocks
};

// warpgroups: 0 for mma.sync, or of wgmma.
template <class Element, int hidden, int rows, class Epilogue, int warpgroups = 0,
          int register_steps = 1 << 20>
struct ClusterScan {
  using S = TeamShape<Element, hidden, rows, 64, warpgroups == 4 ? 16 : 8,
                      warpgroups ? warpgroups : 4, warpgroups != 0, register_steps>;
  using Exchange = ClusterExchange<S>;
  static constexpr Regime kRegime = Regime::kCluster;
  static constexpr int kCapability = 90;
  static constexpr bool kHopper = warpgroups != 0;
  static constexpr int kHidden = hidden, kRows = rows, kUnits = S::kUnits;
  static constexpr int kThreads = S::kThreads, kShared = Team<S, Epilogue, Exchange>::kShared;

  static RNNKERN_DEV void run(const Scan& p) {
    const int group = block_y(), first_row = static_cast<int>(cluster_x()) * p.tile_rows;
    const int rows_left = p.batch - first_row;
    const Tile tile = {group, first_row, rows_left < p.tile_rows ? rows_left : p.tile_rows,
                       static_cast<int>(cluster_rank()), runs_backwards(p, group)};
    Team<S, Epilogue, Exchange> team(p);
    team.load_weight(group, tile.block);
    Exchange exchange(p, tile, team.exchange_memory());
    team.run(exchange, tile);
    cluster_sync();  // nobody leaves while messages to it may be under way
  }
};

}  // namespace rnnkern::cuda
