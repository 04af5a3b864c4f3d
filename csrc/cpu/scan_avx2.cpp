// The scan kernels for the avx2 instruction set, compiled with setup.py's flags for it.
#define RNNKERN_ISA avx2
#define RNNKERN_VECTOR_BYTES 32
#define RNNKERN_PANEL_VECS 2
#include "scan_kernel.h"

namespace rnnkern::cpu {

const Kernels kAvx2Kernels = avx2::make_kernels("avx2");

}  // namespace rnnkern::cpu
