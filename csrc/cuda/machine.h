// What launch.cpp asks of a machine. machine.cu asks the CUDA runtime, tests/cuda/machine.cpp the
// simulator; nothing else differs between the two.
//
// "The device" is the current one. Whatever fails throws std::runtime_error. Nothing waits for the
// device, and all of it works while a CUDA graph is being captured.
#pragma once
#include "kernel.h"

namespace rnnkern::cuda::machine {

using Stream = void*;  // a cudaStream_t

struct Device {
  int capability;  // ten times the compute capability
  int multiprocessors;
  int shared;  // bytes of shared memory that a block can have
};
Device device();

// Of kCluster how many clusters of so many blocks, of the others how many blocks the device can run
// at once; 0: none.
int resident(const Kernel& kernel, int blocks);

// Run the kernel on a grid of (x, y) blocks: in clusters of so many along x, or, cooperative, all
// of them at once.
void run(const Kernel& kernel, const Scan& scan, int64_t x, int64_t y, int cluster,
         bool cooperative, Stream stream);

// All bits of `height` rows of `width` bytes, each `pitch` bytes after the last.
void fill_with_ones(void* to, int64_t pitch, int64_t width, int64_t height, Stream stream);

// Scan::table, of the steps' batch sizes in the host's memory, which may change on return.
void write_table(int64_t* table, const int64_t* sizes, int64_t steps, Stream stream);

}  // namespace rnnkern::cuda::machine
