// The scan kernels for the avx512 instruction set with bfloat16 products, compiled with setup.py's
// flags for it.
#define RNNKERN_ISA avx512_bf16
#define RNNKERN_VECTOR_BYTES 64
#define RNNKERN_PANEL_VECS 4
#include "scan_kernel.h"

namespace rnnkern::cpu {

const Kernels kAvx512Bf16Kernels = avx512_bf16::make_kernels("avx512_bf16");

}  // namespace rnnkern::cpu
