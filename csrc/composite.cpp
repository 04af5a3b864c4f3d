#include "composite.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>

#include "checks.h"
#include "ops.h"
#include "rows.h"

namespace rnnkern::composite {

std::tuple<Tensor, Tensor> rnn_layer(const Tensor& x, const OptTensor& h0, at::TensorList weight_ih,
                                     at::TensorList weight_hh, at::TensorList bias_ih,
                                     at::TensorList bias_hh, const OptTensor& batch_sizes,
                                     Flags reverse, c10::string_view nonlinearity) {
  check_layer_lists(weight_ih, weight_hh, bias_ih, bias_hh);
  // vmap comes before autocast, which will make the dtypes alike.
  const auto device = x.device().type();
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) {
    check_rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse);
  }
  std::vector<Tensor> columns;
  for (size_t g = 0; g < weight_ih.size(); ++g) {
    const OptTensor bias = bias_ih.empty() ? OptTensor() : bias_ih[g] + bias_hh[g];
    columns.push_back(at::linear(x, weight_ih[g], bias));
  }
  return ops::rnn_scan(Rows::concat(columns), h0, weight_hh, batch_sizes, reverse, nonlinearity);
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_scan_backward(
    const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h, const OptTensor& h0,
    at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
    c10::string_view nonlinearity, std::array<bool, 2> need) {
  check_rnn_scan_backward(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse);
  const Rows rows(h, weight, batch_sizes, reverse);
  const bool empty = h.sym_size(0) == 0;
  Tensor grad = grad_h.value_or(Tensor());
  if (grad_h_n && !empty) {
    std::vector<Tensor> spread;
    for (int64_t g = 0; g < rows.groups(); ++g) {
      spread.push_back(rows.spread_last(grad_h_n->select(0, g), rows.columns(h, g), g));
    }
    const Tensor last = Rows::concat(spread);
    grad = grad.defined() ? grad + last : last;
  }
  if (!grad.defined()) grad = at::zeros_like(h);
  const Tensor gain = activation_gain(h, parse_activation(nonlinearity));
  const Tensor v = ops::linear_scan(gain * grad, gain, OptTensor(), transposed(weight), batch_sizes,
                                    flipped(reverse));
  const Tensor grad_h0 =
      need[0] && h0 ? rows.grad_initial(v, weight, empty ? grad_h_n : OptTensor(), h0->sym_size(1))
                    : at::empty({0}, h.options());
  return {v, grad_h0, need[1] ? rows.grad_weight(v, h, h0) : std::vector<Tensor>()};
}

LayerGradients rnn_layer_backward(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                  const Tensor& h, const Tensor& x, const OptTensor& h0,
                                  at::TensorList weight_ih, at::TensorList weight_hh,
                                  const OptTensor& batch_sizes, Flags reverse,
                                  c10::string_view nonlinearity, std::array<bool, 5> need) {
  check_rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, batch_sizes, reverse);
  auto [v, grad_h0, grad_weight_hh] =
      ops::rnn_scan_backward(grad_h, grad_h_n, h, h0, weight_hh, batch_sizes, reverse, nonlinearity,
                             std::array<bool, 2>{need[1], need[3]});
  const Rows rows(h, weight_hh, batch_sizes, reverse);
  const Tensor flat_x = flat(x);
  std::vector<Tensor> grad_weight_ih, grad_bias;
  Tensor grad_x;
  for (int64_t g = 0; g < rows.groups(); ++g) {
    const Tensor vg = flat(rows.columns(v, g));
    if (need[0]) {
      const Tensor part = at::mm(vg, weight_ih[g]);
      grad_x = grad_x.defined() ? grad_x + part : part;
    }
    if (need[2]) grad_weight_ih.push_back(at::mm(vg.t(), flat_x));
    if (need[4]) grad_bias.push_back(vg.sum(0));
  }
  // Both biases of a group have the same gradient, each its own tensor.
  for (int64_t g = 0; need[4] && g < rows.groups(); ++g) grad_bias.push_back(grad_bias[g].clone());
  return {need[0] ? grad_x.view_symint(x.sym_sizes()) : at::empty({0}, x.options()), grad_h0,
          grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace rnnkern::composite
