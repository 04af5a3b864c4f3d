// What the launcher knows of a compiled kernel. A kernel is a struct with these constants and
//
//   static RNNKERN_DEV void run(const Scan& p);
//
// in warp.cuh, fma.cuh, block.cuh, cluster.cuh and grid.cuh; kernels.cuh lists those that are
// compiled.
#pragma once
#include "scan.h"

#ifdef __CUDACC__
#define RNNKERN_HOST_DEV __host__ __device__
#else
#define RNNKERN_HOST_DEV
#endif

namespace rnnkern::cuda {

// Where W lives, and how far a state travels in a step. Block (x, y) of kWarp, kFma and kBlock runs
// tile x of group y, cluster (x, y) of kCluster too; kGrid's blocks, all of which must be resident
// at once, are teams that take the tiles of all groups in turns.
enum class Regime {
  kWarp,     // one warp's registers; nowhere
  kBlock,    // one block's registers; through its shared memory
  kCluster,  // the registers of a cluster's blocks; to each other's shared memory
  kGrid,     // the registers and shared memory of a grid's blocks; through the level 2 cache
  kFma,      // as kBlock's, but multiplied by no tensor core
};

// Whether several blocks run a tile together.
RNNKERN_HOST_DEV constexpr bool is_team(Regime r) {
  return r == Regime::kCluster || r == Regime::kGrid;
}

// How many, of a kernel whose blocks have so many units each. A cluster of one has nobody to send
// messages to, itself included.
RNNKERN_HOST_DEV constexpr int blocks_of_tile(Regime r, int hidden, int units) {
  const int blocks = (hidden + units - 1) / units;
  return !is_team(r) ? 1 : r == Regime::kCluster && blocks < 2 ? 2 : blocks;
}

constexpr int kAnyActivation = -1;

struct Kernel {
  Regime regime;
  Precision precision;
  Recurrence recurrence;
  int activation;  // that it is compiled for, or kAnyActivation
  int hidden;      // H at most
  int rows;        // of a tile at most
  int units;       // of a block: blocks_of_tile() run one together
  int threads;     // of a block
  int shared;      // bytes of a block's dynamic shared memory
  int capability;  // ten times the least compute capability
  bool hopper;     // of no later one either: it has wgmma
  void (*function)(Scan);

  bool runs_on(int device_capability) const {
    return hopper ? device_capability == 90 : device_capability >= capability;
  }
};

// kGrid's blocks find a state in the output as soon as it is not this, so the launcher fills the
// output with it before.
constexpr uint32_t kNotYet = 0xffffffffu;

}  // namespace rnnkern::cuda
