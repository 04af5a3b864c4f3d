// The costs that a step of the CUDA kernels is made of, in cycles of the GPU at hand: what the
// launcher's model (csrc/cuda/launch.h) is fitted to. One line of JSON each. No torch:
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc/cuda bench/gpu_micro.cu -o
//   micro
//
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "device.cuh"

namespace {

using namespace rnnkern::cuda;

constexpr int kMostBlocks = 132;
long long* cycles;  // of each block

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("{\"error\": \"%s: %s\"}\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Of the blocks, the middle one's.
double median_cycles(int blocks) {
  check(cudaDeviceSynchronize(), "a kernel");
  std::vector<long long> all(blocks);
  check(cudaMemcpy(all.data(), cycles, blocks * sizeof(long long), cudaMemcpyDeviceToHost), "copy");
  std::nth_element(all.begin(), all.begin() + blocks / 2, all.end());
  return static_cast<double>(all[blocks / 2]);
}

void put(const char* name, const std::string& about, double value) {
  std::printf("{\"micro\": \"%s\", %s, \"cycles\": %.2f}\n", name, about.c_str(), value);
  std::fflush(stdout);
}
std::string number_of(const char* name, int value) {
  return "\"" + std::string(name) + "\": " + std::to_string(value);
}

// ---- products: of one chain each waits for the one before, of several it need not ----

template <class Element, int chains>
__global__ void product_kernel(long long* out, int times, float* sink) {
  const uint32_t a[4] = {thread() & 1u, 1, 2, 3};
  float d[chains][4] = {};
  const long long start = clock64();
  for (int i = 0; i < times; ++i) {
    RNNKERN_UNROLL
    for (int c = 0; c < chains; ++c) multiply(Element{}, d[c], a, i, c);
  }
  if (thread() == 0) out[block_x()] = clock64() - start;
  RNNKERN_UNROLL
  for (int c = 0; c < chains; ++c) *sink += d[c][0] + d[c][1] + d[c][2] + d[c][3];
}

template <class Element, int chains>
void products(const char* name, float* sink) {
  for (const int warps : {1, 4, 8}) {
    product_kernel<Element, chains><<<1, 32 * warps>>>(cycles, 4096, sink);
    put(name, number_of("warps", warps) + ", " + number_of("chains", chains),
        median_cycles(1) / (4096 * chains));
  }
}

template <int columns>
__global__ void wgmma_kernel(long long* out, int times, float* sink) {
  const uint32_t a[4] = {thread() & 1u, 1, 2, 3};
  const uint64_t b = wgmma_operand(uniform(shared_base()));
  float d[2][columns / 2];
  const long long start = clock64();
  for (int i = 0; i < times; ++i) {
    wgmma_fence();
    RNNKERN_UNROLL
    for (int k = 0; k < 32; ++k) {
      wgmma(BFloat16{}, d[k & 1], a, wgmma_operand_on(b, (k & 3) * 32), i > 0 || k > 1);
    }
    wgmma_commit();
    wgmma_wait();
  }
  if (thread() == 0) out[block_x()] = clock64() - start;
  RNNKERN_UNROLL
  for (int i = 0; i < columns / 2; ++i) *sink += d[0][i] + d[1][i];
}

template <int columns>
void wgmmas(float* sink) {
  for (const int warpgroups : {1, 2, 4}) {
    wgmma_kernel<columns><<<1, 128 * warpgroups, 8192>>>(cycles, 64, sink);
    put("wgmma", number_of("columns", columns) + ", " + number_of("warpgroups", warpgroups),
        median_cycles(1) / (64 * 32));
  }
}

// ---- clusters ----

// The exchange of cluster.cuh without its products: each block sends so many chunks of 16 bytes to
// all.
__global__ void all_gather_kernel(long long* out, int blocks, int chunks, int times) {
  const uint32_t base = shared_base(), bytes = blocks * chunks * 16;
  const int rank = cluster_rank();
  constexpr int kBuffer = 96 * 1024;
  if (thread() == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(base + 8 * i, 1);
    barrier_init_fence();
    for (int i = 0; i < 2; ++i) barrier_expect(base + 8 * i, bytes);
  }
  cluster_sync();
  const long long start = clock64();
  for (int t = 0; t < times; ++t) {
    const uint32_t barrier = 8 * (t & 1), at = 1024 + (t & 1) * kBuffer + rank * chunks * 16;
    for (int i = thread(); i < chunks * blocks; i += blockDim.x) {
      const uint32_t peer = shared_of(base, i / chunks), word = t;
      send(peer + at + i % chunks * 16, {word, word, word, word}, peer + barrier);
    }
    barrier_wait(base + barrier, (t >> 1) & 1);
    if (thread() == 0) barrier_expect(base + barrier, bytes);
    block_sync();
  }
  if (thread() == 0) out[block_x()] = clock64() - start;
  // Both barriers wait for a phase that does not come: nothing is under way.
  cluster_sync();
}

__global__ void cluster_sync_kernel(long long* out, int times) {
  cluster_sync();
  const long long start = clock64();
  for (int t = 0; t < times; ++t) cluster_sync();
  if (thread() == 0) out[block_x()] = clock64() - start;
}

// A cluster's launch; how many the GPU runs at once, 0 if none (then it does not launch).
template <class... Arguments>
int launch_cluster(void (*kernel)(Arguments...), int blocks, int shared, Arguments... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "shared");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int at_once = 0;
  check(cudaOccupancyMaxActiveClusters(&at_once, kernel, &config), "occupancy");
  if (at_once > 0) check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
  return at_once;
}

void clusters() {
  for (const int blocks : {2, 4, 8, 12, 16}) {
    const int times = 1000;
    int at_once = launch_cluster(cluster_sync_kernel, blocks, 1024, cycles, times);
    if (at_once == 0) continue;
    put("cluster_sync", number_of("blocks", blocks) + ", " + number_of("at_once", at_once),
        median_cycles(blocks) / times);
    for (const int chunks : {1, 8, 32, 64, 128, 256}) {
      if (blocks * chunks * 16 > 96 * 1024) continue;
      at_once = launch_cluster(all_gather_kernel, blocks, 1024 + 2 * 96 * 1024, cycles, blocks,
                               chunks, times);
      if (at_once == 0) continue;
      put("cluster_all_gather",
          number_of("blocks", blocks) + ", " + number_of("chunks", chunks) + ", " +
              number_of("at_once", at_once),
          median_cycles(blocks) / times);
    }
  }
}

// ---- through the level 2 cache ----

__device__ uint32_t wait_for(const char* word, uint32_t value) {
  Words4 v;
  do {
    v = load_relaxed4(word);
  } while (v.x != value);
  return v.x;
}

// Two blocks in turn: a word there, a word back.
__global__ void ping_pong_kernel(long long* out, char* words, int times) {
  const long long start = clock64();
  for (int t = 1; t <= times; ++t) {
    if (block_x() == 0) {
      store_relaxed(words, t);
      wait_for(words + 256, t);
    } else {
      wait_for(words, t);
      store_relaxed(words + 256, t);
    }
  }
  out[block_x()] = clock64() - start;
}

// The exchange of grid.cuh without its products: each block writes so many bytes, and gathers all.
__global__ void mailbox_kernel(long long* out, char* memory, int bytes, int times) {
  const size_t round = static_cast<size_t>(blocks_x()) * bytes;
  uint32_t sum = 0;
  const long long start = clock64();
  for (int t = 0; t < times; ++t) {
    char* at = memory + t * round;
    for (int i = thread() * 4; i < bytes; i += blockDim.x * 4) {
      store_relaxed(at + block_x() * bytes + i, t);
    }
    for (size_t i = thread() * 16; i < round; i += blockDim.x * 16) {
      Words4 v;
      do {
        v = load_relaxed4(at + i);
      } while (v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u);
      sum += v.x;
    }
    block_sync();
  }
  if (thread() == 0) out[block_x()] = clock64() - start + (sum == 1);
}

__global__ void grid_sync_kernel(long long* out, int times) {
  const auto grid = cooperative_groups::this_grid();
  const long long start = clock64();
  for (int t = 0; t < times; ++t) grid.sync();
  if (thread() == 0) out[block_x()] = clock64() - start;
}

template <class... Arguments>
void launch_grid(void (*kernel)(Arguments...), int blocks, int threads, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(blocks), dim3(threads),
                                    pointers, 0, 0),
        "launch");
}

void grids(int most) {
  char* memory;
  const size_t size = 256u << 20;
  check(cudaMalloc(&memory, size), "memory");
  check(cudaMemset(memory, 0, 4096), "memory");
  launch_grid(ping_pong_kernel, 2, 1, cycles, memory, 2000);
  put("level2_one_way", number_of("blocks", 2), median_cycles(2) / 4000);
  for (const int blocks : {16, 32, 64, 128}) {
    if (blocks > most) continue;
    for (const int bytes : {64, 256, 1024}) {
      const int times = 500;
      check(cudaMemset(memory, 0xff, size), "memory");
      launch_grid(mailbox_kernel, blocks, 256, cycles, memory, bytes, times);
      put("level2_all_gather", number_of("blocks", blocks) + ", " + number_of("bytes", bytes),
          median_cycles(blocks) / times);
    }
  }
  for (const int blocks : {16, 64, 132}) {
    if (blocks > most) continue;
    launch_grid(grid_sync_kernel, blocks, 256, cycles, 1000);
    put("grid_sync", number_of("blocks", blocks), median_cycles(blocks) / 1000);
  }
  check(cudaFree(memory), "memory");
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "a GPU");
  std::printf("{\"device\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d}\n",
              properties.name, properties.major, properties.minor, properties.multiProcessorCount);
  float* sink;
  check(cudaMalloc(&cycles, kMostBlocks * sizeof(long long)), "memory");
  check(cudaMalloc(&sink, sizeof(float)), "memory");
  products<BFloat16, 1>("multiply_bfloat16", sink);
  products<BFloat16, 8>("multiply_bfloat16", sink);
  products<Tf32, 1>("multiply_tf32", sink);
  products<Tf32, 8>("multiply_tf32", sink);
  wgmmas<16>(sink);
  wgmmas<32>(sink);
  clusters();
  grids(properties.multiProcessorCount);
}
