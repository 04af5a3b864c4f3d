// Picks the kernel of a scan, and launches it on the current device. No torch header comes in here:
// ops.cpp binds it to torch.
#pragma once
#include <string>
#include <vector>

#include "machine.h"

namespace rnnkern::cuda {

// In the order of the enums.
constexpr const char* kRegimeNames[] = {"warp", "block", "cluster", "grid", "fma"};
constexpr const char* kPrecisionNames[] = {"bfloat16", "float16", "TF32", "3xTF32"};
constexpr const char* kRecurrenceNames[] = {"forward", "backward", "linear", "layer"};

// How a scan will run, or why it cannot.
struct Plan {
  const Kernel* kernel = nullptr;
  int blocks = 0;     // that run a tile together
  int tile_rows = 0;  // of the batch
  int64_t tiles = 0;  // of a group
  double cycles = 0;  // that it will take: modelled, and good for comparisons alone
  std::string refusal;
};

// The regime that RNNKERN_CUDA_REGIME=warp|block|cluster|grid|fma names, for tests and
// measurements; null: the cheapest is taken.
const Regime* forced_regime();

// The cheapest kernel for a scan of this recurrence, activation, and number of steps, rows, units
// and groups; nothing else of it is read. One of kLayer may be given a kernel of kForward, for
// which x_proj is to be made.
Plan make_plan(const Scan& scan, Precision precision);

// What the scan would take step by step, by Triton's kernels (rnnkern/backends/triton.py, FUSED,
// STEPS, TORCH_HIDDEN) or, of IEEE's float32, cuBLAS: it
// reads W anew in each step, but a batch of many rows by more than one tile at a time. Comparable
// to Plan::cycles.
double cycles_step_by_step(const Scan& scan, Precision precision);

// The scan, as planned, on a stream: all of it but tile_rows and reverse is given; `rows` is N, and
// the flags are those of its groups.
void launch(const Plan& plan, Scan scan, int64_t rows, const std::vector<bool>& reverse,
            machine::Stream stream);

// Every kernel that is compiled.
const std::vector<Kernel>& kernels(Precision precision);

// Those of one translation unit (kernels.cu).
template <Regime, Precision>
std::vector<Kernel> compiled();

}  // namespace rnnkern::cuda
