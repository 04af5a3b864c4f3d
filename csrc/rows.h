// Which row of a scan comes before or after which, in tensor operations alone, so that autograd,
// fake tensors and every device can follow; and the gradient products, which are made of little
// else.
//
// All but the whole-sequence functions work on one group's columns, (T, B, H) or packed (N, H).
// Before and after are meant in scan order: in a reversed group, step t + 1 comes before step t.
#pragma once
#include "activation.h"
#include "signatures.h"

namespace rnnkern {

class Rows {
 public:
  Rows(const Tensor& x, at::TensorList weight, const OptTensor& batch_sizes, Flags reverse);

  int64_t groups() const { return static_cast<int64_t>(reverse_.size()); }

  // One group's columns of the whole sequence, and the whole sequence from its groups' columns.
  Tensor columns(const Tensor& x, int64_t group) const;
  static Tensor concat(const std::vector<Tensor>& columns);

  // Each row's predecessor, (B, H) `initial` (undefined: zeros) for the first; each row's
  // successor, zeros past the last.
  Tensor previous(const Tensor& a, const Tensor& initial, int64_t group) const;
  Tensor next(const Tensor& a, int64_t group) const;
  // (B, H): the last row of each of the B batch rows; the first. Neither exists for T = 0.
  Tensor last(const Tensor& a, c10::SymInt batch, int64_t group) const;
  Tensor first(const Tensor& a, c10::SymInt batch, int64_t group) const;
  // The adjoint of last(): rows of `like`'s shape, zero but for `at_last` (B, H).
  Tensor spread_last(const Tensor& at_last, const Tensor& like, int64_t group) const;

  // Of whole sequences, from v = f' * (the gradient that reaches each state):
  // grad_h0 (G, B, H) = v_first W, or `passed_on` for T = 0, where the state itself is returned;
  Tensor grad_initial(const Tensor& v, at::TensorList weight, const OptTensor& passed_on,
                      c10::SymInt batch) const;
  // grad_W (H, H) of every group = sum over rows of v^T previous(h).
  std::vector<Tensor> grad_weight(const Tensor& v, const Tensor& h, const OptTensor& h0) const;

 private:
  Tensor shifted(const Tensor& a, const Tensor& initial, bool from_later) const;
  Tensor last_index(c10::SymInt batch) const;

  OptTensor batch_sizes_;
  std::vector<bool> reverse_;
  c10::SymInt hidden_;
  bool empty_;  // T = 0
};

// (T, B, H) as (T*B, H). Not at::flatten, which the older vmap does not know.
Tensor flat(const Tensor& a);
std::vector<Tensor> transposed(at::TensorList weight);

// f'(h), element by element.
Tensor activation_gain(const Tensor& h, Activation activation);

}  // namespace rnnkern
