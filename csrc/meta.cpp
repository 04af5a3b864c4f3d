// Shapes without data: the meta device, fake tensors, torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"

namespace rnnkern {
namespace {

Tensor empty_rows(const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }

std::vector<Tensor> empty_like_each(at::TensorList list) {
  std::vector<Tensor> out;
  for (const Tensor& t : list) out.push_back(empty_rows(t));
  return out;
}

// (G, B, H) beside a sequence x.
Tensor empty_states(const Tensor& x, const OptTensor& h0, at::TensorList weight) {
  const c10::SymInt batch = h0 ? h0->sym_size(1) : x.sym_size(1);
  const auto groups = static_cast<int64_t>(weight.size());
  return at::empty_symint({groups, batch, weight[0].sym_size(0)}, x.options());
}

std::tuple<Tensor, Tensor> rnn_scan_meta(const Tensor& x_proj, const OptTensor& h0,
                                         at::TensorList weight, const OptTensor& batch_sizes,
                                         Flags reverse, c10::string_view nonlinearity) {
  check_rnn_scan(x_proj, h0, weight, batch_sizes, reverse);
  parse_activation(nonlinearity);
  return {empty_rows(x_proj), empty_states(x_proj, h0, weight)};
}

std::tuple<Tensor, Tensor> rnn_layer_meta(const Tensor& x, const OptTensor& h0,
                                          at::TensorList weight_ih, at::TensorList weight_hh,
                                          at::TensorList bias_ih, at::TensorList bias_hh,
                                          const OptTensor& batch_sizes, Flags reverse,
                                          c10::string_view nonlinearity) {
  check_rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse);
  parse_activation(nonlinearity);
  c10::SymDimVector shape(x.sym_sizes());
  shape.back() = weight_hh[0].sym_size(0) * static_cast<int64_t>(weight_hh.size());
  return {at::empty_symint(shape, x.options()), empty_states(x, h0, weight_hh)};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_scan_backward_meta(
    const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h, const OptTensor& h0,
    at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
    c10::string_view nonlinearity, std::array<bool, 2> need) {
  check_rnn_scan_backward(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse);
  parse_activation(nonlinearity);
  return {empty_rows(h), need[0] && h0 ? empty_rows(*h0) : at::empty({0}, h.options()),
          need[1] ? empty_like_each(weight) : std::vector<Tensor>()};
}

LayerGradients rnn_layer_backward_meta(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                       const Tensor& h, const Tensor& x, const OptTensor& h0,
                                       at::TensorList weight_ih, at::TensorList weight_hh,
                                       const OptTensor& batch_sizes, Flags reverse,
                                       c10::string_view nonlinearity, std::array<bool, 5> need) {
  check_rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, batch_sizes, reverse);
  parse_activation(nonlinearity);
  const std::vector<Tensor> none;
  std::vector<Tensor> grad_bias;
  for (size_t i = 0; need[4] && i < 2 * weight_hh.size(); ++i) {
    grad_bias.push_back(at::empty_symint({weight_hh[0].sym_size(0)}, h.options()));
  }
  return {need[0] ? empty_rows(x) : at::empty({0}, x.options()),
          need[1] && h0 ? empty_rows(*h0) : at::empty({0}, h.options()),
          need[2] ? empty_like_each(weight_ih) : none, need[3] ? empty_like_each(weight_hh) : none,
          grad_bias};
}

Tensor linear_scan_meta(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                        at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  check_linear_scan(u, gain, s0, weight, batch_sizes, reverse);
  return empty_rows(u);
}

std::tuple<Tensor, Tensor> rnn_scan_int8_meta(const Tensor& x_proj, const OptTensor& h0,
                                              at::TensorList weight, at::TensorList scale,
                                              const OptTensor& batch_sizes, Flags reverse,
                                              c10::string_view nonlinearity) {
  check_rnn_scan_int8(x_proj, h0, weight, scale, batch_sizes, reverse, nonlinearity);
  return {empty_rows(x_proj), empty_states(x_proj, h0, weight)};
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkern, Meta, m) {
  m.impl("rnn_scan_int8", rnn_scan_int8_meta);
  m.impl("rnn_scan", rnn_scan_meta);
  m.impl("rnn_layer", rnn_layer_meta);
  m.impl("rnn_scan_backward", rnn_scan_backward_meta);
  m.impl("rnn_layer_backward", rnn_layer_backward_meta);
  m.impl("linear_scan", linear_scan_meta);
}

}  // namespace rnnkern
