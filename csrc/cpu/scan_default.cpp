// The scan kernels for the default instruction set, compiled with setup.py's flags for it.
#define RNNKERN_ISA baseline
#define RNNKERN_VECTOR_BYTES 16
#define RNNKERN_PANEL_VECS 2
#include "scan_kernel.h"

namespace rnnkern::cpu {

const Kernels kDefaultKernels = baseline::make_kernels("default");

}  // namespace rnnkern::cpu
