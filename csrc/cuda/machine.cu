// machine.h by the CUDA runtime.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "machine.h"

namespace rnnkern::cuda::machine {
namespace {

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call of anybody would find it
  throw std::runtime_error(std::string("rnnkern: CUDA, ") + doing + ": " +
                           cudaGetErrorString(error));
}

int current() {
  int index = 0;
  check(cudaGetDevice(&index), "looking for the device");
  return index;
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "asking the device");
  return value;
}

const void* function(const Kernel& kernel) {
  return reinterpret_cast<const void*>(kernel.function);
}

// Bytes of shared memory to ask for. Of a block of a team more than half of a multiprocessor's, if
// it may be: where two blocks share one, all others of both teams wait for them.
int shared_of(const Kernel& kernel) {
  constexpr int kAlone = 116 * 1024;
  return is_team(kernel.regime) ? std::max(kernel.shared, std::min(kAlone, device().shared))
                                : kernel.shared;
}

int ask_resident(const Kernel& kernel, int blocks) {
  const void* f = function(kernel);
  const int shared = shared_of(kernel);
  check(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "asking for shared memory");
  int count = 0;
  if (kernel.regime != Regime::kCluster) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, f, kernel.threads, shared),
          "asking for a kernel's occupancy");
    return count * device().multiprocessors;
  }
  check(cudaFuncSetAttribute(f, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "asking for large clusters");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, f, &config);
  if (error == cudaErrorInvalidClusterSize) {
    cudaGetLastError();
    return 0;
  }
  check(error, "asking for a kernel's clusters");
  return count;
}

// The sizes of some steps, in a kernel's parameters (4 KiB at most): so they are in a captured
// graph too, and no copy of the host's memory has to be kept for it.
constexpr int kSizes = 960;
struct Sizes {
  int64_t* table;
  int64_t steps, begin, first_row;
  int count;
  int32_t size[kSizes];
};

__global__ void table_kernel(const __grid_constant__ Sizes p) {
  const int i = threadIdx.x;
  if (i >= p.count) return;
  int64_t first_row = p.first_row;
  for (int j = 0; j < i; ++j) first_row += p.size[j];
  p.table[p.begin + i] = p.size[i];
  p.table[p.steps + p.begin + i] = first_row;
}

}  // namespace

Device device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const int index = current();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  return known[index] = {10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                             attribute(cudaDevAttrComputeCapabilityMinor, index),
                         attribute(cudaDevAttrMultiProcessorCount, index),
                         attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

int resident(const Kernel& kernel, int blocks) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> known;
  const auto key = std::make_tuple(function(kernel), blocks, current());
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = ask_resident(kernel, blocks);
}

void run(const Kernel& kernel, const Scan& scan, int64_t x, int64_t y, int cluster,
         bool cooperative, Stream stream) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = shared_of(kernel);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (cluster > 0) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = cluster;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (cooperative) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  Scan copy = scan;
  void* arguments[] = {&copy};
  check(cudaLaunchKernelExC(&config, function(kernel), arguments), "launching a scan");
}

void fill_with_ones(void* to, int64_t pitch, int64_t width, int64_t height, Stream stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  check(pitch == width ? cudaMemsetAsync(to, 0xff, width * height, s)
                       : cudaMemset2DAsync(to, pitch, 0xff, width, height, s),
        "filling a scan's output");
}

void write_table(int64_t* table, const int64_t* sizes, int64_t steps, Stream stream) {
  Sizes p;
  p.table = table;
  p.steps = steps;
  p.first_row = 0;
  for (p.begin = 0; p.begin < steps; p.begin += p.count) {
    p.count = static_cast<int>(std::min<int64_t>(kSizes, steps - p.begin));
    int64_t rows = 0;
    for (int i = 0; i < p.count; ++i) {
      p.size[i] = static_cast<int32_t>(sizes[p.begin + i]);
      rows += sizes[p.begin + i];
    }
    table_kernel<<<1, (p.count + 31) / 32 * 32, 0, static_cast<cudaStream_t>(stream)>>>(p);
    check(cudaGetLastError(), "writing the steps of packed rows");
    p.first_row += rows;
  }
}

}  // namespace rnnkern::cuda::machine
