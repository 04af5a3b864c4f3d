#include "launch.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <limits>
#include <map>
#include <stdexcept>
#include <tuple>
#include <type_traits>

namespace rnnkern::cuda {
namespace {

// What a step costs, in cycles of a multiprocessor. Fitted to what single instructions, exchanges
// and whole scans took on an H100 (bench/gpu_micro.cu, bench/gpu.py). Of two of a warp or a block,
// the first is bfloat16's, whose tanh is one instruction.
struct Costs {
  double product = 25;                          // until the result of one is there
  double products[4] = {1057, 1057, 528, 176};  // multiply-adds a cycle, of mma.sync
  double wgmma[2] = {1150, 2040};               // of 16 rows, of 32
  double shared_bytes = 128;                    // a cycle
  double warp_product = 12.8, warp_result[2] = {8, 22}, warp_rest[2] = {10, 70};
  double block_rest[2] = {110, 180}, block_read = 0.4;
  double functions = 16, result[2] = {1, 3};  // special functions: a cycle; of a result
  double fma_rest = 170, fma_unit = 2.3, fma = 64, fma_result = 60;
  double cluster_rest = 900, cluster_wide = 600;  // of more than 8 rows
  double cluster_bytes[2] = {25, 18.7};           // a cycle; of more than 8 rows
  double grid_rest = 1300, grid_word = 1.3, grid_split = 2.6, grid_wide = 1400;
  double grid_bytes = 50, grid_wide_bytes[2] = {13, 26};
  // Of Triton's kernels of single steps: what one takes at least, or its launch; and 64 units and
  // 256 bytes of the depth of 16, 32 or 64 rows. And of float32's products by cuBLAS.
  double step = 2500, step_launch = 12000, step_tile[3] = {540, 640, 950};
  double blas = 12000, blas_depth = 20, blas_flops = 17700;
  double start[5] = {4000, 4500, 8000, 14000, 4500};  // of a launch; of kGrid with its fill
  double product_start = 8000, memory_bytes = 1900;   // of x_proj: its launches; bytes a cycle
};
constexpr Costs kCosts;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// busy: how many blocks share a multiprocessor.
double step_cycles(const Kernel& k, int tile_rows, double busy) {
  const Costs& c = kCosts;
  const int bytes = element_bytes(k.precision), depth = 32 / bytes;
  const bool exact = k.precision != Precision::kBFloat16, wide = k.rows > 8;
  const int passes = k.precision == Precision::kTf32x3 ? 3 : 1;
  // A kernel multiplies for all the rows and units that it could have, whether they are there or
  // not.
  const double units = is_team(k.regime) ? k.units : k.hidden;
  // x is a product more.
  const double deep = k.recurrence == Recurrence::kLayer ? k.hidden + depth : k.hidden;
  const double throughput =
      k.hopper ? c.wgmma[k.rows > 16] : c.products[static_cast<int>(k.precision)];
  const double multiply = units * deep * k.rows / throughput;
  const double state_bytes = static_cast<double>(k.hidden) * tile_rows * bytes;
  switch (k.regime) {
    case Regime::kWarp: {
      const double products = units / 8 * (deep / depth) * passes;
      const double results = units / 8 * (tile_rows > 8 ? 4 : 2);  // of each lane
      return products * c.warp_product + results * c.warp_result[exact] + c.warp_rest[exact];
    }
    case Regime::kBlock: {
      // Two chains of sums. Each of hidden / 16 warps reads all of the state, in two parts if
      // split.
      const double chain = deep / depth * c.product * passes / 2;
      const double read = c.block_read * units / 16 * units * k.rows * bytes *
                          (passes > 1 ? 2 : 1) / c.shared_bytes;
      const double finish = units * k.rows * c.result[exact] / c.functions * busy;
      return c.block_rest[exact] + std::max((multiply + read) * busy, chain + read) + finish;
    }
    case Regime::kFma: {
      const int rows = tile_rows > 2 ? 4 : tile_rows;
      const double row = units * units / std::min(c.fma, k.threads / 2.0);
      const double more_results = std::max(1.0, rows * units / k.threads) - 1;
      return c.fma_rest + c.fma_unit * units + (rows * busy - 1) * row +
             more_results * c.fma_result;
    }
    case Regime::kCluster:
      return c.cluster_rest + multiply + (wide ? c.cluster_wide : 0) +
             state_bytes / c.cluster_bytes[wide];
    case Regime::kGrid:
      break;
  }
  // A product of 3 splits its factors anew; what of W is not in registers is read.
  const double rest =
      c.grid_rest + c.grid_word * k.hidden * bytes / 4 * (passes > 1 ? c.grid_split : 1);
  const double registers = 128 * 1024, weight = units * k.hidden * bytes;
  const double read = std::max(0.0, weight - registers) / c.shared_bytes;
  const double rate = wide ? c.grid_wide_bytes[passes > 1] : c.grid_bytes;
  return rest + read + multiply + (wide && passes == 1 ? c.grid_wide : 0) + state_bytes / rate;
}

// Of x_proj.
double product_cycles(const Scan& scan, Precision precision) {
  const double bytes = static_cast<double>(scan.steps) * scan.batch * scan.groups * scan.hidden *
                       element_bytes(precision);
  return kCosts.product_start + bytes / kCosts.memory_bytes;
}

// The plan of a kernel that can serve the scan, with tiles of so many rows or, of 0, as many as
// spread them over all that can run at once; without a kernel where it does not fit the device.
Plan plan_of(const Kernel& k, const Scan& scan, const machine::Device& device, int tile_rows = 0) {
  Plan plan;
  if (!k.runs_on(device.capability) || k.shared > device.shared) return plan;
  const bool by_team = is_team(k.regime);
  plan.blocks = blocks_of_tile(k.regime, scan.hidden, k.units);
  int64_t at_once = machine::resident(k, plan.blocks);  // tiles
  if (k.regime == Regime::kGrid) at_once /= plan.blocks;
  if (at_once == 0) return plan;
  plan.kernel = &k;
  // The fewer in a tile, the less there is to exchange.
  const int64_t places = by_team ? at_once : device.multiprocessors;
  const int64_t each = std::max<int64_t>(1, places / scan.groups);
  const int64_t rows = tile_rows ? tile_rows : ceil_divide(scan.batch, each);
  plan.tile_rows = static_cast<int>(std::clamp<int64_t>(rows, 1, k.rows));
  plan.tiles = ceil_divide(scan.batch, plan.tile_rows);
  const int64_t tiles = plan.tiles * scan.groups;
  const double turns = static_cast<double>(ceil_divide(tiles, at_once));
  const int64_t busy = ceil_divide(std::min(tiles, at_once), device.multiprocessors);
  plan.cycles = kCosts.start[static_cast<int>(k.regime)] +
                turns * static_cast<double>(scan.steps) *
                    step_cycles(k, plan.tile_rows, static_cast<double>(busy));
  if (k.recurrence != scan.recurrence) plan.cycles += product_cycles(scan, k.precision);
  return plan;
}

bool computes(const Kernel& k, Recurrence recurrence) {
  return k.recurrence == recurrence ||
         (k.recurrence == Recurrence::kForward && recurrence == Recurrence::kLayer);
}

bool serves(const Kernel& k, const Scan& scan) {
  const bool any = k.activation == kAnyActivation;
  return computes(k, scan.recurrence) && k.hidden >= scan.hidden &&
         (any || k.activation == static_cast<int>(scan.activation));
}

std::string refusal(const Scan& scan, Precision precision, const machine::Device& device) {
  const Regime* forced = forced_regime();
  int most = 0, fitting = 0;
  for (const Kernel& k : kernels(precision)) {
    if (!computes(k, scan.recurrence) || (forced && k.regime != *forced)) continue;
    most = std::max(most, k.hidden);
    Scan largest = scan;
    largest.hidden = k.hidden;
    if (plan_of(k, largest, device).kernel) fitting = std::max(fitting, k.hidden);
  }
  std::string why = "it has no kernel for H = " + std::to_string(scan.hidden) + " in " +
                    kPrecisionNames[static_cast<int>(precision)];
  if (forced) {
    why += std::string(" in the regime that RNNKERN_CUDA_REGIME names, ") +
           kRegimeNames[static_cast<int>(*forced)];
  }
  why += "; the largest is " + std::to_string(most);
  if (fitting < most) {
    why += ", and " + std::to_string(fitting) + " on this GPU (" +
           std::to_string(device.multiprocessors) + " multiprocessors)";
  }
  return why;
}

}  // namespace

const Regime* forced_regime() {
  static constexpr Regime kRegimes[] = {Regime::kWarp, Regime::kBlock, Regime::kCluster,
                                        Regime::kGrid, Regime::kFma};
  const char* name = std::getenv("RNNKERN_CUDA_REGIME");
  if (name == nullptr || *name == '\0') return nullptr;
  for (const Regime& regime : kRegimes) {
    if (kRegimeNames[static_cast<int>(regime)] == std::string(name)) return &regime;
  }
  throw std::runtime_error(
      std::string(
          "rnnkern: expected RNNKERN_CUDA_REGIME to be warp, block, cluster, grid or fma, got ") +
      name);
}

const std::vector<Kernel>& kernels(Precision precision) {
  static const auto tables = [] {
    std::vector<std::vector<Kernel>> all(4);
    const auto add = [&](const std::vector<Kernel>& some) {
      for (const Kernel& k : some) all[static_cast<int>(k.precision)].push_back(k);
    };
#define RNNKERN_ADD(PRECISION)                             \
  add(compiled<Regime::kWarp, Precision::PRECISION>());    \
  add(compiled<Regime::kBlock, Precision::PRECISION>());   \
  add(compiled<Regime::kCluster, Precision::PRECISION>()); \
  add(compiled<Regime::kGrid, Precision::PRECISION>());
    RNNKERN_ADD(kBFloat16)
    RNNKERN_ADD(kHalf)
    RNNKERN_ADD(kTf32)
    RNNKERN_ADD(kTf32x3)
#undef RNNKERN_ADD
    // More accurate than was asked for.
    for (const Kernel& k : compiled<Regime::kFma, Precision::kTf32x3>()) {
      all[static_cast<int>(Precision::kTf32)].push_back(k);
      all[static_cast<int>(Precision::kTf32x3)].push_back(k);
    }
    return all;
  }();
  return tables[static_cast<int>(precision)];
}

namespace {

Plan weigh(const Scan& scan, Precision precision, const machine::Device& device,
           const Regime* forced) {
  Plan best;
  if (device.capability < 80) {
    best.refusal = "it needs a GPU of compute capability 8.0 or more, this one has " +
                   std::to_string(device.capability / 10) + "." +
                   std::to_string(device.capability % 10);
    return best;
  }
  for (const Kernel& k : kernels(precision)) {
    if (!serves(k, scan) || (forced && k.regime != *forced)) continue;
    Plan plan = plan_of(k, scan, device);
    if (!plan.kernel) continue;
    if (k.regime == Regime::kFma) {
      // Several blocks may share a multiprocessor, or one take more rows: whichever is cheaper.
      for (const int rows : {1, 2}) {
        const Plan other = plan_of(k, scan, device, rows);
        if (other.cycles < plan.cycles) plan = other;
      }
    }
    // Of two equals, that which is compiled for the activation.
    const bool equal = best.kernel && plan.cycles == best.cycles;
    if (!best.kernel || plan.cycles < best.cycles ||
        (equal && best.kernel->activation == kAnyActivation)) {
      best = plan;
    }
  }
  if (!best.kernel) best.refusal = refusal(scan, precision, device);
  return best;
}

}  // namespace

Plan make_plan(const Scan& scan, Precision precision) {
  // A program asks for the same few again and again, and to weigh all kernels takes longer than to
  // launch one.
  const machine::Device device = machine::device();
  const Regime* forced = forced_regime();
  const auto asked = std::make_tuple(precision, scan.recurrence, scan.activation, scan.steps,
                                     scan.batch, scan.hidden, scan.groups, device.capability,
                                     device.multiprocessors, device.shared, forced);
  static thread_local std::map<std::decay_t<decltype(asked)>, Plan> known;
  if (known.size() > 1000) known.clear();  // lengths that never come again
  const auto found = known.find(asked);
  if (found != known.end()) return found->second;
  return known[asked] = weigh(scan, precision, device, forced);
}

double cycles_step_by_step(const Scan& scan, Precision precision) {
  const Costs& c = kCosts;
  // Below, Triton's kernels are others.
  const int least = precision == Precision::kTf32x3 ? 512
                    : precision == Precision::kTf32 ? 129
                                                    : 257;
  if (scan.hidden < least) return std::numeric_limits<double>::infinity();
  double step = 0;
  if (precision == Precision::kTf32x3) {
    const double flops = 2.0 * scan.batch * scan.hidden * scan.hidden * scan.groups;
    step = c.blas + std::max(c.blas_depth * scan.hidden, flops / c.blas_flops);
  } else {
    const int64_t multiprocessors = machine::device().multiprocessors;
    const int64_t bands = ceil_divide(scan.hidden, 64) * scan.groups;
    int i = 0;  // as in rnnkern/backends/triton.py: the fewest rows that let all run at once
    while (i < 2 && bands * ceil_divide(scan.batch, 16 << i) > multiprocessors) ++i;
    const double turns =
        static_cast<double>(ceil_divide(bands * ceil_divide(scan.batch, 16 << i), multiprocessors));
    const double deep = static_cast<double>(scan.hidden) * element_bytes(precision) / 256;
    step = std::max(c.step + turns * deep * c.step_tile[i], c.step_launch);
  }
  const double product =
      scan.recurrence == Recurrence::kLayer ? product_cycles(scan, precision) : 0;
  return product + static_cast<double>(scan.steps) * step;
}

void launch(const Plan& plan, Scan scan, int64_t rows, const std::vector<bool>& reverse,
            machine::Stream stream) {
  const Kernel& k = *plan.kernel;
  const int64_t bytes = element_bytes(k.precision);
  scan.tile_rows = plan.tile_rows;
  if (plan.tiles * plan.blocks > INT_MAX) {
    throw std::runtime_error("rnnkern: the CUDA kernels expect a batch of fewer rows, got " +
                             std::to_string(scan.batch));
  }
  for (int64_t begin = 0; begin < static_cast<int64_t>(reverse.size()); begin += kMostGroups) {
    Scan part = scan;
    part.groups = static_cast<int>(std::min<int64_t>(kMostGroups, reverse.size() - begin));
    const auto advance = [&](const void* p, int64_t elements) {
      return p ? static_cast<const char*>(p) + elements * bytes : nullptr;
    };
    const auto columns = [&](const void* p) { return advance(p, begin * scan.hidden); };
    const auto states = [&](const void* p) { return advance(p, begin * scan.batch * scan.hidden); };
    part.input = k.recurrence == Recurrence::kLayer ? scan.input : columns(scan.input);
    part.aux = columns(scan.aux);
    part.initial = states(scan.initial);
    part.entry = states(scan.entry);
    part.output = const_cast<char*>(columns(scan.output));
    part.last = const_cast<char*>(states(scan.last));
    for (auto matrices : {&Scan::weight, &Scan::weight_ih, &Scan::bias_ih, &Scan::bias_hh}) {
      Matrices& m = part.*matrices;
      m.at = advance(m.at, begin * m.stride_g);
    }
    std::fill(std::begin(part.reverse), std::end(part.reverse), 0);
    for (int g = 0; g < part.groups; ++g) {
      if (reverse[begin + g]) part.reverse[g / 32] |= 1u << g % 32;
    }
    if (k.regime != Regime::kGrid) {
      const int cluster = k.regime == Regime::kCluster ? plan.blocks : 0;
      machine::run(k, part, plan.tiles * plan.blocks, part.groups, cluster, false, stream);
      continue;
    }
    machine::fill_with_ones(part.output, scan.row_stride * bytes, part.groups * scan.hidden * bytes,
                            rows, stream);
    const int64_t teams = std::min<int64_t>(machine::resident(k, plan.blocks) / plan.blocks,
                                            plan.tiles * part.groups);
    machine::run(k, part, teams * plan.blocks, 1, 0, true, stream);
  }
}

}  // namespace rnnkern::cuda
