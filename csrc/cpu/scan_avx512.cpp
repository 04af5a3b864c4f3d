// The scan kernels for the avx512 instruction set, compiled with setup.py's flags for it.
#define RNNKERN_ISA avx512
#define RNNKERN_VECTOR_BYTES 64
#define RNNKERN_PANEL_VECS 4
#include "scan_kernel.h"

namespace rnnkern::cpu {

const Kernels kAvx512Kernels = avx512::make_kernels("avx512");

}  // namespace rnnkern::cpu
