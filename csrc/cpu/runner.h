// The scan of whole tensors: the kernels that this machine gets, packing and threads.
#pragma once
#include <ATen/EmptyTensor.h>

#include <functional>
#include <memory>

#include "../checks.h"
#include "../steps.h"
#include "scan_params.h"

namespace rnnkern::cpu {

// The kernels for this machine's instruction set, picked once.
// ATEN_CPU_CAPABILITY=default|avx2|avx512 selects it, as for torch's own kernels, and
// RNNKERN_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16|amx among all of ours.
const Kernels& kernels();

// A tensor like another of the CPU's, without at::empty's way through the dispatcher.
inline Tensor empty(at::IntArrayRef shape, const Tensor& like) {
  return at::detail::empty_cpu(shape, like.scalar_type(), /*pin_memory=*/false);
}

// A layer's input weights, for Recurrence::kLayer.
struct LayerInput {
  at::TensorList weight, bias_ih, bias_hh;
};

// Rows of a matrix, each contiguous.
struct RowsView {
  const void* data;
  int64_t rows, stride;
};

// Whether groups are better shared out to threads whole: where the product of each, of so many
// operations, is too little to be shared out itself.
bool side_by_side(int64_t groups, double flops);
// f(g) for every group, whose product takes so many operations.
void for_each_group(int64_t groups, double flops, const std::function<void(int64_t)>& f);

// Whether to make products of a dtype by those below: they know it, and torch's are no faster.
bool has_products(at::ScalarType dtype);

// out (N, width) = or, to add, += a (N, depth) times W^T or, transposed, W, + the biases (width,),
// undefined for none.
void matmul(const RowsView& a, const Tensor& weight, bool transposed, const Tensor& bias_ih,
            const Tensor& bias_hh, void* out, int64_t out_stride, bool add);

// out = v^T a; see OuterParams, but out is of the dtype itself.
void outer(const OuterParams& params, at::ScalarType dtype);

// out (width,) = the sum of the rows.
void column_sums(const RowsView& v, int64_t width, at::ScalarType dtype, void* out);

// The flags as an array; flipped for the scan that runs backwards through another.
std::unique_ptr<bool[]> flag_array(Flags reverse, bool flipped = false);

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
