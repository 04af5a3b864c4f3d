// csrc/cuda/machine.h by the simulator: kernels run on the host, to their end, before run()
// returns.
//
// RNNKERN_SIMULATED_GPU=MULTIPROCESSORS is how large a machine it is, 132 unless it is set, and
// RNNKERN_SIMULATED_CAPABILITY ten times its compute capability, 90 unless it is set;
// RNNKERN_SIMULATED_SHARED the KiB of shared memory that a block may have, 227 unless it is set.
#include "../../csrc/cuda/machine.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simulator.h"

namespace rnnkern::cuda::machine {
namespace {

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

}  // namespace

Device device() {
  return {setting("RNNKERN_SIMULATED_CAPABILITY", 90), setting("RNNKERN_SIMULATED_GPU", 132),
          setting("RNNKERN_SIMULATED_SHARED", 227) * 1024};
}

int resident(const Kernel& kernel, int blocks) {
  const int blocks_at_once = device().multiprocessors;  // one each
  return kernel.regime == Regime::kCluster ? blocks_at_once / blocks : blocks_at_once;
}

void run(const Kernel& kernel, const Scan& scan, int64_t x, int64_t y, int cluster,
         bool cooperative, Stream) {
  static unsigned seed = 0;
  simulator::Launch launch;
  launch.grid_x = static_cast<int>(x);
  launch.grid_y = static_cast<int>(y);
  if (cluster > 0) launch.cluster = cluster;
  launch.threads = kernel.threads;
  launch.shared = kernel.shared;
  launch.cooperative = cooperative;
  const std::string wrong = simulator::simulate(launch, ++seed, [&] { kernel.function(scan); });
  if (!wrong.empty()) throw std::runtime_error("rnnkern: the simulator says: " + wrong);
}

void fill_with_ones(void* to, int64_t pitch, int64_t width, int64_t height, Stream) {
  for (int64_t i = 0; i < height; ++i) std::memset(static_cast<char*>(to) + i * pitch, 0xff, width);
}

void write_table(int64_t* table, const int64_t* sizes, int64_t steps, Stream) {
  int64_t first_row = 0;
  for (int64_t t = 0; t < steps; ++t) {
    table[t] = sizes[t];
    table[steps + t] = first_row;
    first_row += sizes[t];
  }
}

}  // namespace rnnkern::cuda::machine
