// Under autocast the scans run in the lower precision, as torch.nn.RNN does.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace rnnkern {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
struct Autocast {
  c10::impl::ExcludeDispatchKeyGuard no_autocast{key};
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);

  Tensor operator()(const Tensor& t) const { return at::autocast::cached_cast(dtype, t, device); }
  OptTensor operator()(const OptTensor& t) const { return t ? OptTensor((*this)(*t)) : t; }
  std::vector<Tensor> operator()(at::TensorList list) const {
    std::vector<Tensor> out;
    for (const Tensor& t : list) out.push_back((*this)(t));
    return out;
  }
};

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor> rnn_scan_autocast(const Tensor& x_proj, const OptTensor& h0,
                                             at::TensorList weight, const OptTensor& batch_sizes,
                                             Flags reverse, c10::string_view nonlinearity) {
  const Autocast<key, device> cast;
  return ops::rnn_scan(cast(x_proj), cast(h0), cast(weight), batch_sizes, reverse, nonlinearity);
}

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor> rnn_layer_autocast(const Tensor& x, const OptTensor& h0,
                                              at::TensorList weight_ih, at::TensorList weight_hh,
                                              at::TensorList bias_ih, at::TensorList bias_hh,
                                              const OptTensor& batch_sizes, Flags reverse,
                                              c10::string_view nonlinearity) {
  const Autocast<key, device> cast;
  return ops::rnn_layer(cast(x), cast(h0), cast(weight_ih), cast(weight_hh), cast(bias_ih),
                        cast(bias_hh), batch_sizes, reverse, nonlinearity);
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_scan_autocast(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                            at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  const Autocast<key, device> cast;
  return ops::linear_scan(cast(u), cast(gain), cast(s0), cast(weight), batch_sizes, reverse);
}

// Of 8-bit weights: all else is float32 whatever autocast says.
std::tuple<Tensor, Tensor> rnn_scan_int8_autocast(const Tensor& x_proj, const OptTensor& h0,
                                                  at::TensorList weight, at::TensorList scale,
                                                  const OptTensor& batch_sizes, Flags reverse,
                                                  c10::string_view nonlinearity) {
  const Autocast<c10::DispatchKey::AutocastCPU, at::kCPU> cast{.dtype = at::kFloat};
  return ops::rnn_scan_int8(cast(x_proj), cast(h0), weight, cast(scale), batch_sizes, reverse,
                            nonlinearity);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkern, AutocastCPU, m) {
  m.impl("rnn_scan_int8", rnn_scan_int8_autocast);
  m.impl("rnn_scan", rnn_scan_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("rnn_layer", rnn_layer_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("linear_scan", linear_scan_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(rnnkern, AutocastCUDA, m) {
  m.impl("rnn_scan", rnn_scan_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("rnn_layer", rnn_layer_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("linear_scan", linear_scan_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace rnnkern
