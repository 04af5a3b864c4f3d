// The ops on the CPU: their checks, and which products they are made of.
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/max.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../rows.h"
#include "products.h"
#include "runner.h"

namespace rnnkern {
namespace {

using cpu::Recurrence;

// Up to so many features, x_proj is made inside the scan, where it is used: one product for all
// steps would read and write it once more, and costs a call.
constexpr int64_t kFusedFeatures = 8;

// Products of fewer rows than these are torch's own: a matrix that meets so few is not worth
// packing.
constexpr int64_t kLeastRows = 5;
bool own_products(const Tensor& x, const Steps& steps) {
  return cpu::has_products(x.scalar_type()) && steps.rows >= kLeastRows;
}

// Whether that holds for the weight of a scan too: one step of few rows, as when a sequence is
// generated number by number.
bool one_large_step(const Steps& steps, const Tensor& x, int64_t hidden) {
  return steps.count == 1 && x.element_size() >= 4 && !own_products(x, steps) &&
         hidden * hidden >= 256 * 256;
}

const void* pointer(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }
OptTensor contiguous(const OptTensor& t) { return t ? OptTensor(t->contiguous()) : t; }

// The same of a gradient: often one number in all places, as sum() and mean() send it back. A few
// of those are not worth a call of torch's copy.
OptTensor contiguous_gradient(const OptTensor& t) {
  constexpr int64_t few = 1 << 14;
  const auto is_zero = [](int64_t stride) { return stride == 0; };
  if (!t || t->numel() == 0 || t->numel() > few ||
      !std::all_of(t->strides().begin(), t->strides().end(), is_zero)) {
    return contiguous(t);
  }
  Tensor out = cpu::empty(t->sizes(), *t);
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const size_t size = t->element_size(), bytes = out.nbytes();
  std::memcpy(to, t->const_data_ptr(), size);
  for (size_t done = size; done < bytes; done *= 2) {
    std::memcpy(to + done, to, std::min(done, bytes - done));
  }
  return out;
}

// A group's columns (N, H) of contiguous rows.
Tensor columns_of(const Tensor& t, const Steps& steps, int64_t group, int64_t hidden) {
  const Tensor flat = t.view({steps.rows, t.size(-1)});
  return t.size(-1) == hidden ? flat : flat.narrow(1, group * hidden, hidden);
}

// h_n (G, B, H): each row of h after its last step in scan order; its initial state if it takes no
// step.
Tensor last_states(const Tensor& h, const OptTensor& h0, const Steps& steps,
                   const cpu::ScanParams& p) {
  Tensor h_n = cpu::empty({p.groups, steps.batch, p.hidden}, h);
  if (steps.count == 0) {
    h0 ? h_n.copy_(*h0) : h_n.zero_();
    return h_n;
  }
  if (h_n.numel() == 0) return h_n;
  const size_t bytes = p.hidden * h.element_size();
  const auto* from = static_cast<const char*>(h.const_data_ptr());
  auto* to = static_cast<char*>(h_n.mutable_data_ptr());
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t b = 0; b < steps.batch; ++b, to += bytes) {
      const int64_t row = steps.offset(p.reverse[g] ? 0 : steps.length(b) - 1) + b;
      std::memcpy(to, from + (row * p.groups + g) * bytes, bytes);
    }
  }
  return h_n;
}

// Input products (G, N, H) and what makes a group's.
struct InputProducts {
  Tensor rows;
  std::function<void(int64_t)> make;
};

// The forward scan of contiguous input (x_proj, or x with its weights) into h, which may be x_proj
// itself.
Tensor forward_into(Tensor& h, const Tensor& input, const OptTensor& h0, at::TensorList weight,
                    const Steps& steps, Flags reverse, c10::string_view nonlinearity,
                    const cpu::LayerInput* layer = nullptr,
                    const InputProducts* products = nullptr) {
  const auto flags = cpu::flag_array(reverse);
  const OptTensor initial = contiguous(h0);
  auto p =
      cpu::make_params(layer ? Recurrence::kLayer : Recurrence::kForward, h, weight, flags.data());
  p.activation = parse_activation(nonlinearity);
  p.input = input.const_data_ptr();
  if (products) {
    p.input_stride = p.hidden;
    p.input_apart = steps.rows * p.hidden;
  }
  p.initial = pointer(initial);
  p.output = h.mutable_data_ptr();
  if (initial && !layer && one_large_step(steps, h, p.hidden)) {
    for (int64_t g = 0; g < p.groups; ++g) {
      Tensor out = columns_of(h, steps, g, p.hidden);
      const Tensor x_proj = columns_of(input, steps, g, p.hidden);
      at::addmm_out(out, x_proj, initial->select(0, g), weight[g].t());
    }
    p.input = p.output;
    p.from_zero = true;
  }
  if (layer) {
    p.features = p.input_stride = input.size(-1);
    p.input_apart = 0;
  }
  cpu::run_scan(p, steps, weight, /*transposed=*/false, layer,
                products ? products->make : std::function<void(int64_t)>());
  return last_states(h, initial, steps, p);
}

std::tuple<Tensor, Tensor> rnn_scan_cpu(const Tensor& x_proj, const OptTensor& h0,
                                        at::TensorList weight, const OptTensor& batch_sizes,
                                        Flags reverse, c10::string_view nonlinearity) {
  check_rnn_scan(x_proj, h0, weight, batch_sizes, reverse);
  const Steps steps(x_proj, batch_sizes, h0);
  Tensor h = cpu::empty(x_proj.sizes(), x_proj);
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
  c10::DimVector shape(x.sizes());
  shape.back() = groups * hidden;
  Tensor h = cpu::empty(shape, x);
  if (x.size(-1) <= kFusedFeatures && !one_large_step(steps, x, hidden)) {
    const cpu::LayerInput layer = {weight_ih, bias_ih, bias_hh};
    const Tensor h_n =
        forward_into(h, x.contiguous(), h0, weight_hh, steps, reverse, nonlinearity, &layer);
    return {h, h_n};
  }
  // The input product of all steps goes where h will stand, each group's to its own columns. Where
  // the thread that scans a group is to make its product too, it goes to rows of its own: threads
  // that write side by side in one row fetch each other's lines. In a loop of such calls alone, two
  // directions of (1, 256, 64, 64): 92 us, 78 so.
  const int64_t features = x.size(-1), size = x.element_size();
  const Tensor input = x.contiguous();
  const bool own = own_products(x, steps);
  const double flops = 2.0 * steps.rows * hidden * features;
  const auto product = [&](int64_t g, char* out, int64_t stride) {
    const Tensor none;
    cpu::matmul({input.const_data_ptr(), steps.rows, features}, weight_ih[g], /*transposed=*/false,
                bias_ih.empty() ? none : bias_ih[g], bias_ih.empty() ? none : bias_hh[g], out,
                stride, /*add=*/false);
  };
  const int64_t threads = cpu::scan_threads(steps, groups, hidden);
  if (own && steps.count > 1 && cpu::side_by_side(groups, flops) && 1 < threads &&
      threads <= groups) {
    InputProducts products;
    products.rows = cpu::empty({groups, steps.rows, hidden}, x);
    auto* to = static_cast<char*>(products.rows.mutable_data_ptr());
    products.make = [&](int64_t g) { product(g, to + g * steps.rows * hidden * size, hidden); };
    const Tensor h_n = forward_into(h, products.rows, h0, weight_hh, steps, reverse, nonlinearity,
                                    nullptr, &products);
    return {h, h_n};
  }
  if (own) {
    auto* const to = static_cast<char*>(h.mutable_data_ptr());
    cpu::for_each_group(groups, flops,
                        [&](int64_t g) { product(g, to + g * hidden * size, groups * hidden); });
  } else {
    const Tensor flat_x = input.view({steps.rows, features});
    for (int64_t g = 0; g < groups; ++g) {
      Tensor columns = columns_of(h, steps, g, hidden);
      if (bias_ih.empty()) {
        at::mm_out(columns, flat_x, weight_ih[g].t());
      } else {
        at::addmm_out(columns, at::add(bias_ih[g], bias_hh[g]), flat_x, weight_ih[g].t());
      }
    }
  }
  const Tensor h_n = forward_into(h, h, h0, weight_hh, steps, reverse, nonlinearity);
  return {h, h_n};
}

// The backward scan; h contiguous.
Tensor backward_scan(const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h,
                     at::TensorList weight, const Steps& steps, Flags reverse,
                     c10::string_view nonlinearity) {
  TORCH_CHECK_VALUE(!grad_h_n || grad_h_n->size(1) == steps.batch,
                    "rnnkern: expected grad_h_n for ", steps.batch, " rows, got ",
                    grad_h_n ? grad_h_n->size(1) : 0);
  const auto flags = cpu::flag_array(reverse, /*flipped=*/true);
  const OptTensor input = contiguous_gradient(grad_h), entry = contiguous_gradient(grad_h_n);
  // v may stand where grad_h is, if that is a copy: such as of the ones that out.sum() sends back.
  const bool copied = input && !input->is_same(*grad_h) && !input->is_alias_of(*grad_h);
  Tensor v = copied ? *input : cpu::empty(h.sizes(), h);
  auto p = cpu::make_params(Recurrence::kBackward, h, weight, flags.data());
  p.activation = parse_activation(nonlinearity);
  p.input = pointer(input);
  p.aux = h.const_data_ptr();
  p.entry = pointer(entry);
  p.output = v.mutable_data_ptr();
  cpu::run_scan(p, steps, weight, /*transposed=*/true);
  return v;
}

// Gradient products over all rows of v, h (N, G*H) and x (N, I), all contiguous.
class Products {
 public:
  Products(const Tensor& v, const Tensor& h, const OptTensor& h0, at::TensorList weight,
           const Steps& steps, const OptTensor& batch_sizes, Flags reverse)
      : v_(v),
        h_(h),
        h0_(contiguous(h0)),
        weight_(weight),
        steps_(steps),
        batch_sizes_(batch_sizes),
        reverse_(reverse),
        groups_(static_cast<int64_t>(weight.size())),
        hidden_(weight[0].size(0)) {}

  Tensor grad_h0(bool need, const OptTensor& grad_h_n) const {
    if (!need || !h0_) return cpu::empty({0}, v_);
    const Rows rows = this->rows();
    if (!own() || steps_.count == 0) {
      return rows.grad_initial(v_, weight_, steps_.count ? OptTensor() : grad_h_n, steps_.batch);
    }
    Tensor grads = cpu::empty({groups_, steps_.batch, hidden_}, v_);
    auto* to = static_cast<char*>(grads.mutable_data_ptr());
    for (int64_t g = 0; g < groups_; ++g, to += steps_.batch * hidden_ * v_.element_size()) {
      const Tensor first = rows.first(rows.columns(v_, g), steps_.batch, g).contiguous();
      cpu::matmul({first.const_data_ptr(), steps_.batch, hidden_}, weight_[g], /*transposed=*/true,
                  Tensor(), Tensor(), to, hidden_, /*add=*/false);
    }
    return grads;
  }

  std::vector<Tensor> grad_weight_hh() const {
    std::vector<Tensor> grads;
    const bool of_zeros = steps_.count == 1 && !h0_;  // v^T 0, which is 0 where v is finite
    if (of_zeros && std::isfinite(v_.sum().item<double>())) {
      for (int64_t g = 0; g < groups_; ++g) {
        grads.push_back(at::zeros({hidden_, hidden_}, v_.options()));
      }
      return grads;
    }
    if (!own() && !(of_zeros && cpu::has_products(v_.scalar_type()))) {
      return rows().grad_weight(v_, h_, h0_);
    }
    std::vector<int64_t> previous[2];  // of each direction
    for (int64_t g = 0; g < groups_; ++g) {
      std::vector<int64_t>& rows = previous[reverse_[g] != 0];
      if (rows.empty()) rows = steps_.previous(reverse_[g]);
      grads.push_back(cpu::empty({hidden_, hidden_}, v_));
    }
    for_each_group(2.0 * steps_.rows * hidden_ * hidden_, [&](int64_t g) {
      const std::vector<int64_t>& rows = previous[reverse_[g] != 0];
      cpu::outer(
          {element(v_, g * hidden_), element(h_, g * hidden_), rows.data(),
           h0_ ? element(*h0_, g * steps_.batch * hidden_) : nullptr, grads[g].mutable_data_ptr(),
           steps_.rows, hidden_, hidden_, groups_ * hidden_, groups_ * hidden_, hidden_, hidden_},
          v_.scalar_type());
    });
    return grads;
  }

  std::vector<Tensor> grad_weight_ih(const Tensor& x) const {
    std::vector<Tensor> grads;
    const int64_t features = x.size(-1);
    for (int64_t g = 0; g < groups_; ++g) {
      grads.push_back(own() ? cpu::empty({hidden_, features}, v_)
                            : at::mm(columns(g).t(), x.view({steps_.rows, features})));
    }
    if (!own()) return grads;
    for_each_group(2.0 * steps_.rows * hidden_ * features, [&](int64_t g) {
      cpu::outer({element(v_, g * hidden_), x.const_data_ptr(), nullptr, nullptr,
                  grads[g].mutable_data_ptr(), steps_.rows, hidden_, features, groups_ * hidden_,
                  features, 0, features},
                 v_.scalar_type());
    });
    return grads;
  }

  // 2 G tensors (H,): both biases of a group have the same gradient, but each wants its own tensor.
  std::vector<Tensor> grad_bias() const {
    std::vector<Tensor> grads;
    for (int64_t g = 0; g < groups_; ++g) {
      if (own()) {
        grads.push_back(cpu::empty({hidden_}, v_));
        cpu::column_sums(v_rows(g), hidden_, v_.scalar_type(), grads[g].mutable_data_ptr());
      } else {
        grads.push_back(columns(g).sum(0));
      }
    }
    for (int64_t g = 0; g < groups_; ++g) {
      grads.push_back(cpu::empty({hidden_}, v_));
      const size_t bytes = grads[g].nbytes();  // none, and null pointers, for H = 0
      if (bytes) std::memcpy(grads.back().mutable_data_ptr(), grads[g].const_data_ptr(), bytes);
    }
    return grads;
  }

  // Where v has its shape, in v's memory: v is lost.
  Tensor grad_x(at::TensorList weight_ih, at::IntArrayRef shape) const {
    const int64_t features = weight_ih[0].size(1);
    const bool reuses =
        own() && groups_ == 1 && v_.sizes() == shape && cpu::in_place(steps_.rows, weight_ih[0]);
    Tensor grad = reuses ? v_ : cpu::empty(shape, v_);
    if (own()) {
      for (int64_t g = 0; g < groups_; ++g) {
        cpu::matmul(v_rows(g), weight_ih[g], /*transposed=*/true, Tensor(), Tensor(),
                    grad.mutable_data_ptr(), features, /*add=*/g > 0);
      }
      return grad;
    }
    Tensor flat = grad.view({steps_.rows, features});
    at::mm_out(flat, columns(0), weight_ih[0]);
    for (int64_t g = 1; g < groups_; ++g) flat.addmm_(columns(g), weight_ih[g]);
    return grad;
  }

 private:
  bool own() const { return own_products(v_, steps_); }
  Rows rows() const { return Rows(h_, weight_, batch_sizes_, reverse_); }
  // f(g) for every group, which makes a gradient by outer(): in 16 bits that makes tensors, not
  // by threads side by side, whose heaps would keep the memory.
  void for_each_group(double flops, const std::function<void(int64_t)>& f) const {
    cpu::for_each_group(groups_, v_.element_size() == 2 ? 0 : flops, f);
  }
  Tensor columns(int64_t g) const { return columns_of(v_, steps_, g, hidden_); }
  cpu::RowsView v_rows(int64_t g) const {
    return {element(v_, g * hidden_), steps_.rows, groups_ * hidden_};
  }
  static const void* element(const Tensor& t, int64_t index) {
    return static_cast<const char*>(t.const_data_ptr()) + index * t.element_size();
  }

  const Tensor &v_, &h_;
  OptTensor h0_;
  at::TensorList weight_;
  const Steps& steps_;
  const OptTensor& batch_sizes_;
  Flags reverse_;
  int64_t groups_, hidden_;
};

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_scan_backward_cpu(
    const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h_, const OptTensor& h0,
    at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
    c10::string_view nonlinearity, std::array<bool, 2> need) {
  check_rnn_scan_backward(grad_h, grad_h_n, h_, h0, weight, batch_sizes, reverse);
  const Steps steps(h_, batch_sizes, h0);
  const Tensor h = h_.contiguous();
  const Tensor v = backward_scan(grad_h, grad_h_n, h, weight, steps, reverse, nonlinearity);
  const Products products(v, h, h0, weight, steps, batch_sizes, reverse);
  return {v, products.grad_h0(need[0], grad_h_n),
          need[1] ? products.grad_weight_hh() : std::vector<Tensor>()};
}

LayerGradients rnn_layer_backward_cpu(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                      const Tensor& h_, const Tensor& x, const OptTensor& h0,
                                      at::TensorList weight_ih, at::TensorList weight_hh,
                                      const OptTensor& batch_sizes, Flags reverse,
                                      c10::string_view nonlinearity, std::array<bool, 5> need) {
  check_rnn_layer_backward(grad_h, grad_h_n, h_, x, h0, weight_ih, weight_hh, batch_sizes, reverse);
  const Steps steps(h_, batch_sizes, h0);
  const Tensor h = h_.contiguous();
  const Tensor v = backward_scan(grad_h, grad_h_n, h, weight_hh, steps, reverse, nonlinearity);
  const Products products(v, h, h0, weight_hh, steps, batch_sizes, reverse);
  const std::vector<Tensor> none;
  Tensor grad_h0 = products.grad_h0(need[1], grad_h_n);
  auto grad_weight_ih = need[2] ? products.grad_weight_ih(x.contiguous()) : none;
  auto grad_weight_hh = need[3] ? products.grad_weight_hh() : none;
  auto grad_bias = need[4] ? products.grad_bias() : none;
  // The last, as it may change v.
  return {need[0] ? products.grad_x(weight_ih, x.sizes()) : cpu::empty({0}, x), std::move(grad_h0),
          std::move(grad_weight_ih), std::move(grad_weight_hh), std::move(grad_bias)};
}

Tensor linear_scan_cpu(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                       at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  check_linear_scan(u, gain, s0, weight, batch_sizes, reverse);
  const Steps steps(u, batch_sizes, s0);
  const auto flags = cpu::flag_array(reverse);
  const Tensor input = u.contiguous(), aux = gain.contiguous();
  const OptTensor initial = contiguous(s0);
  Tensor s = cpu::empty(u.sizes(), u);
  auto p = cpu::make_params(Recurrence::kLinear, u, weight, flags.data());
  p.input = input.const_data_ptr();
  p.aux = aux.const_data_ptr();
  p.initial = pointer(initial);
  p.output = s.mutable_data_ptr();
  cpu::run_scan(p, steps, weight, /*transposed=*/false);
  return s;
}

// Of 8-bit weights: unit i's are weight[i] * scale[i], and a state is a byte, h rounded to 1/127.
std::tuple<Tensor, Tensor> rnn_scan_int8_cpu(const Tensor& x_proj, const OptTensor& h0,
                                             at::TensorList weight, at::TensorList scale,
                                             const OptTensor& batch_sizes, Flags reverse,
                                             c10::string_view nonlinearity) {
  check_rnn_scan_int8(x_proj, h0, weight, scale, batch_sizes, reverse, nonlinearity);
  TORCH_CHECK_VALUE(!h0 || h0->numel() == 0 || at::max(h0->abs()).item<float>() <= 1,
                    "rnn_scan_int8: expected h0 within [-1, 1], got numbers outside it");
  const Steps steps(x_proj, batch_sizes, h0);
  const auto flags = cpu::flag_array(reverse);
  const Tensor input = x_proj.contiguous();
  const OptTensor initial = contiguous(h0);
  std::vector<Tensor> weights, scales;
  std::vector<const float*> pointers;
  for (size_t g = 0; g < weight.size(); ++g) {
    weights.push_back(weight[g].contiguous());
    scales.push_back(scale[g].contiguous());
    pointers.push_back(scales.back().const_data_ptr<float>());
  }
  Tensor h = cpu::empty(x_proj.sizes(), x_proj);
  auto p = cpu::make_params(Recurrence::kForward, h, weights, flags.data());
  p.dtype = cpu::DType::kInt8;
  p.activation = parse_activation(nonlinearity);
  p.input = input.const_data_ptr();
  p.initial = pointer(initial);
  p.output = h.mutable_data_ptr();
  p.scales = pointers.data();
  cpu::run_scan(p, steps, weights, /*transposed=*/false);
  return {h, last_states(h, initial, steps, p)};
}

std::string cpu_capability() { return cpu::kernels().name; }

}  // namespace

TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("rnn_scan", rnn_scan_cpu);
  m.impl("rnn_layer", rnn_layer_cpu);
  m.impl("rnn_scan_backward", rnn_scan_backward_cpu);
  m.impl("rnn_layer_backward", rnn_layer_backward_cpu);
  m.impl("linear_scan", linear_scan_cpu);
  m.impl("rnn_scan_int8", rnn_scan_int8_cpu);
}

TORCH_LIBRARY_IMPL(rnnkern, CatchAll, m) { m.impl("cpu_capability", cpu_capability); }

}  // namespace rnnkern
