// The scan kernels for AVX-512 with AMX, compiled with setup.py's flags for it.
#define RNNKERN_ISA amx
#define RNNKERN_VECTOR_BYTES 64
#define RNNKERN_PANEL_VECS 4
#include "scan_kernel.h"

namespace rnnkern::cpu {

const Kernels kAmxKernels = amx::make_kernels("amx");

}  // namespace rnnkern::cpu
