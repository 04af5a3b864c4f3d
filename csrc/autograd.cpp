// The derivatives of the compiled ops, under the Autograd key, on the nodes of node.h.
//
// The family is closed under differentiation (prev, next in scan order; * elementwise; d = f'(h)):
//
// clang-format off
//   rnn_scan     backward  v = linear_scan(d * grad_h, d, W^T, reversed); grad_x_proj = v,
//                          grad_h0 = v_first W, grad_W = sum v^T prev(h); fused in rnn_scan_backward
//                forward   dh = linear_scan(d * (dx_proj + prev(h) dW^T), d, dh0, W)
//   rnn_layer    backward  as rnn_scan's, then grad_x = v W_ih, grad_W_ih = v^T x, grad_b = sum v
//                forward   as rnn_scan's, with dx_proj = dx W_ih^T + x dW_ih^T + db
//   linear_scan  backward  v = linear_scan(gain * grad_s, gain, W^T, reversed); grad_u = lam,
//                          grad_gain = lam * (prev(s) W^T), lam = grad_s + next(v) W,
//                          grad_s0 = v_first W, grad_W = sum v^T prev(s)
//                forward   ds = linear_scan(du + dgain * (prev(s) W^T) + gain * (prev(s) dW^T),
//                                           gain, ds0, W)
// clang-format on
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>

#include "checks.h"
#include "composite.h"
#include "node.h"
#include "ops.h"
#include "rows.h"

namespace rnnkern {
namespace {

// ---- small things ----

OptTensor optional(const Tensor& t) { return t.defined() ? OptTensor(t) : OptTensor(); }
// a + b where an undefined tensor is zero.
Tensor plus(const Tensor& a, const Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? a + b : a;
}
// prev(a) times dW^T, every group; undefined where no weight has a tangent.
Tensor previous_times(const Rows& rows, const Tensor& a, const Tensor& initial,
                      const variable_list& weight) {
  variable_list columns;
  for (int64_t g = 0; g < rows.groups(); ++g) {
    const Tensor before =
        rows.previous(rows.columns(a, g), initial.defined() ? initial.select(0, g) : Tensor(), g);
    columns.push_back(weight[g].defined() ? at::matmul(before, weight[g].t())
                                          : at::zeros_like(before));
  }
  return Rows::concat(columns);
}
// What an op's two outputs are to differentiable(), and back.
variable_list as_outputs(std::tuple<Tensor, Tensor>&& outputs) {
  variable_list list(2);
  std::tie(list[0], list[1]) = std::move(outputs);
  return list;
}
std::tuple<Tensor, Tensor> as_tuple(variable_list&& outputs) {
  return {std::move(outputs[0]), std::move(outputs[1])};
}

// ---- the formulas ----
// saved[0] is the op's first output. A formula returns the gradients in the order of the op's
// inputs.

void append(variable_list& list, variable_list&& more) {
  std::move(more.begin(), more.end(), std::back_inserter(list));
}

bool any_of(const std::vector<bool>& need, size_t begin, size_t end) {
  return std::find(need.begin() + begin, need.begin() + end, true) != need.begin() + end;
}

struct RnnScanFormula {
  static constexpr const char* kName = "RnnScanBackward";
  static constexpr bool kRecomputes = false;  // x_proj is not kept
  // saved: h, h0, batch_sizes, weights; gradients: x_proj, h0, weights.
  static variable_list apply(const variable_list& saved, const variable_list& grads,
                             const Spec& spec, const std::vector<bool>& need) {
    const at::TensorList weight = at::TensorList(saved).slice(3);
    auto [v, grad_h0, grad_weight] =
        ops::rnn_scan_backward(optional(grads[0]), optional(grads[1]), saved[0], optional(saved[1]),
                               weight, optional(saved[2]), spec.reverse, spec.nonlinearity,
                               std::array<bool, 2>{need[1], any_of(need, 2, need.size())});
    variable_list out = {std::move(v), std::move(grad_h0)};
    append(out, std::move(grad_weight));
    out.resize(need.size());
    return out;
  }
};

struct RnnLayerFormula {
  static constexpr const char* kName = "RnnLayerBackward";
  static constexpr bool kRecomputes = true;
  // saved: h, x, h0, batch_sizes, weights_ih, weights_hh; gradients: x, h0, weights_ih, weights_hh,
  // and biases_ih, biases_hh if there are any.
  static variable_list apply(const variable_list& saved, const variable_list& grads,
                             const Spec& spec, const std::vector<bool>& need) {
    const size_t groups = spec.reverse.size(), w_ih = 2, w_hh = 2 + groups, bias = 2 + 2 * groups;
    const at::TensorList all = saved;
    auto [grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias] = ops::rnn_layer_backward(
        optional(grads[0]), optional(grads[1]), saved[0], saved[1], optional(saved[2]),
        all.slice(4, groups), all.slice(4 + groups), optional(saved[3]), spec.reverse,
        spec.nonlinearity,
        std::array<bool, 5>{need[0], need[1], any_of(need, w_ih, w_hh), any_of(need, w_hh, bias),
                            any_of(need, bias, need.size())});
    variable_list out;
    out.reserve(need.size());
    out.push_back(std::move(grad_x));
    out.push_back(std::move(grad_h0));
    for (auto* grads : {&grad_weight_ih, &grad_weight_hh, &grad_bias}) {
      grads->resize(grads == &grad_bias ? need.size() - bias : groups);
      append(out, std::move(*grads));
    }
    return out;
  }
  // h once more: the user's nn.ReLU(inplace=True) on a layer's output costs a second forward scan,
  // not, as a copy of every h would, everybody's memory.
  static Tensor recompute(const variable_list& saved, const variable_list& bias, const Spec& spec) {
    // The tensors are as autocast made them in the forward pass.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const size_t groups = spec.reverse.size();
    const at::TensorList all = saved, biases = bias;
    const size_t each = biases.size() / 2;
    return std::get<0>(ops::rnn_layer(saved[1], optional(saved[2]), all.slice(4, groups),
                                      all.slice(4 + groups), biases.slice(0, each),
                                      biases.slice(each), optional(saved[3]), spec.reverse,
                                      spec.nonlinearity));
  }
};

struct LinearScanFormula {
  static constexpr const char* kName = "LinearScanBackward";
  static constexpr bool kRecomputes = false;  // u is not kept
  // saved: s, gain, s0, batch_sizes, weights; gradients: u, gain, s0, weights.
  static variable_list apply(const variable_list& saved, const variable_list& grads,
                             const Spec& spec, const std::vector<bool>& need) {
    const Tensor &s = saved[0], &gain = saved[1], &s0 = saved[2], &grad_s = grads[0];
    const at::TensorList weight = at::TensorList(saved).slice(4);
    const OptTensor batch_sizes = optional(saved[3]);
    const Rows rows(s, weight, batch_sizes, spec.reverse);
    const Tensor v = ops::linear_scan(gain * grad_s, gain, OptTensor(), transposed(weight),
                                      batch_sizes, flipped(spec.reverse));
    variable_list out(need.size());
    if (need[0] || need[1]) {
      variable_list reach;
      for (int64_t g = 0; g < rows.groups(); ++g) {
        reach.push_back(at::matmul(rows.next(rows.columns(v, g), g), weight[g]));
      }
      out[0] = grad_s + Rows::concat(reach);
      if (need[1]) out[1] = out[0] * previous_times(rows, s, s0, weight.vec());
    }
    if (need[2]) out[2] = rows.grad_initial(v, weight, OptTensor(), s0.sym_size(1));
    if (any_of(need, 3, need.size())) {
      variable_list grad_weight = rows.grad_weight(v, s, optional(s0));
      std::move(grad_weight.begin(), grad_weight.end(), out.begin() + 3);
    }
    return out;
  }
};

// ---- the ops under the Autograd key ----

// The tangents of h and h_n, from that of x_proj (undefined: zero) and those that h0 and the
// weights carry.
void set_scan_tangents(variable_list& outputs, const Tensor& d_x_proj, const Tensor& h0,
                       at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
                       c10::string_view nonlinearity) {
  variable_list w, dw;
  for (const Tensor& t : weight) {
    w.push_back(primal(t));
    dw.push_back(tangent(t));
  }
  const Tensor h = outputs[0], d_h0 = tangent(h0);
  const Rows rows(h, w, batch_sizes, reverse);
  const Tensor gain = activation_gain(h, parse_activation(nonlinearity));
  const Tensor da =
      plus(d_x_proj, any_defined(dw) ? previous_times(rows, h, primal(h0), dw) : Tensor());
  const Tensor u = da.defined() ? gain * da : at::zeros_like(h);
  const Tensor dh = ops::linear_scan(u, gain, optional(d_h0), w, batch_sizes, reverse);
  variable_list dh_n;
  const c10::SymInt batch = outputs[1].sym_size(1);
  if (h.sym_size(0) != 0) {
    for (int64_t g = 0; g < rows.groups(); ++g)
      dh_n.push_back(rows.last(rows.columns(dh, g), batch, g));
  }
  const Tensor last = !dh_n.empty()    ? at::stack(dh_n)
                      : d_h0.defined() ? d_h0.clone()
                                       : at::zeros_like(outputs[1]);
  outputs[0]._set_fw_grad(dh, /*level=*/0, /*is_inplace_op=*/false);
  outputs[1]._set_fw_grad(last, /*level=*/0, /*is_inplace_op=*/false);
}

std::tuple<Tensor, Tensor> rnn_scan_autograd(const Tensor& x_proj, const OptTensor& h0_,
                                             at::TensorList weight, const OptTensor& batch_sizes,
                                             Flags reverse, c10::string_view nonlinearity) {
  if (!any_differentiated(x_proj, h0_, weight)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::rnn_scan(x_proj, h0_, weight, batch_sizes, reverse, nonlinearity);
  }
  const Tensor h0 = h0_.value_or(Tensor()), sizes = batch_sizes.value_or(Tensor());
  auto compute = [&] {
    return as_outputs(ops::rnn_scan(x_proj, h0_, weight, batch_sizes, reverse, nonlinearity));
  };
  auto set_tangents = [&](variable_list& outputs) {
    set_scan_tangents(outputs, tangent(x_proj), h0, weight, batch_sizes, reverse, nonlinearity);
  };
  return as_tuple(differentiable<RnnScanFormula>({x_proj, h0, weight}, {h0, sizes, weight},
                                                 {reverse.vec(), std::string(nonlinearity)},
                                                 compute, set_tangents));
}

std::tuple<Tensor, Tensor> rnn_layer_autograd(const Tensor& x, const OptTensor& h0_,
                                              at::TensorList weight_ih, at::TensorList weight_hh,
                                              at::TensorList bias_ih, at::TensorList bias_hh,
                                              const OptTensor& batch_sizes, Flags reverse,
                                              c10::string_view nonlinearity) {
  if (!any_differentiated(x, h0_, weight_ih, weight_hh, bias_ih, bias_hh)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::rnn_layer(x, h0_, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse,
                          nonlinearity);
  }
  const Tensor h0 = h0_.value_or(Tensor()), sizes = batch_sizes.value_or(Tensor());
  auto compute = [&] {
    return as_outputs(ops::rnn_layer(x, h0_, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes,
                                     reverse, nonlinearity));
  };
  auto set_tangents = [&](variable_list& outputs) {
    variable_list columns;
    bool any = false;
    for (size_t g = 0; g < weight_ih.size(); ++g) {
      Tensor d;
      const Tensor dx = tangent(x), dw = tangent(weight_ih[g]);
      if (dx.defined()) d = at::matmul(dx, primal(weight_ih[g]).t());
      if (dw.defined()) d = plus(d, at::matmul(primal(x), dw.t()));
      if (!bias_ih.empty()) d = plus(d, plus(tangent(bias_ih[g]), tangent(bias_hh[g])));
      any = any || d.defined();
      const Tensor like = Rows(outputs[0], weight_hh, batch_sizes, reverse).columns(outputs[0], g);
      columns.push_back(d.defined() ? d.expand_symint(like.sym_sizes()) : at::zeros_like(like));
    }
    set_scan_tangents(outputs, any ? Rows::concat(columns) : Tensor(), h0, weight_hh, batch_sizes,
                      reverse, nonlinearity);
  };
  return as_tuple(differentiable<RnnLayerFormula>(
      {x, h0, weight_ih, weight_hh, bias_ih, bias_hh}, {x, h0, sizes, weight_ih, weight_hh},
      {reverse.vec(), std::string(nonlinearity)}, compute, set_tangents, {bias_ih, bias_hh}));
}

Tensor linear_scan_autograd(const Tensor& u, const Tensor& gain, const OptTensor& s0_,
                            at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  if (!any_differentiated(u, gain, s0_, weight)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::linear_scan(u, gain, s0_, weight, batch_sizes, reverse);
  }
  const Tensor s0 = s0_.value_or(Tensor()), sizes = batch_sizes.value_or(Tensor());
  auto compute = [&] {
    return variable_list{ops::linear_scan(u, gain, s0_, weight, batch_sizes, reverse)};
  };
  auto set_tangents = [&](variable_list& outputs) {
    variable_list w, dw;
    for (const Tensor& t : weight) {
      w.push_back(primal(t));
      dw.push_back(tangent(t));
    }
    const Tensor s = outputs[0], initial = primal(s0), d_gain = tangent(gain);
    const Rows rows(s, w, batch_sizes, reverse);
    Tensor du = tangent(u);
    if (d_gain.defined()) du = plus(du, d_gain * previous_times(rows, s, initial, w));
    if (any_defined(dw)) du = plus(du, primal(gain) * previous_times(rows, s, initial, dw));
    if (!du.defined()) du = at::zeros_like(s);
    outputs[0]._set_fw_grad(
        ops::linear_scan(du, primal(gain), optional(tangent(s0)), w, batch_sizes, reverse),
        /*level=*/0, /*is_inplace_op=*/false);
  };
  return differentiable<LinearScanFormula>({u, gain, s0, weight}, {gain, s0, sizes, weight},
                                           {reverse.vec(), ""}, compute, set_tangents)[0];
}

// The fused backward where nobody differentiates it again, else the same through linear_scan.
std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_scan_backward_autograd(
    const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h, const OptTensor& h0,
    at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
    c10::string_view nonlinearity, std::array<bool, 2> need) {
  if (!any_differentiated(grad_h, grad_h_n, h, h0, weight)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::rnn_scan_backward(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse,
                                  nonlinearity, need);
  }
  return composite::rnn_scan_backward(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse,
                                      nonlinearity, need);
}

LayerGradients rnn_layer_backward_autograd(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                           const Tensor& h, const Tensor& x, const OptTensor& h0,
                                           at::TensorList weight_ih, at::TensorList weight_hh,
                                           const OptTensor& batch_sizes, Flags reverse,
                                           c10::string_view nonlinearity,
                                           std::array<bool, 5> need) {
  if (!any_differentiated(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, batch_sizes,
                                   reverse, nonlinearity, need);
  }
  return composite::rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh,
                                       batch_sizes, reverse, nonlinearity, need);
}

std::tuple<Tensor, Tensor> rnn_scan_int8_autograd(const Tensor& x_proj, const OptTensor& h0,
                                                  at::TensorList weight, at::TensorList scale,
                                                  const OptTensor& batch_sizes, Flags reverse,
                                                  c10::string_view nonlinearity) {
  TORCH_CHECK(
      !any_differentiated(x_proj, h0, scale),
      "rnn_scan_int8: expected inference, got an input that requires a gradient or has a ",
      "tangent (8-bit weights have none): call it under torch.no_grad(), with plain inputs");
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::rnn_scan_int8(x_proj, h0, weight, scale, batch_sizes, reverse, nonlinearity);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkern, Autograd, m) {
  m.impl("rnn_scan", rnn_scan_autograd);
  m.impl("rnn_layer", rnn_layer_autograd);
  m.impl("linear_scan", linear_scan_autograd);
  m.impl("rnn_scan_backward", rnn_scan_backward_autograd);
  m.impl("rnn_layer_backward", rnn_layer_backward_autograd);
  m.impl("rnn_scan_int8", rnn_scan_int8_autograd);
}

}  // namespace rnnkern
