// The schemas. Implementations register themselves: cpu/ops.cpp, cuda/ops.cpp, meta.cpp,
// autograd.cpp, autocast.cpp, vmap.cpp.
#include <torch/library.h>

TORCH_LIBRARY(rnnkern, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "rnn_scan(Tensor x_proj, Tensor? h0, Tensor[] weight_hh, Tensor? batch_sizes, int[] reverse, "
      "str nonlinearity) -> (Tensor h, Tensor h_n)",
      tags);
  m.def(
      "rnn_layer(Tensor x, Tensor? h0, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, "
      "Tensor[] bias_hh, Tensor? batch_sizes, int[] reverse, str nonlinearity) "
      "-> (Tensor h, Tensor h_n)",
      tags);
  m.def(
      "rnn_scan_backward(Tensor? grad_h, Tensor? grad_h_n, Tensor h, Tensor? h0, "
      "Tensor[] weight_hh, Tensor? batch_sizes, int[] reverse, str nonlinearity, bool[2] need) "
      "-> (Tensor grad_x_proj, Tensor grad_h0, Tensor[] grad_weight_hh)",
      tags);
  m.def(
      "rnn_layer_backward(Tensor? grad_h, Tensor? grad_h_n, Tensor h, Tensor x, Tensor? h0, "
      "Tensor[] weight_ih, Tensor[] weight_hh, Tensor? batch_sizes, int[] reverse, "
      "str nonlinearity, bool[5] need) -> (Tensor grad_x, Tensor grad_h0, "
      "Tensor[] grad_weight_ih, Tensor[] grad_weight_hh, Tensor[] grad_bias)",
      tags);
  m.def(
      "linear_scan(Tensor u, Tensor gain, Tensor? s0, Tensor[] weight, Tensor? batch_sizes, "
      "int[] reverse) -> Tensor",
      tags);
  // Inference alone: it has no gradients.
  m.def(
      "rnn_scan_int8(Tensor x_proj, Tensor? h0, Tensor[] weight_hh, Tensor[] scale, "
      "Tensor? batch_sizes, int[] reverse, str nonlinearity) -> (Tensor h, Tensor h_n)",
      tags);
  m.def("cpu_capability() -> str");
}
