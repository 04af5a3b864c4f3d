// The kernels of the instruction set that this machine has.
#pragma once
#include <ATen/core/Tensor.h>

#include "scan_params.h"

namespace rnnkern::cpu {

// The kernels for this machine's instruction set, picked once.
// ATEN_CPU_CAPABILITY=default|avx2|avx512 selects it, as for torch's own kernels, and
// RNNKERN_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16|amx among all of ours; emulated ones are
// picked by name alone.
const Kernels& kernels();

// A tensor's type as the kernels know it; TypeError if they do not.
DType parse_dtype(at::ScalarType dtype);

// Whether to make products of a dtype by products.h: the kernels know it, and torch's are no
// faster.
bool has_products(at::ScalarType dtype);

}  // namespace rnnkern::cpu
