// The scan of whole tensors: packing, memory and threads.
#pragma once
#include <ATen/EmptyTensor.h>

#include <functional>

#include "../checks.h"
#include "../steps.h"
#include "isa.h"

namespace rnnkern::cpu {

// A tensor like another of the CPU's, without at::empty's way through the dispatcher.
inline Tensor empty(at::IntArrayRef shape, const Tensor& like) {
  return at::detail::empty_cpu(shape, like.scalar_type(), /*pin_memory=*/false);
}

// A layer's input weights, for Recurrence::kLayer.
struct LayerInput {
  at::TensorList weight, bias_ih, bias_hh;
};

// The flags as an array; flipped for the scan that runs backwards through another.
c10::SmallVector<bool, kMostGroups> flag_array(Flags reverse, bool flipped = false);

// Parameters with all but the tensors' pointers filled in.
ScanParams make_params(Recurrence recurrence, const Tensor& x, at::TensorList weight,
                       const bool* reverse);

// How many threads run_scan() will use: where no more than groups, each runs whole groups.
int64_t scan_threads(const Steps& steps, int64_t groups, int64_t hidden);

// Packs the weights and runs the scan. transposed: multiply the state by W rather than by W^T.
// Of 8-bit weights p.dtype is kInt8, and p.scales are there. before(g), if any, comes before the
// scan of group g, in the thread that runs all of it, if one does.
void run_scan(ScanParams params, const Steps& steps, at::TensorList weight, bool transposed,
              const LayerInput* input = nullptr,
              const std::function<void(int64_t)>& before = nullptr);

}  // namespace rnnkern::cpu
