// What the ops ask of their arguments: each message says what was wanted and what came.
#pragma once
#include "activation.h"
#include "signatures.h"

namespace rnnkern {

inline Activation parse_activation(c10::string_view name) {
  int index = 0;
  for (const char* known : kActivationNames) {
    if (name == known) return static_cast<Activation>(index);
    ++index;
  }
  TORCH_CHECK_VALUE(false, "rnnkern: nonlinearity must be one of ",
                    c10::ArrayRef<const char*>(kActivationNames), ", got '", name, "'");
}

// A tensor beside `x`: same dtype (or the one named), same device.
inline void check_like(const char* op, const char* name, const Tensor& a, const Tensor& x,
                       const char* x_name, std::optional<at::ScalarType> dtype = std::nullopt) {
  if (dtype) {
    TORCH_CHECK_TYPE(a.scalar_type() == *dtype, op, ": expected ", name, " of dtype ", *dtype,
                     ", got ", a.scalar_type());
  } else {
    TORCH_CHECK_TYPE(a.scalar_type() == x.scalar_type(), op, ": expected ", name,
                     " to have the dtype of ", x_name, ", ", x.scalar_type(), ", got ",
                     a.scalar_type());
  }
  TORCH_CHECK_VALUE(a.device() == x.device(), op, ": expected ", name, " on the device of ", x_name,
                    ", ", x.device(), ", got ", a.device());
}

// The (G, B, H) states, if any, beside the main sequence and its weights.
inline void check_state(const char* op, const OptTensor& state, const char* name, const Tensor& x,
                        const char* x_name, at::TensorList weight, const OptTensor& batch_sizes) {
  if (!state) return;
  const int64_t groups = static_cast<int64_t>(weight.size());
  const c10::SymInt hidden = weight[0].sym_size(0);
  check_like(op, name, *state, x, x_name);
  TORCH_CHECK_VALUE(state->dim() == 3 && state->sym_size(0) == groups &&
                        state->sym_size(2) == hidden &&
                        (batch_sizes || state->sym_size(1) == x.sym_size(1)),
                    op, ": expected ", name, " (G, B, H) with G = ", groups, ", H = ", hidden,
                    batch_sizes ? "" : " and the batch of the sequence", ", got ",
                    state->sym_sizes(), " for ", x_name, " ", x.sym_sizes());
}

// The arguments that all the ops share; x is the op's main sequence, of `features` for each group
// or, where the groups share it, in all; initial is the (G, B, H) state.
inline void check_scan(const char* op, const Tensor& x, const char* x_name,
                       const OptTensor& initial, const char* initial_name, at::TensorList weight,
                       const OptTensor& batch_sizes, Flags reverse,
                       std::optional<c10::SymInt> shared_features = std::nullopt,
                       std::optional<at::ScalarType> weight_dtype = std::nullopt) {
  const int64_t groups = static_cast<int64_t>(weight.size());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), op, ": expected ", x_name,
                   " of a floating dtype, got ", x.scalar_type());
  TORCH_CHECK_VALUE(groups > 0, op, ": expected at least one weight, got an empty list");
  TORCH_CHECK_VALUE(static_cast<int64_t>(reverse.size()) == groups, op,
                    ": expected one reverse flag for each of the ", groups, " weights, got ",
                    reverse.size());
  const auto hidden = weight[0].dim() == 2 ? weight[0].sym_size(0) : c10::SymInt(0);
  for (const Tensor& w : weight) {
    check_like(op, "weight", w, x, x_name, weight_dtype);
    TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) == hidden && w.sym_size(1) == hidden, op,
                      ": expected every weight to be square (H, H) of one H, got ", w.sym_sizes());
  }
  if (batch_sizes) {
    TORCH_CHECK_VALUE(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong &&
                          (batch_sizes->is_cpu() || x.is_meta()),
                      op, ": expected batch_sizes (T,) int64 on the CPU, got ",
                      batch_sizes->sym_sizes(), " ", batch_sizes->scalar_type(), " on ",
                      batch_sizes->device());
  }
  const int64_t dims = batch_sizes ? 2 : 3;
  if (shared_features) {
    TORCH_CHECK_VALUE(x.dim() == dims && x.sym_size(-1) == *shared_features, op, ": expected ",
                      x_name, batch_sizes ? " (N, I)" : " (T, B, I)",
                      " with I = ", *shared_features, ", got ", x.sym_sizes());
  } else {
    TORCH_CHECK_VALUE(x.dim() == dims && x.sym_size(-1) == hidden * groups, op, ": expected ",
                      x_name, batch_sizes ? " (N, G*H)" : " (T, B, G*H)", " with G*H = ", groups,
                      "*", hidden, ", got ", x.sym_sizes());
  }
  check_state(op, initial, initial_name, x, x_name, weight, batch_sizes);
}

// A tensor shaped like the main sequence.
inline void check_rows(const char* op, const char* name, const Tensor& a, const Tensor& x,
                       const char* x_name) {
  check_like(op, name, a, x, x_name);
  TORCH_CHECK_VALUE(a.sym_sizes() == x.sym_sizes(), op, ": expected ", name, " shaped like ",
                    x_name, ", ", x.sym_sizes(), ", got ", a.sym_sizes());
}

// The arguments of each op. h_n's shape cannot be known from packed rows alone, so rnn_scan then
// needs h0.
inline void check_rnn_scan(const Tensor& x_proj, const OptTensor& h0, at::TensorList weight,
                           const OptTensor& batch_sizes, Flags reverse) {
  check_scan("rnn_scan", x_proj, "x_proj", h0, "h0", weight, batch_sizes, reverse);
  TORCH_CHECK_VALUE(h0 || !batch_sizes,
                    "rnn_scan: expected h0 (G, B, H) beside batch_sizes, got None");
}

inline void check_rnn_scan_int8(const Tensor& x_proj, const OptTensor& h0, at::TensorList weight,
                                at::TensorList scale, const OptTensor& batch_sizes, Flags reverse,
                                c10::string_view nonlinearity) {
  const char* op = "rnn_scan_int8";
  TORCH_CHECK_TYPE(x_proj.scalar_type() == at::kFloat, op, ": expected x_proj of dtype Float, got ",
                   x_proj.scalar_type());
  check_scan(op, x_proj, "x_proj", h0, "h0", weight, batch_sizes, reverse, std::nullopt, at::kChar);
  TORCH_CHECK_VALUE(scale.size() == weight.size(), op, ": expected a scale for each of the ",
                    weight.size(), " weights, got ", scale.size());
  for (const Tensor& s : scale) {
    check_like(op, "scale", s, x_proj, "x_proj");
    TORCH_CHECK_VALUE(s.dim() == 1 && s.sym_size(0) == weight[0].sym_size(0), op,
                      ": expected every scale to be (H,) = (", weight[0].sym_size(0), "), got ",
                      s.sym_sizes());
  }
  TORCH_CHECK_VALUE(h0 || !batch_sizes, op, ": expected h0 (G, B, H) beside batch_sizes, got None");
  // A byte holds a state only where it is known how large it can get.
  const Activation f = parse_activation(nonlinearity);
  TORCH_CHECK_VALUE(f == Activation::kTanh || f == Activation::kSigmoid, op,
                    ": expected tanh or sigmoid, whose states are in [-1, 1], got '", nonlinearity,
                    "'");
}

inline void check_layer_lists(at::TensorList weight_ih, at::TensorList weight_hh,
                              at::TensorList bias_ih, at::TensorList bias_hh) {
  const size_t groups = weight_hh.size();
  TORCH_CHECK_VALUE(weight_ih.size() == groups && groups > 0,
                    "rnn_layer: expected as many weight_ih as weight_hh, ", "one at least, got ",
                    weight_ih.size(), " and ", groups);
  TORCH_CHECK_VALUE(
      (bias_ih.empty() || bias_ih.size() == groups) && bias_ih.size() == bias_hh.size(),
      "rnn_layer: expected a bias_ih and a bias_hh for each of the ", groups,
      " weights or none, got ", bias_ih.size(), " and ", bias_hh.size());
}

inline void check_rnn_layer(const Tensor& x, const OptTensor& h0, at::TensorList weight_ih,
                            at::TensorList weight_hh, at::TensorList bias_ih,
                            at::TensorList bias_hh, const OptTensor& batch_sizes, Flags reverse) {
  check_layer_lists(weight_ih, weight_hh, bias_ih, bias_hh);
  TORCH_CHECK_VALUE(weight_ih[0].dim() == 2, "rnn_layer: expected weight_ih (H, I), got ",
                    weight_ih[0].sym_sizes());
  check_scan("rnn_layer", x, "x", h0, "h0", weight_hh, batch_sizes, reverse,
             weight_ih[0].sym_size(1));
  TORCH_CHECK_VALUE(h0 || !batch_sizes,
                    "rnn_layer: expected h0 (G, B, H) beside batch_sizes, got None");
  const c10::SymInt hidden = weight_hh[0].sym_size(0), features = x.sym_size(-1);
  for (const Tensor& w : weight_ih) {
    check_like("rnn_layer", "weight_ih", w, x, "x");
    TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) == hidden && w.sym_size(1) == features,
                      "rnn_layer: expected weight_ih (H, I) = (", hidden, ", ", features, "), got ",
                      w.sym_sizes());
  }
  for (const at::TensorList list : {bias_ih, bias_hh}) {
    for (const Tensor& b : list) {
      check_like("rnn_layer", "the biases", b, x, "x");
      TORCH_CHECK_VALUE(b.dim() == 1 && b.sym_size(0) == hidden,
                        "rnn_layer: expected biases (H,) = (", hidden, "), got ", b.sym_sizes());
    }
  }
}

inline void check_rnn_scan_backward(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                    const Tensor& h, const OptTensor& h0, at::TensorList weight,
                                    const OptTensor& batch_sizes, Flags reverse) {
  check_scan("rnn_scan_backward", h, "h", h0, "h0", weight, batch_sizes, reverse);
  if (grad_h) check_rows("rnn_scan_backward", "grad_h", *grad_h, h, "h");
  check_state("rnn_scan_backward", grad_h_n, "grad_h_n", h, "h", weight, batch_sizes);
}

inline void check_rnn_layer_backward(const OptTensor& grad_h, const OptTensor& grad_h_n,
                                     const Tensor& h, const Tensor& x, const OptTensor& h0,
                                     at::TensorList weight_ih, at::TensorList weight_hh,
                                     const OptTensor& batch_sizes, Flags reverse) {
  check_rnn_scan_backward(grad_h, grad_h_n, h, h0, weight_hh, batch_sizes, reverse);
  check_like("rnn_layer_backward", "x", x, h, "h");
  TORCH_CHECK_VALUE(x.dim() == h.dim() &&
                        x.sym_sizes().slice(0, x.dim() - 1) == h.sym_sizes().slice(0, h.dim() - 1),
                    "rnn_layer_backward: expected x with the rows of h, ", h.sym_sizes(), ", got ",
                    x.sym_sizes());
  TORCH_CHECK_VALUE(weight_ih.size() == weight_hh.size(), "rnn_layer_backward: expected ",
                    weight_hh.size(), " weight_ih, got ", weight_ih.size());
  for (const Tensor& w : weight_ih) {
    check_like("rnn_layer_backward", "weight_ih", w, h, "h");
    TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) == weight_hh[0].sym_size(0) &&
                          w.sym_size(1) == x.sym_size(-1),
                      "rnn_layer_backward: expected weight_ih (H, I) = (", weight_hh[0].sym_size(0),
                      ", ", x.sym_size(-1), "), got ", w.sym_sizes());
  }
}

inline void check_linear_scan(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                              at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  check_scan("linear_scan", u, "u", s0, "s0", weight, batch_sizes, reverse);
  check_rows("linear_scan", "gain", gain, u, "u");
}

}  // namespace rnnkern
