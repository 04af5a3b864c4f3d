// The products outside the scan, of whole tensors.
#pragma once
#include <functional>

#include "isa.h"

namespace rnnkern::cpu {

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

// out (N, width) = or, to add, += a (N, depth) times W^T or, transposed, W, + the biases (width,),
// undefined for none. out may be a's data, of the same stride, where in_place() says so.
void matmul(const RowsView& a, const at::Tensor& weight, bool transposed, const at::Tensor& bias_ih,
            const at::Tensor& bias_hh, void* out, int64_t out_stride, bool add);
bool in_place(int64_t rows, const at::Tensor& weight);

// out = v^T a; see OuterParams, but out is of the dtype itself.
void outer(const OuterParams& params, at::ScalarType dtype);

// out (width,) = the sum of the rows.
void column_sums(const RowsView& v, int64_t width, at::ScalarType dtype, void* out);

}  // namespace rnnkern::cpu
