// Weights as the kernels read them: packed for a call, or kept packed for many.
#pragma once
#include <ATen/core/Tensor.h>

#include "isa.h"

namespace rnnkern::cpu {

// The matrix W^T or, transposed, W.
inline MatrixView view_of(const at::Tensor& w, bool transposed) {
  const int k = transposed ? 0 : 1, n = 1 - k;
  return {w.const_data_ptr(), w.stride(k), w.stride(n), w.size(k), w.size(n)};
}

// Panels of columns that a matrix of such a width has.
int64_t panels_of(DType dtype, int64_t width);

// All of a matrix into Kernels::packed_bytes() of memory.
void pack(const MatrixView& matrix, DType dtype, void* dst);

// W^T packed, if this is inference with a weight of which a packed copy is kept; else undefined.
at::Tensor kept_weight(const at::Tensor& w, bool transposed, DType dtype);

}  // namespace rnnkern::cpu
