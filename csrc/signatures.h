// The C++ signatures of the ops.
//
// Letters: T steps, B batch, H hidden_size, G groups, N rows (the sum over t of the batch size at
// t).
//
//   x_proj, h, u, gain, s, grad_*  (T, B, G*H), or packed (N, G*H) with batch_sizes
//   h0, h_n, s0                    (G, B, H)
//   weight                         G tensors (H, H); row i of one gives unit i its inputs
//   batch_sizes                    (T,) int64 on the CPU, non-increasing; absent for a plain batch
//   reverse                        G flags: whether the group runs from the last step to the first
//
//   x                              (T, B, I), or packed (N, I)
//   weight_ih, bias_*              G tensors (H, I), and (H,) or none at all
//
// clang-format off
//   rnn_scan            h_t = f(x_proj_t + h_{t-1} W^T); returns h, h_n
//   rnn_layer           rnn_scan of x_proj = x W_ih^T + b_ih + b_hh, which is not kept
//   linear_scan         s_t = u_t + gain_t * (s_{t-1} W^T); returns s
//   rnn_scan_backward   v_t = f'(h_t) * (grad_h_t + v_{t+1} W), grad_h_n joining at a row's last step;
//                       returns v = grad_x_proj, grad_h0, grad_weight; need: of the last two, whether
//                       it is wanted (else it is empty, and so is grad_h0 without h0)
//   rnn_layer_backward  rnn_scan_backward, then grad_x = v W_ih, grad_W_ih = v^T x, grad_b = sum v;
//                       need: as they are returned
//   rnn_scan_int8       rnn_scan for inference, of weights scale_i * weight_i of unit i
// clang-format on
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace rnnkern {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using Flags = at::IntArrayRef;  // 0 or 1: torch.jit.trace knows no list of bool

// The flags of the scan that runs backwards through another.
inline std::vector<int64_t> flipped(Flags reverse) {
  std::vector<int64_t> out;
  for (const int64_t flag : reverse) out.push_back(!flag);
  return out;
}

using RnnScan = std::tuple<Tensor, Tensor>(const Tensor& x_proj, const OptTensor& h0,
                                           at::TensorList weight, const OptTensor& batch_sizes,
                                           Flags reverse, c10::string_view nonlinearity);
using RnnLayer = std::tuple<Tensor, Tensor>(const Tensor& x, const OptTensor& h0,
                                            at::TensorList weight_ih, at::TensorList weight_hh,
                                            at::TensorList bias_ih, at::TensorList bias_hh,
                                            const OptTensor& batch_sizes, Flags reverse,
                                            c10::string_view nonlinearity);
using RnnScanBackward = std::tuple<Tensor, Tensor, std::vector<Tensor>>(
    const OptTensor& grad_h, const OptTensor& grad_h_n, const Tensor& h, const OptTensor& h0,
    at::TensorList weight, const OptTensor& batch_sizes, Flags reverse,
    c10::string_view nonlinearity, std::array<bool, 2> need);
// grad_x, grad_h0, grad_weight_ih, grad_weight_hh, and 2 G gradients of the biases, those of
// bias_ih first; empty unless needed.
using LayerGradients =
    std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;
using RnnLayerBackward = LayerGradients(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                        const Tensor& h, const Tensor& x, const OptTensor& h0,
                                        at::TensorList weight_ih, at::TensorList weight_hh,
                                        const OptTensor& batch_sizes, Flags reverse,
                                        c10::string_view nonlinearity, std::array<bool, 5> need);
using RnnScanInt8 = std::tuple<Tensor, Tensor>(const Tensor& x_proj, const OptTensor& h0,
                                               at::TensorList weight, at::TensorList scale,
                                               const OptTensor& batch_sizes, Flags reverse,
                                               c10::string_view nonlinearity);
using LinearScan = Tensor(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                          at::TensorList weight, const OptTensor& batch_sizes, Flags reverse);

}  // namespace rnnkern
