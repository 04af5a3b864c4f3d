// The ops on CUDA GPUs: their checks, the products outside the scan, and the way to the kernels.
//
// A call that no kernel of ours serves goes, as a whole, to the ops of rnnkern_triton, which
// rnnkern/backends/triton.py registers. No CUDA header comes in here.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <climits>

#include "../checks.h"
#include "../rows.h"
#include "../steps.h"
#include "launch.h"

// The key that the ops are registered under. The simulator computes with the host's tensors.
#ifdef RNNKERN_SIMULATE
#define RNNKERN_KEY CPU
#else
#define RNNKERN_KEY CUDA
#endif

namespace rnnkern {
namespace {

using cuda::Precision;
using cuda::Recurrence;

constexpr int64_t kAlignment = 16;  // bytes, of what a kernel reads at once

cuda::machine::Stream current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  const c10::impl::VirtualGuardImpl impl(device.type());
  return impl.getStreamNativeHandle(impl.getStream(device));
}

// What products of a dtype are made of; float32's as torch.nn.RNN's, by torch's own switch.
std::optional<Precision> precision_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return Precision::kBFloat16;
    case at::kHalf:
      return Precision::kHalf;
    case at::kFloat: {
      const auto asked =
          at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN);
      return asked == at::Float32Precision::TF32 ? Precision::kTf32 : Precision::kTf32x3;
    }
    default:
      return std::nullopt;
  }
}

// H, filled up to whole pieces of kAlignment bytes.
int64_t padded_units(int64_t hidden, int64_t element_bytes) {
  const int64_t piece = kAlignment / element_bytes;
  return (hidden + piece - 1) / piece * piece;
}

// The op of this name by Triton's kernels, if they are registered.
std::optional<c10::OperatorHandle> triton_op(const char* op) {
  return c10::Dispatcher::singleton().findSchema({std::string("rnnkern_triton::") + op, ""});
}

// Why a scan is left to them that a kernel would serve.
constexpr const char* kStepByStep = "step by step it is faster";

// How a scan of this shape will run on the current device.
cuda::Plan make_plan(Recurrence recurrence, Activation activation, Precision precision,
                     int64_t steps, int64_t batch, int64_t padded, int64_t groups) {
  cuda::Plan plan;
  if (std::max({batch, padded, groups}) > INT_MAX / 2) {
    plan.refusal =
        c10::str("it expects B, H and G below 2^30, got ", batch, ", ", padded, " and ", groups);
    return plan;
  }
  cuda::Scan scan = {};
  scan.recurrence = recurrence;
  scan.activation = activation;
  scan.steps = steps;
  scan.batch = static_cast<int>(batch);
  scan.hidden = static_cast<int>(padded);
  scan.groups = static_cast<int>(groups);
  plan = cuda::make_plan(scan, precision);
  // cuBLAS makes IEEE's products where it may not make TF32's.
  const bool ieee =
      precision != Precision::kTf32x3 ||
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) !=
          at::Float32Precision::TF32;
  if (plan.kernel && ieee && !cuda::forced_regime() && triton_op("rnn_scan") &&
      cuda::cycles_step_by_step(scan, precision) < plan.cycles) {
    plan.kernel = nullptr;
    plan.refusal = kStepByStep;
  }
  return plan;
}

// The call by Triton's kernels, which serve what ours do not.
template <class Signature, class... Args>
auto by_triton(const char* op, const std::string& why, Args&&... args) {
  TORCH_CHECK(cuda::forced_regime() == nullptr, op, ": ", why);
  const auto handle = triton_op(op);
  TORCH_CHECK(handle, op, ": no kernel serves this call. cuda: ", why,
              ". triton: its kernels are not registered, for which a Python process must import ",
              "rnnkern with the package triton installed");
  return handle->typed<Signature>().call(std::forward<Args>(args)...);
}

// What x_proj is made of.
struct LayerInput {
  const at::TensorList weight_ih, bias_ih, bias_hh;
};

// A scan of some rows: padded, planned and launched.
class KernelCall {
 public:
  // `like` is a tensor of the rows' dtype and device. A backward scan runs backwards through
  // another, whose flags these are, and multiplies by W rather than W^T.
  KernelCall(Recurrence recurrence, Activation activation, const Tensor& like,
             at::TensorList weight, const Steps& steps, Flags reverse)
      : recurrence_(recurrence),
        activation_(activation),
        options_(like.options()),
        weight_(weight),
        steps_(steps),
        reverse_(reverse.begin(), reverse.end()),
        hidden_(weight[0].size(0)),
        padded_(padded_units(hidden_, like.element_size())) {
    if (recurrence == Recurrence::kBackward) reverse_.flip();
    if (empty()) return;
    const auto precision = precision_of(like.scalar_type());
    if (precision) {
      plan_ = make_plan(recurrence, activation, *precision, steps.count, steps.batch, padded_,
                        groups());
    } else {
      plan_.refusal = c10::str("it has no kernel for ", like.scalar_type());
    }
  }

  // Why no kernel serves it; "": one does, or there is nothing to compute.
  const std::string& refusal() const { return plan_.refusal; }
  // Whether the output may stand where the input is.
  bool in_place() const { return empty() || plan_.kernel->regime != cuda::Regime::kGrid; }
  // Of kLayer: whether a kernel takes x itself.
  bool takes_features() const { return !empty() && plan_.kernel->recurrence == Recurrence::kLayer; }
  int64_t padded() const { return padded_; }

  // Rows (N, G*H) of these, and states (G, B, H), as a kernel takes them.
  Tensor rows(const Tensor& t) const {
    return aligned(pad(t.reshape({steps_.rows, groups(), hidden_})));
  }
  Tensor states(const Tensor& t) const { return aligned(pad(t)); }
  OptTensor rows(const OptTensor& t) const { return t ? OptTensor(rows(*t)) : t; }
  OptTensor states(const OptTensor& t) const { return t ? OptTensor(states(*t)) : t; }
  // x (N, I) likewise.
  Tensor features(const Tensor& x) const {
    const Tensor rows = aligned(x.reshape({steps_.rows, x.size(-1)}));
    const int64_t whole = 4 / rows.element_size(), left = rows.numel() % whole;
    if (left == 0) return rows;
    // A word's second half would be past the end. No kernel reads it, but tools that check memory
    // cannot know.
    return at::constant_pad_nd(rows.flatten(), {0, whole - left})
        .narrow(0, 0, rows.numel())
        .view(rows.sizes());
  }
  Tensor new_rows() const { return at::empty({steps_.rows, groups(), padded_}, options_); }
  Tensor new_states() const { return at::empty({groups(), steps_.batch, padded_}, options_); }
  // The same without what was filled up, for the user.
  Tensor unpad(const Tensor& t) const {
    return padded_ == hidden_ ? t : t.narrow(-1, 0, hidden_).contiguous();
  }

  void run(const OptTensor& input, const OptTensor& aux, const OptTensor& initial,
           const OptTensor& entry, const Tensor& output, const OptTensor& last,
           const LayerInput* layer = nullptr) const {
    if (empty()) return;
    const auto pointer = [](const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; };
    cuda::Scan scan = {};
    scan.recurrence = plan_.kernel->recurrence;
    scan.activation = activation_;
    scan.steps = steps_.count;
    scan.batch = static_cast<int>(steps_.batch);
    scan.hidden = static_cast<int>(padded_);
    scan.groups = static_cast<int>(groups());
    scan.row_stride = groups() * padded_;
    scan.input = pointer(input);
    scan.aux = pointer(aux);
    scan.initial = pointer(initial);
    scan.entry = pointer(entry);
    scan.output = output.mutable_data_ptr();
    scan.last = last ? last->mutable_data_ptr() : nullptr;
    Tensor kept[4];
    scan.weight = matrices(weight_, /*in_pieces=*/true, kept[0]);
    if (recurrence_ == Recurrence::kBackward) std::swap(scan.weight.stride_n, scan.weight.stride_k);
    if (layer) {
      scan.features = static_cast<int>(input->size(-1));
      scan.weight_ih = matrices(layer->weight_ih, /*in_pieces=*/false, kept[1]);
      if (!layer->bias_ih.empty()) {
        scan.bias_ih = matrices(layer->bias_ih, /*in_pieces=*/false, kept[2]);
        scan.bias_hh = matrices(layer->bias_hh, /*in_pieces=*/false, kept[3]);
      }
    }
    const Tensor steps = table();
    if (steps.defined()) scan.table = steps.const_data_ptr<int64_t>();
    cuda::launch(plan_, scan, steps_.rows, reverse_, current_stream(options_.device()));
  }

  // (2, T) on the device: each step's batch size and first row. Undefined of a plain batch.
  const Tensor& table() const {
    if (steps_.packed() && !table_.defined()) {
      table_ = at::empty({2, steps_.count}, options_.dtype(at::kLong));
      cuda::machine::write_table(table_.mutable_data_ptr<int64_t>(), steps_.sizes.data(),
                                 steps_.count, current_stream(options_.device()));
    }
    return table_;
  }

 private:
  int64_t groups() const { return static_cast<int64_t>(weight_.size()); }
  bool empty() const { return steps_.count * steps_.batch * hidden_ == 0; }

  Tensor pad(const Tensor& t) const {
    return padded_ == hidden_ ? t : at::constant_pad_nd(t, {0, padded_ - hidden_});
  }
  static Tensor aligned(const Tensor& t) {
    const Tensor a = t.contiguous();
    return reinterpret_cast<uintptr_t>(a.const_data_ptr()) % kAlignment ? a.clone() : a;
  }

  // Where the groups' matrices, or vectors, are: as they are, if they lie evenly, two wherever they
  // are; else stacked, in `kept`, which must live until the launch.
  cuda::Matrices matrices(at::TensorList list, bool in_pieces, Tensor& kept) const {
    const auto address = [&](int64_t g) {
      return reinterpret_cast<intptr_t>(list[g].const_data_ptr());
    };
    const int64_t size = static_cast<int64_t>(options_.dtype().itemsize());
    const int64_t apart = groups() > 1 ? address(1) - address(0) : 0;
    const auto strides = list[0].strides();
    bool as_they_are = padded_ == hidden_ && apart % size == 0;
    if (in_pieces) {
      // A kernel reads 16 bytes at once: along one of the dimensions the elements are neighbours,
      // and along the other, from group to group, and at the start it goes by whole pieces.
      as_they_are &= std::min(strides[0], strides[1]) == 1 &&
                     std::max(strides[0], strides[1]) * size % kAlignment == 0 &&
                     address(0) % kAlignment == 0 && apart % kAlignment == 0;
    }
    for (int64_t g = 1; g < groups() && as_they_are; ++g) {
      as_they_are = address(g) - address(g - 1) == apart && list[g].strides() == strides;
    }
    kept = list[0];
    int64_t stride_g = apart / size;
    if (!as_they_are) {
      const int64_t more = padded_ - hidden_;
      const Tensor stack = at::stack(list);
      const Tensor all = more ? at::constant_pad_nd(stack, {0, more, 0, more}) : stack;
      stride_g = all.stride(0);
      kept = all.select(0, 0);
    }
    return {kept.const_data_ptr(), stride_g, kept.stride(0), kept.dim() > 1 ? kept.stride(1) : 0};
  }

  const Recurrence recurrence_;
  const Activation activation_;
  const at::TensorOptions options_;
  const at::TensorList weight_;
  const Steps& steps_;
  std::vector<bool> reverse_;
  const int64_t hidden_, padded_;
  cuda::Plan plan_;
  mutable Tensor table_;
};

// ---- forward ----

// From x_proj as KernelCall::rows() makes them, into `h`, which may be x_proj, or from x as
// KernelCall::features() and what is to be made of it; the shape is h's for the user.
std::tuple<Tensor, Tensor> forward_into(const Tensor& h, const Tensor& input, const OptTensor& h0,
                                        const Steps& steps, const KernelCall& call,
                                        at::IntArrayRef shape, const LayerInput* layer = nullptr) {
  const OptTensor initial = call.states(h0);
  Tensor h_n = call.new_states();
  if (steps.count == 0) initial ? h_n.copy_(*initial) : h_n.zero_();
  call.run(input, OptTensor(), initial, OptTensor(), h, h_n, layer);
  return {call.unpad(h).view(shape), call.unpad(h_n)};
}

std::tuple<Tensor, Tensor> rnn_scan_cuda(const Tensor& x_proj, const OptTensor& h0,
                                         at::TensorList weight, const OptTensor& batch_sizes,
                                         Flags reverse, c10::string_view nonlinearity) {
  check_rnn_scan(x_proj, h0, weight, batch_sizes, reverse);
  const c10::DeviceGuard guard(x_proj.device());
  const Steps steps(x_proj, batch_sizes, h0);
  const KernelCall call(Recurrence::kForward, parse_activation(nonlinearity), x_proj, weight, steps,
                        reverse);
  if (!call.refusal().empty()) {
    return by_triton<RnnScan>("rnn_scan", call.refusal(), x_proj, h0, weight, batch_sizes, reverse,
                              nonlinearity);
  }
  return forward_into(call.new_rows(), call.rows(x_proj), h0, steps, call, x_proj.sizes());
}

// The groups' vectors or matrices one below the other, each with `more` rows of zeros.
Tensor stack_units(at::TensorList list, int64_t more) {
  if (more == 0) return list.size() == 1 ? list[0] : at::cat(list);
  std::vector<Tensor> padded;
  for (const Tensor& t : list) {
    const int64_t below[] = {0, 0, 0, more};
    padded.push_back(at::constant_pad_nd(
        t, t.dim() == 1 ? at::IntArrayRef(below + 2, 2) : at::IntArrayRef(below, 4)));
  }
  return at::cat(padded);
}

std::tuple<Tensor, Tensor> rnn_layer_cuda(const Tensor& x, const OptTensor& h0,
                                          at::TensorList weight_ih, at::TensorList weight_hh,
                                          at::TensorList bias_ih, at::TensorList bias_hh,
                                          const OptTensor& batch_sizes, Flags reverse,
                                          c10::string_view nonlinearity) {
  check_rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse);
  const c10::DeviceGuard guard(x.device());
  const Steps steps(x, batch_sizes, h0);
  const int64_t hidden = weight_hh[0].size(0), groups = static_cast<int64_t>(weight_hh.size());
  const int64_t row_bytes = x.size(-1) * x.element_size();
  // What is filled up would have to be so in W_ih, and stay 0 where x is not finite.
  const bool few = 0 < row_bytes && row_bytes <= cuda::kMostRowBytes &&
                   hidden == padded_units(hidden, x.element_size());
  const KernelCall call(few ? Recurrence::kLayer : Recurrence::kForward,
                        parse_activation(nonlinearity), x, weight_hh, steps, reverse);
  if (!call.refusal().empty()) {
    return by_triton<RnnLayer>("rnn_layer", call.refusal(), x, h0, weight_ih, weight_hh, bias_ih,
                               bias_hh, batch_sizes, reverse, nonlinearity);
  }
  c10::DimVector shape(x.sizes());
  shape.back() = groups * hidden;
  if (call.takes_features()) {
    const LayerInput layer = {weight_ih, bias_ih, bias_hh};
    return forward_into(call.new_rows(), call.features(x), h0, steps, call, shape, &layer);
  }
  // One product for all steps and groups.
  const int64_t more = call.padded() - hidden;
  const Tensor x_proj = call.new_rows();
  Tensor columns = x_proj.view({steps.rows, groups * call.padded()});
  const Tensor flat_x = x.reshape({steps.rows, x.size(-1)});
  const Tensor weight = stack_units(weight_ih, more).t();
  if (bias_ih.empty()) {
    at::mm_out(columns, flat_x, weight);
  } else {
    const Tensor bias = at::add(stack_units(bias_ih, more), stack_units(bias_hh, more));
    at::addmm_out(columns, bias, flat_x, weight);
  }
  if (more) x_proj.narrow(-1, hidden, more).zero_();  // 0 * inf is not
  const Tensor h = call.in_place() ? x_proj : call.new_rows();
  return forward_into(h, x_proj, h0, steps, call, shape);
}

Tensor linear_scan_cuda(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                        at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  check_linear_scan(u, gain, s0, weight, batch_sizes, reverse);
  const c10::DeviceGuard guard(u.device());
  const Steps steps(u, batch_sizes, s0);
  const KernelCall call(Recurrence::kLinear, Activation::kIdentity, u, weight, steps, reverse);
  if (!call.refusal().empty()) {
    return by_triton<LinearScan>("linear_scan", call.refusal(), u, gain, s0, weight, batch_sizes,
                                 reverse);
  }
  const Tensor s = call.new_rows();
  call.run(call.rows(u), call.rows(gain), call.states(s0), OptTensor(), s, OptTensor());
  return call.unpad(s).view(u.sizes());
}

// ---- backward ----

// v, and the gradient products over all rows of v and h (N, G*H) and x (N, I).
class Backward {
 public:
  Backward(const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h, const OptTensor& h0,
           at::TensorList weight, const Steps& steps, Flags reverse, const KernelCall& call)
      : h_(h.contiguous()),
        h0_(h0),
        grad_h_n_(grad_h_n),
        weight_(weight),
        steps_(steps),
        // The table's first row: batch sizes where the products find them without waiting.
        rows_(h, weight,
              call.table().defined() ? OptTensor(call.table().select(0, 0)) : OptTensor(),
              reverse) {
    TORCH_CHECK_VALUE(!grad_h_n || grad_h_n->size(1) == steps.batch,
                      "rnnkern: expected grad_h_n for ", steps.batch, " rows, got ",
                      grad_h_n ? grad_h_n->size(1) : 0);
    const Tensor out = call.new_rows();
    call.run(call.rows(grad_h), call.rows(h_), OptTensor(), call.states(grad_h_n), out,
             OptTensor());
    v_ = call.unpad(out).view(h.sizes());
  }

  const Tensor& v() const { return v_; }

  Tensor grad_h0(bool need) const {
    if (!need || !h0_) return at::empty({0}, v_.options());
    return rows_.grad_initial(v_, weight_, steps_.count ? OptTensor() : grad_h_n_, steps_.batch);
  }
  std::vector<Tensor> grad_weight_hh() const { return rows_.grad_weight(v_, h_, h0_); }

  Tensor grad_x(at::TensorList weight_ih, at::IntArrayRef shape) const {
    return at::mm(columns(), stack_units(weight_ih, 0)).view(shape);
  }
  std::vector<Tensor> grad_weight_ih(const Tensor& x) const {
    std::vector<Tensor> grads;
    const Tensor flat_x = x.reshape({steps_.rows, x.size(-1)});
    for (int64_t g = 0; g < rows_.groups(); ++g) grads.push_back(at::mm(columns(g).t(), flat_x));
    return grads;
  }
  // Both biases of a group have the same gradient, but each wants its own tensor.
  std::vector<Tensor> grad_bias() const {
    std::vector<Tensor> grads;
    for (int64_t g = 0; g < rows_.groups(); ++g) grads.push_back(columns(g).sum(0));
    for (int64_t g = 0; g < rows_.groups(); ++g) grads.push_back(grads[g].clone());
    return grads;
  }

 private:
  Tensor columns() const { return v_.view({steps_.rows, v_.size(-1)}); }
  Tensor columns(int64_t g) const { return rows_.columns(columns(), g); }

  const Tensor h_;
  const OptTensor h0_, grad_h_n_;
  const at::TensorList weight_;
  const Steps& steps_;
  const Rows rows_;
  Tensor v_;
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_scan_backward_cuda(
    const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h, const OptTensor& h0,
    at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
    c10::string_view nonlinearity, std::array<bool, 2> need) {
  check_rnn_scan_backward(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse);
  const c10::DeviceGuard guard(h.device());
  const Steps steps(h, batch_sizes, h0);
  const KernelCall call(Recurrence::kBackward, parse_activation(nonlinearity), h, weight, steps,
                        reverse);
  if (!call.refusal().empty()) {
    return by_triton<RnnScanBackward>("rnn_scan_backward", call.refusal(), grad_h, grad_h_n, h, h0,
                                      weight, batch_sizes, reverse, nonlinearity, need);
  }
  const Backward backward(grad_h, grad_h_n, h, h0, weight, steps, reverse, call);
  return {backward.v(), backward.grad_h0(need[0]),
          need[1] ? backward.grad_weight_hh() : std::vector<Tensor>()};
}

LayerGradients rnn_layer_backward_cuda(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                       const Tensor& h, const Tensor& x, const OptTensor& h0,
                                       at::TensorList weight_ih, at::TensorList weight_hh,
                                       const OptTensor& batch_sizes, Flags reverse,
                                       c10::string_view nonlinearity, std::array<bool, 5> need) {
  check_rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, batch_sizes, reverse);
  const c10::DeviceGuard guard(h.device());
  const Steps steps(h, batch_sizes, h0);
  const KernelCall call(Recurrence::kBackward, parse_activation(nonlinearity), h, weight_hh, steps,
                        reverse);
  if (!call.refusal().empty()) {
    return by_triton<RnnLayerBackward>("rnn_layer_backward", call.refusal(), grad_h, grad_h_n, h, x,
                                       h0, weight_ih, weight_hh, batch_sizes, reverse, nonlinearity,
                                       need);
  }
  const Backward backward(grad_h, grad_h_n, h, h0, weight_hh, steps, reverse, call);
  const std::vector<Tensor> none;
  return {need[0] ? backward.grad_x(weight_ih, x.sizes()) : at::empty({0}, x.options()),
          backward.grad_h0(need[1]), need[2] ? backward.grad_weight_ih(x) : none,
          need[3] ? backward.grad_weight_hh() : none, need[4] ? backward.grad_bias() : none};
}

// ---- what there is, and what would run ----

std::vector<std::string> cuda_kernels() {
  std::vector<std::string> lines;
  for (int precision = 0; precision < 4; ++precision) {
    for (const cuda::Kernel& k : cuda::kernels(static_cast<Precision>(precision))) {
      const bool is_linear = k.recurrence == Recurrence::kLinear;
      const char* of = is_linear                              ? ""
                       : k.activation == cuda::kAnyActivation ? "any activation, "
                                                              : kActivationNames[k.activation];
      lines.push_back(c10::str(cuda::kPrecisionNames[precision], ", ",
                               cuda::kRecurrenceNames[static_cast<int>(k.recurrence)], ", ", of,
                               is_linear || k.activation == cuda::kAnyActivation ? "" : ", ",
                               cuda::kRegimeNames[static_cast<int>(k.regime)], ", H <= ", k.hidden,
                               ", ", k.rows, " rows, ", k.threads, " threads, ", k.shared,
                               " bytes of shared memory"));
    }
  }
  return lines;
}

// The index of a name in a list of them.
template <size_t size>
int find_name(c10::string_view name, const char* const (&names)[size], const char* what) {
  for (size_t i = 0; i < size; ++i) {
    if (name == names[i]) return static_cast<int>(i);
  }
  TORCH_CHECK_VALUE(false, "cuda_plan: expected ", what, " to be one of ",
                    c10::ArrayRef<const char*>(names), ", got '", name, "'");
}

std::tuple<std::string, int64_t, int64_t, std::string> cuda_plan(
    c10::Device device, c10::string_view precision, c10::string_view recurrence,
    c10::string_view nonlinearity, int64_t steps, int64_t batch, int64_t hidden, int64_t groups) {
  TORCH_CHECK_VALUE(std::min({steps, batch, hidden, groups}) > 0,
                    "cuda_plan: expected at least one step, row, unit and group, got ", steps, ", ",
                    batch, ", ", hidden, " and ", groups);
  const auto of =
      static_cast<Precision>(find_name(precision, cuda::kPrecisionNames, "the precision"));
  const auto which =
      static_cast<Recurrence>(find_name(recurrence, cuda::kRecurrenceNames, "the recurrence"));
  const c10::DeviceGuard guard(device);
  const cuda::Plan plan = make_plan(which, parse_activation(nonlinearity), of, steps, batch,
                                    padded_units(hidden, cuda::element_bytes(of)), groups);
  if (plan.refusal == kStepByStep) return {"steps", 0, 0, ""};
  if (!plan.kernel) return {"", 0, 0, plan.refusal};
  return {cuda::kRegimeNames[static_cast<int>(plan.kernel->regime)], plan.tile_rows, plan.blocks,
          ""};
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkern, RNNKERN_KEY, m) {
  m.impl("rnn_scan", rnn_scan_cuda);
  m.impl("rnn_layer", rnn_layer_cuda);
  m.impl("rnn_scan_backward", rnn_scan_backward_cuda);
  m.impl("rnn_layer_backward", rnn_layer_backward_cuda);
  m.impl("linear_scan", linear_scan_cuda);
}

TORCH_LIBRARY_FRAGMENT(rnnkern, m) {
  // A line for each that is compiled.
  m.def("cuda_kernels() -> str[]", cuda_kernels);
  // How a scan would run: its regime (or "steps", by Triton's kernels), the rows of a tile, and the
  // blocks that run one together; or why no kernel serves it. precision: bfloat16, float16, TF32 or
  // 3xTF32; recurrence: forward, backward, linear, or layer, which is forward from x of few
  // features.
  m.def(
      "cuda_plan(Device device, str precision, str recurrence, str nonlinearity, int steps, int "
      "batch, int hidden, int groups) -> (str regime, int tile_rows, int blocks, str refusal)",
      cuda_plan);
}

}  // namespace rnnkern
