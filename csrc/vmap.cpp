// vmap, as far as it can be told below Python (the rules of torch.func.vmap are in
// rnnkern/vmap.py): the ops of a layer are taken apart; and linear_scan under the older vmap, which
// torch.autograd.grad(is_grads_batched=True) runs a backward pass with.
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "composite.h"
#include "ops.h"

namespace rnnkern {
namespace {

// The vmap that some tensors are under.
class OldVmap {
 public:
  explicit OldVmap(at::TensorList tensors) {
    for (const Tensor& t : tensors) {
      if (const auto* batched = at::maybeGetBatchedImpl(t)) {
        level_ = std::max(level_, batched->bdims().back().level());
      }
    }
    for (const Tensor& t : tensors) {
      const auto [value, dim] = unwrap(t);
      if (dim) members_ = value.sym_size(*dim);
    }
    TORCH_CHECK_VALUE(members_ > 0, "rnnkern: expected at least one member of a vmap, got none");
  }

  const c10::SymInt& members() const { return members_; }

  // t with the members' dimension at `to`, expanded there if it has none.
  Tensor members_at(const Tensor& t, int64_t to) const {
    const auto [value, dim] = unwrap(t);
    if (dim) return value.movedim(*dim, to);
    const Tensor one = value.unsqueeze(to);
    c10::SymDimVector shape(one.sym_sizes());
    shape[to < 0 ? to + one.dim() : to] = members_;
    return one.expand_symint(shape);
  }
  Tensor wrap(const Tensor& t) const { return at::addBatchDim(t, level_, /*dim=*/0); }

 private:
  // The tensor outside this vmap, and where its members' dimension is.
  std::tuple<Tensor, std::optional<int64_t>> unwrap(const Tensor& t) const {
    const auto* batched = at::maybeGetBatchedImpl(t);
    if (!batched || batched->bdims().back().level() != level_) return {t, std::nullopt};
    TORCH_CHECK_VALUE(batched->bdims().size() == 1, "rnnkern: expected one vmap of ",
                      "torch._vmap_internals, got one in another: use torch.vmap");
    return {batched->value(), batched->bdims().back().dim()};
  }

  int64_t level_ = -1;
  c10::SymInt members_ = 1;
};

// The members are further rows of the batch: (T, B, V, G*H), packed (N, V, G*H). A backward pass
// is linear in the gradients, which are what this vmap is over, so the weights are everyone's.
Tensor linear_scan_old_vmap(const Tensor& u, const Tensor& gain, const OptTensor& s0,
                            at::TensorList weight, const OptTensor& batch_sizes, Flags reverse) {
  check_linear_scan(u, gain, s0, weight, batch_sizes, reverse);
  std::vector<Tensor> tensors = {u, gain};
  if (s0) tensors.push_back(*s0);
  const OldVmap vmap(tensors);
  for (const Tensor& w : weight) {
    TORCH_CHECK_VALUE(!at::isBatchedTensor(w), "linear_scan: expected weights that all members of ",
                      "torch._vmap_internals' vmap share, got different ones: use torch.vmap");
  }
  const auto rows = [&](const Tensor& t) { return vmap.members_at(t, -2).flatten(-3, -2); };
  const Tensor s = ops::linear_scan(
      rows(u), rows(gain), s0 ? OptTensor(vmap.members_at(*s0, 2).flatten(1, 2)) : s0, weight,
      batch_sizes ? OptTensor(at::mul(*batch_sizes, at::Scalar(vmap.members()))) : batch_sizes,
      reverse);
  // In front, in memory too: forward mode takes a tangent apart only so (as_strided).
  const Tensor out = s.unflatten_symint(-2, {s.sym_size(-2) / vmap.members(), vmap.members()});
  return vmap.wrap(out.movedim(-2, 0).contiguous());
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkern, FuncTorchBatched, m) {
  m.impl("rnn_layer", composite::rnn_layer);
  m.impl("rnn_layer_backward", composite::rnn_layer_backward);
}

TORCH_LIBRARY_IMPL(rnnkern, Batched, m) {
  m.impl("rnn_layer_backward", composite::rnn_layer_backward);
  m.impl("rnn_scan_backward", composite::rnn_scan_backward);
  m.impl("linear_scan", linear_scan_old_vmap);
}

}  // namespace rnnkern
