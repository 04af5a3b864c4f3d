// The ops on the CPU: checks, packing, the split over threads, and the products outside the scan.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "../checks.h"
#include "../rows.h"
#include "scan_params.h"

namespace rnnkern {
namespace {

// Picked once. ATEN_CPU_CAPABILITY=default|avx2|avx512 selects it, as for torch's own kernels.
const cpu::Kernels& kernels() {
  static const cpu::Kernels* const chosen = [] {
#ifdef __x86_64__
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return &cpu::kAvx512Kernels;
    if (capability == "AVX2") return &cpu::kAvx2Kernels;
#endif
    return &cpu::kDefaultKernels;
  }();
  return *chosen;
}

cpu::DType parse_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return cpu::DType::kDouble;
    case at::kFloat:
      return cpu::DType::kFloat;
    case at::kBFloat16:
      return cpu::DType::kBFloat16;
    case at::kHalf:
      return cpu::DType::kHalf;
    default:
      TORCH_CHECK_TYPE(
          false, "rnnkern on the CPU computes float64, float32, bfloat16 and float16, got ", dtype);
  }
}

// The steps of a scan as the kernels read them. A plain batch needs no arrays.
struct Steps {
  int64_t count, batch, rows;
  std::vector<int64_t> sizes, offsets;

  Steps(const Tensor& x, const OptTensor& batch_sizes, const OptTensor& initial) {
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
                        sizes[t], " at step ", t, " after ", t == 0 ? batch : sizes[t - 1]);
      offsets.push_back(rows);
      rows += sizes[t];
    }
    TORCH_CHECK_VALUE(rows == x.size(0), "rnnkern: expected batch_sizes to add up to the ",
                      x.size(0), " packed rows, got ", rows);
    TORCH_CHECK_VALUE(!initial || initial->size(1) == batch,
                      "rnnkern: expected an initial state for batch_sizes[0] = ", batch,
                      " rows, got ", initial ? initial->size(1) : 0);
  }

  const int64_t* sizes_or_null() const { return sizes.empty() ? nullptr : sizes.data(); }
  const int64_t* offsets_or_null() const { return offsets.empty() ? nullptr : offsets.data(); }

  // How many steps row b takes part in.
  int64_t length(int64_t b) const {
    if (sizes.empty()) return count;
    return std::partition_point(sizes.begin(), sizes.end(), [b](int64_t n) { return n > b; }) -
           sizes.begin();
  }

  // The bounds of `parts` ranges of batch rows with about equal numbers of steps in each.
  std::vector<int64_t> split(int64_t parts) const {
    std::vector<int64_t> bounds(parts + 1, batch);
    bounds[0] = 0;
    if (sizes.empty()) {
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
};

const void* pointer(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }
OptTensor contiguous(const OptTensor& t) { return t ? OptTensor(t->contiguous()) : t; }

// About what a thread does in the time that waking it takes.
constexpr double kFlopsPerThread = 5e5;
// Bytes that the tasks' scratch must lie apart.
constexpr int64_t kAlign = 64;

// Runs a scan over contiguous rows. transposed: multiply the state by W rather than by W^T.
void run_scan(cpu::ScanParams p, const Steps& steps, at::TensorList weight, bool transposed) {
  p.steps = steps.count;
  p.batch = steps.batch;
  p.batch_sizes = steps.sizes_or_null();
  p.offsets = steps.offsets_or_null();
  if (steps.rows == 0 || p.hidden == 0) return;

  const cpu::Kernels& isa = kernels();
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  const int64_t packed_bytes = isa.packed_bytes(p.dtype, p.hidden);
  const Tensor packed = at::empty({p.groups * packed_bytes}, bytes);
  auto* packed_data = packed.mutable_data_ptr<uint8_t>();
  const int64_t panels = isa.panels(p.dtype, p.hidden);
  // One task packs about 64 Ki elements.
  const int64_t grain =
      std::max<int64_t>(1, 65536 * panels / std::max<int64_t>(1, p.hidden * p.hidden));
  at::parallel_for(0, p.groups * panels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin / panels, first = begin % panels;
      const int64_t last = std::min(panels, first + end - begin);
      const Tensor& w = weight[group];
      isa.pack(p.dtype,
               {w.const_data_ptr(), w.stride(transposed ? 0 : 1), w.stride(transposed ? 1 : 0)},
               p.hidden, first, last, packed_data + group * packed_bytes);
      begin += last - first;
    }
  });
  p.panels = packed_data;

  // Threads own ranges of rows of one group for all steps, and never meet.
  const double flops = 2.0 * steps.rows * p.groups * p.hidden * p.hidden;
  const int64_t threads =
      std::clamp<int64_t>(static_cast<int64_t>(flops / kFlopsPerThread), 1, at::get_num_threads());
  const int64_t parts = std::clamp<int64_t>((threads + p.groups - 1) / p.groups, 1, steps.batch);
  const std::vector<int64_t> bounds = steps.split(parts);
  std::vector<int64_t> scratch_at = {0};
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t size = isa.state_bytes(p.dtype, p.hidden, bounds[i + 1] - bounds[i]);
    scratch_at.push_back(scratch_at.back() + (size + kAlign - 1) / kAlign * kAlign);
  }
  const Tensor scratch = at::empty({p.groups * scratch_at.back()}, bytes);
  auto* scratch_data = scratch.mutable_data_ptr<uint8_t>();
  const int64_t tasks = p.groups * parts;
  at::parallel_for(0, tasks, (tasks + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / parts, part = task % parts;
      if (bounds[part] == bounds[part + 1]) continue;
      isa.scan(p, group, bounds[part], bounds[part + 1],
               scratch_data + group * scratch_at.back() + scratch_at[part]);
    }
  });
}

cpu::ScanParams params_for(cpu::Recurrence recurrence, const Tensor& x, at::TensorList weight,
                           const bool* reverse) {
  cpu::ScanParams p = {};
  p.recurrence = recurrence;
  p.dtype = parse_dtype(x.scalar_type());
  p.hidden = weight[0].size(0);
  p.groups = static_cast<int64_t>(weight.size());
  p.reverse = reverse;
  return p;
}

// The flags as an array; flipped for the scan that runs backwards through another.
std::unique_ptr<bool[]> flag_array(const Flags& reverse, bool flipped = false) {
  auto flags = std::make_unique<bool[]>(reverse.size());
  for (size_t g = 0; g < reverse.size(); ++g) flags[g] = reverse[g] != flipped;
  return flags;
}

// h_n (G, B, H): each row of h after its last step in scan order, or its initial state if it takes
// no step.
Tensor last_states(const Tensor& h, const OptTensor& h0, const Steps& steps, const bool* reverse,
                   int64_t groups, int64_t hidden) {
  Tensor h_n = at::empty({groups, steps.batch, hidden}, h.options());
  if (steps.count == 0) {
    h0 ? h_n.copy_(*h0) : h_n.zero_();
    return h_n;
  }
  const size_t bytes = hidden * h.element_size();
  const auto* from = static_cast<const char*>(h.const_data_ptr());
  auto* to = static_cast<char*>(h_n.mutable_data_ptr());
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < steps.batch; ++b, to += bytes) {
      const int64_t t = reverse[g] ? 0 : steps.length(b) - 1;
      const int64_t row = (steps.sizes.empty() ? t * steps.batch : steps.offsets[t]) + b;
      std::memcpy(to, from + (row * groups + g) * bytes, bytes);
    }
  }
  return h_n;
}

// The forward scan of contiguous x_proj into h, which may be the same tensor.
Tensor forward_into(Tensor& h, const Tensor& x_proj, const OptTensor& h0, at::TensorList weight,
                    const Steps& steps, const Flags& reverse, c10::string_view nonlinearity) {
  const auto flags = flag_array(reverse);
  const OptTensor initial = contiguous(h0);
  auto p = params_for(cpu::Recurrence::kForward, x_proj, weight, flags.get());
  p.activation = parse_activation(nonlinearity);
  p.input = x_proj.const_data_ptr();
  p.initial = pointer(initial);
  p.output = h.mutable_data_ptr();
  run_scan(p, steps, weight, /*transposed=*/false);
  return last_states(h, initial, steps, flags.get(), p.groups, p.hidden);
}

std::tuple<Tensor, Tensor> rnn_scan_cpu(const Tensor& x_proj, const OptTensor& h0,
                                        at::TensorList weight, const OptTensor& batch_sizes,
                                        Flags reverse, c10::string_view nonlinearity) {
  check_rnn_scan(x_proj, h0, weight, batch_sizes, reverse);
  const Steps steps(x_proj, batch_sizes, h0);
  Tensor h = at::empty(x_proj.sizes(), x_proj.options());
  const Tensor h_n = forward_into(h, x_proj.contiguous(), h0, weight, steps, reverse, nonlinearity);
  return {h, h_n};
}

std::tuple<Tensor, Tensor> rnn_layer_cpu(const Tensor& x, const OptTensor& h0,
                                         at::TensorList weight_ih, at::TensorList weight_hh,
                                         at::TensorList bias_ih, at::TensorList bias_hh,
                                         const OptTensor& batch_sizes, Flags reverse,
                                         c10::string_view nonlinearity) {
  check_rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse);
  const Steps steps(x, batch_sizes, h0);
  const int64_t hidden = weight_hh[0].size(0), groups = static_cast<int64_t>(weight_hh.size());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = groups * hidden;
  // The input product of all steps goes where h will stand, each group's to its own columns.
  Tensor h = at::empty(shape, x.options());
  const Tensor flat_x = x.reshape({steps.rows, x.size(-1)});
  const Tensor flat_h = h.view({steps.rows, groups * hidden});
  for (int64_t g = 0; g < groups; ++g) {
    Tensor columns = groups == 1 ? flat_h : flat_h.narrow(1, g * hidden, hidden);
    if (bias_ih.empty()) {
      at::mm_out(columns, flat_x, weight_ih[g].t());
    } else {
      at::addmm_out(columns, at::add(bias_ih[g], bias_hh[g]), flat_x, weight_ih[g].t());
    }
  }
  const Tensor h_n = forward_into(h, h, h0, weight_hh, steps, reverse, nonlinearity);
  return {h, h_n};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_scan_backward_cpu(
    const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h, const OptTensor& h0,
    at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
    c10::string_view nonlinearity, bool need_weight) {
  check_rnn_scan_backward(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse);
  const Steps steps(h, batch_sizes, h0);
  TORCH_CHECK_VALUE(!grad_h_n || grad_h_n->size(1) == steps.batch,
                    "rnn_scan_backward: expected grad_h_n for ", steps.batch, " rows, got ",
                    grad_h_n ? grad_h_n->size(1) : 0);
  const auto flags = flag_array(reverse, /*flipped=*/true);
  const OptTensor input = contiguous(grad_h), entry = contiguous(grad_h_n);
  const Tensor aux = h.contiguous();
  Tensor v = at::empty(h.sizes(), h.options());
  auto p = params_for(cpu::Recurrence::kBackward, h, weight, flags.get());
  p.activation = parse_activation(nonlinearity);
  p.input = pointer(input);
  p.aux = aux.const_data_ptr();
  p.entry = pointer(entry);
  p.output = v.mutable_data_ptr();
  run_scan(p, steps, weight, /*transposed=*/true);

  const Rows rows(h, weight, batch_sizes, reverse);
  Tensor grad_h0 =
      h0 ? rows.grad_initial(v, weight, steps.count ? OptTensor() : grad_h_n, steps.batch)
         : at::empty({0}, h.options());
  return {v, grad_h0, need_weight ? rows.grad_weight(v, aux, h0) : std::vector<Tensor>()};
}

Tensor linear_scan_cpu(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                       at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  check_linear_scan(u, gain, s0, weight, batch_sizes, reverse);
  const Steps steps(u, batch_sizes, s0);
  const auto flags = flag_array(reverse);
  const Tensor input = u.contiguous(), aux = gain.contiguous();
  const OptTensor initial = contiguous(s0);
  Tensor s = at::empty(u.sizes(), u.options());
  auto p = params_for(cpu::Recurrence::kLinear, u, weight, flags.get());
  p.input = input.const_data_ptr();
  p.aux = aux.const_data_ptr();
  p.initial = pointer(initial);
  p.output = s.mutable_data_ptr();
  run_scan(p, steps, weight, /*transposed=*/false);
  return s;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace

TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("rnn_scan", rnn_scan_cpu);
  m.impl("rnn_layer", rnn_layer_cpu);
  m.impl("rnn_scan_backward", rnn_scan_backward_cpu);
  m.impl("linear_scan", linear_scan_cpu);
}

TORCH_LIBRARY_IMPL(rnnkern, CatchAll, m) { m.impl("cpu_capability", cpu_capability); }

}  // namespace rnnkern
