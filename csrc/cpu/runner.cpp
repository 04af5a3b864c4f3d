#include "runner.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <string>

namespace rnnkern::cpu {
namespace {

// Work below which waking another thread does not pay.
constexpr double kFlopsPerThread = 5e5;
constexpr int64_t kElementsPerPackTask = 65536;

// What lies one after another in one allocation: the packed weights, the tasks' states.
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

DType parse_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return DType::kDouble;
    case at::kFloat:
      return DType::kFloat;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK_TYPE(
          false, "rnnkern on the CPU computes float64, float32, bfloat16 and float16, got ", dtype);
  }
}

// at::parallel_for, but without its bookkeeping where there is nothing to share out.
template <class F>
void for_each_range(int64_t count, int64_t grain, const F& f) {
  if (count <= grain || at::get_num_threads() == 1) {
    f(0, count);
  } else {
    at::parallel_for(0, count, grain, f);
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
#ifdef __x86_64__
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return &kAvx512Kernels;
    if (capability == "AVX2") return &kAvx2Kernels;
#endif
    return &kDefaultKernels;
  }();
  return *chosen;
}

Steps::Steps(const Tensor& x, const OptTensor& batch_sizes, const OptTensor& initial) {
  if (!batch_sizes) {
    count = x.size(0);
    batch = x.size(1);
    rows = count * batch;
    return;
  }
  const Tensor contiguous = batch_sizes->contiguous();
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  count = batch_sizes->numel();
  sizes.assign(data, data + count);
  batch = count > 0 ? sizes[0] : initial ? initial->size(1) : 0;
  rows = 0;
  for (int64_t t = 0; t < count; ++t) {
    TORCH_CHECK_VALUE(sizes[t] >= 1 && (t == 0 || sizes[t] <= sizes[t - 1]),
                      "rnnkern: expected batch_sizes to be positive and non-increasing, got ",
                      sizes[t], " at step ", t, " after ", sizes[std::max<int64_t>(t - 1, 0)]);
  }
  for (const int64_t size : sizes) {
    offsets.push_back(rows);
    // Before it is added: a sum of absurd sizes could wrap round to the right one.
    TORCH_CHECK_VALUE(size <= x.size(0) - rows, "rnnkern: expected batch_sizes to add up to the ",
                      x.size(0), " packed rows, got more");
    rows += size;
  }
  TORCH_CHECK_VALUE(rows == x.size(0), "rnnkern: expected batch_sizes to add up to the ", x.size(0),
                    " packed rows, got ", rows);
  TORCH_CHECK_VALUE(!initial || initial->size(1) == batch,
                    "rnnkern: expected an initial state for batch_sizes[0] = ", batch,
                    " rows, got ", initial ? initial->size(1) : 0);
}

int64_t Steps::length(int64_t b) const {
  if (!packed()) return count;
  return std::partition_point(sizes.begin(), sizes.end(), [b](int64_t n) { return n > b; }) -
         sizes.begin();
}

std::vector<int64_t> Steps::split(int64_t parts) const {
  std::vector<int64_t> bounds(parts + 1, batch);
  bounds[0] = 0;
  if (!packed()) {
    for (int64_t i = 1; i < parts; ++i) bounds[i] = batch * i / parts;
    return bounds;
  }
  int64_t done = 0, part = 1;
  for (int64_t b = 0; b < batch && part < parts; ++b) {
    done += length(b);
    while (part < parts && done * parts >= rows * part) bounds[part++] = b + 1;
  }
  return bounds;
}

std::unique_ptr<bool[]> flag_array(Flags reverse, bool flipped) {
  auto flags = std::make_unique<bool[]>(reverse.size());
  for (size_t g = 0; g < reverse.size(); ++g) flags[g] = (reverse[g] != 0) != flipped;
  return flags;
}

ScanParams make_params(Recurrence recurrence, const Tensor& x, at::TensorList weight,
                       const bool* reverse) {
  ScanParams p = {};
  p.recurrence = recurrence;
  p.dtype = parse_dtype(x.scalar_type());
  p.hidden = weight[0].size(0);
  // An expanded weight needs no memory of its own; its packed copy's size must not overflow.
  TORCH_CHECK_VALUE(p.hidden <= (int64_t{1} << 28), "rnnkern: expected H of at most 2^28, got ",
                    p.hidden);
  p.groups = static_cast<int64_t>(weight.size());
  p.reverse = reverse;
  return p;
}

void run_scan(ScanParams p, const Steps& steps, at::TensorList weight, bool transposed,
              const LayerInput* input) {
  p.steps = steps.count;
  p.batch = steps.batch;
  p.batch_sizes = steps.packed() ? steps.sizes.data() : nullptr;
  p.offsets = steps.packed() ? steps.offsets.data() : nullptr;
  if (steps.rows == 0 || p.hidden == 0) return;

  // Threads own ranges of rows of one group for all steps, and never meet.
  const Kernels& isa = kernels();
  const double flops = 2.0 * steps.rows * p.groups * p.hidden * p.hidden;
  const int64_t threads =
      std::clamp<int64_t>(static_cast<int64_t>(flops / kFlopsPerThread), 1, at::get_num_threads());
  const int64_t parts = std::clamp<int64_t>((threads + p.groups - 1) / p.groups, 1, steps.batch);
  const std::vector<int64_t> bounds = steps.split(parts);

  const int64_t matrix_bytes = isa.packed_bytes(p.dtype, p.hidden);
  const int64_t input_bytes = input ? isa.input_bytes(p.dtype, p.hidden, p.features) : 0;
  const int64_t input_at = aligned(p.groups * matrix_bytes);
  std::vector<int64_t> state_at = {input_at + aligned(p.groups * input_bytes)};
  for (int64_t task = 0; task < p.groups * parts; ++task) {
    const int64_t rows = bounds[task % parts + 1] - bounds[task % parts];
    state_at.push_back(state_at.back() + aligned(isa.state_bytes(p.dtype, p.hidden, rows)));
  }
  const Tensor memory = at::empty({state_at.back()}, at::TensorOptions().dtype(at::kByte));
  auto* base = memory.mutable_data_ptr<uint8_t>();

  const int64_t panels = isa.panels(p.dtype, p.hidden);
  const int64_t grain = std::max<int64_t>(1, kElementsPerPackTask * panels / (p.hidden * p.hidden));
  for_each_range(p.groups * panels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin / panels, first = begin % panels;
      const int64_t last = std::min(panels, first + end - begin);
      const Tensor& w = weight[group];
      isa.pack(p.dtype,
               {w.const_data_ptr(), w.stride(transposed ? 0 : 1), w.stride(transposed ? 1 : 0)},
               p.hidden, first, last, base + group * matrix_bytes);
      begin += last - first;
    }
  });
  p.panels = base;
  if (input) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const Tensor& w = input->weight[g];
      InputWeights packed = {
          {w.const_data_ptr(), w.stride(1), w.stride(0)}, nullptr, nullptr, p.features};
      Tensor bias_ih, bias_hh;  // alive while they are read
      if (!input->bias_ih.empty()) {
        bias_ih = input->bias_ih[g].contiguous();
        bias_hh = input->bias_hh[g].contiguous();
        packed.bias_ih = bias_ih.const_data_ptr();
        packed.bias_hh = bias_hh.const_data_ptr();
      }
      isa.pack_input(p.dtype, packed, p.hidden, base + input_at + g * input_bytes);
    }
    p.input_panels = base + input_at;
  }

  const int64_t tasks = p.groups * parts;
  for_each_range(tasks, (tasks + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      if (bounds[part] == bounds[part + 1]) continue;
      isa.scan(p, task / parts, bounds[part], bounds[part + 1], base + state_at[task]);
    }
  });
}

}  // namespace rnnkern::cpu
