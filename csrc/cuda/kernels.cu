// The kernels of one regime and precision, which the compiler's command line names: setup.py
// compiles all pairs side by side.
#include "kernels.cuh"

template std::vector<rnnkern::cuda::Kernel> rnnkern::cuda::compiled<
    rnnkern::cuda::Regime::RNNKERN_REGIME, rnnkern::cuda::Precision::RNNKERN_PRECISION>();
