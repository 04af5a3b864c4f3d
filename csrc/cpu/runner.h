// The scan of whole tensors: their steps, the kernels that this machine gets, packing and threads.
#pragma once
#include <memory>

#include "../checks.h"
#include "scan_params.h"

namespace rnnkern::cpu {

// The kernels for this machine's instruction set, picked once.
// ATEN_CPU_CAPABILITY=default|avx2|avx512 selects it, as for torch's own kernels.
const Kernels& kernels();

// The steps of a scan. A plain batch needs no arrays.
struct Steps {
  int64_t count, batch, rows;
  std::vector<int64_t> sizes, offsets;

  Steps(const Tensor& x, const OptTensor& batch_sizes, const OptTensor& initial);

  bool packed() const { return !sizes.empty(); }
  int64_t offset(int64_t t) const { return packed() ? offsets[t] : t * batch; }
  int64_t size(int64_t t) const { return packed() ? sizes[t] : batch; }
  // How many steps row b takes part in.
  int64_t length(int64_t b) const;
  // The bounds of `parts` ranges of batch rows with about equal numbers of steps in each.
  std::vector<int64_t> split(int64_t parts) const;
};

// A layer's input weights, for Recurrence::kLayer.
struct LayerInput {
  at::TensorList weight, bias_ih, bias_hh;
};

// The flags as an array; flipped for the scan that runs backwards through another.
std::unique_ptr<bool[]> flag_array(Flags reverse, bool flipped = false);

// Parameters with all but the tensors' pointers filled in.
ScanParams make_params(Recurrence recurrence, const Tensor& x, at::TensorList weight,
                       const bool* reverse);

// Packs the weights and runs the scan. transposed: multiply the state by W rather than by W^T.
void run_scan(ScanParams params, const Steps& steps, at::TensorList weight, bool transposed,
              const LayerInput* input = nullptr);

}  // namespace rnnkern::cpu
