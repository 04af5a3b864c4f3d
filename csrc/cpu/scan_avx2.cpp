// The scan kernels for the avx2 instruction set, compiled with setup.py's flags for it.
#define RNNKERN_ISA avx2
#define RNNKERN_VECTOR_BYTES 32
#define RNNKERN_PANEL_VECS 2
#include "scan_kernel.h"

namespace rnnkern::cpu {

const Kernels kAvx2Kernels = {
    "avx2", avx2::packed_bytes, avx2::state_bytes, avx2::panels_of, avx2::pack_matrix, avx2::scan,
};

}  // namespace rnnkern::cpu
