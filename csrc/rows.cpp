#include "rows.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace rnnkern {
namespace {

// Tensors as a Math of activation.h; only the derivatives are asked for.
struct TensorMath {
  static Tensor one(const Tensor& h) { return at::ones_like(h); }
  static Tensor step(const Tensor& h) { return h.le(0).logical_not().to(h.scalar_type()); }
  static Tensor expm1(const Tensor& a) { return at::expm1(a); }
};

}  // namespace

Tensor flat(const Tensor& a) {
  return a.dim() == 3 ? a.reshape_symint({a.sym_size(0) * a.sym_size(1), a.sym_size(2)}) : a;
}

std::vector<Tensor> transposed(at::TensorList weight) {
  std::vector<Tensor> out;
  for (const Tensor& w : weight) out.push_back(w.t());
  return out;
}

Tensor activation_gain(const Tensor& h, Activation activation) {
  return with_activation<TensorMath>(
      activation, [&](auto functor) -> Tensor { return decltype(functor)::df(h); });
}

Rows::Rows(const Tensor& x, at::TensorList weight, const OptTensor& batch_sizes, Flags reverse)
    : batch_sizes_(batch_sizes), hidden_(weight[0].sym_size(0)), empty_(x.sym_size(0) == 0) {
  for (const bool flag : reverse) reverse_.push_back(flag);
}

Tensor Rows::columns(const Tensor& x, int64_t group) const {
  return groups() == 1 ? x : x.narrow_symint(-1, hidden_ * group, hidden_);
}

Tensor Rows::concat(const std::vector<Tensor>& columns) {
  return columns.size() == 1 ? columns[0] : at::cat(columns, -1);
}

Tensor Rows::previous(const Tensor& a, const Tensor& initial, int64_t group) const {
  return shifted(a, initial, reverse_[group]);
}

Tensor Rows::next(const Tensor& a, int64_t group) const {
  return shifted(a, Tensor(), !reverse_[group]);
}

// Row (t, b) of the result is row (t + 1, b) of a, or (t - 1, b); `initial` where there is none.
Tensor Rows::shifted(const Tensor& a, const Tensor& initial, bool from_later) const {
  if (empty_) return a;
  if (!batch_sizes_) {
    const Tensor start =
        initial.defined() ? initial.unsqueeze(0) : at::zeros_like(a.narrow(0, 0, 1));
    const Tensor rest = a.narrow_symint(0, from_later ? 1 : 0, a.sym_size(0) - 1);
    return from_later ? at::cat({rest, start}) : at::cat({start, rest});
  }
  // Gather from [initial; a], or from [a zero row; a].
  const Tensor& sizes = *batch_sizes_;
  const Tensor start = initial.defined() ? initial : a.new_zeros_symint({1, hidden_});
  const Tensor row = at::arange(a.sym_size(0), sizes.options());
  const Tensor step = at::repeat_interleave_symint(sizes, std::make_optional(a.sym_size(0)));
  const Tensor b = row - (sizes.cumsum(0) - sizes).index_select(0, step);
  Tensor neighbour, exists;
  if (from_later) {
    const Tensor following =
        at::cat({sizes.slice(0, 1), sizes.new_zeros({1})}).index_select(0, step);
    neighbour = row + sizes.index_select(0, step);
    exists = b < following;
  } else {
    const Tensor preceding =
        at::cat({sizes.new_zeros({1}), sizes.slice(0, 0, -1)}).index_select(0, step);
    neighbour = row - preceding;
    exists = step > 0;
  }
  const Tensor index =
      at::where(exists, neighbour + start.sym_size(0), initial.defined() ? b : at::zeros_like(b));
  return at::cat({start, a}).index_select(0, index.to(a.device()));
}

// The packed row at which batch row b takes part last: step length(b) - 1.
Tensor Rows::last_index(c10::SymInt batch) const {
  const Tensor& sizes = *batch_sizes_;
  const Tensor b = at::arange(std::move(batch), sizes.options());
  const Tensor length = sizes.unsqueeze(1).gt(b).sum(0);
  return (sizes.cumsum(0) - sizes).index_select(0, length - 1) + b;
}

Tensor Rows::last(const Tensor& a, c10::SymInt batch, int64_t group) const {
  if (!batch_sizes_)
    return a.select_symint(0, reverse_[group] ? c10::SymInt(0) : a.sym_size(0) - 1);
  if (reverse_[group]) return a.narrow_symint(0, 0, std::move(batch));
  return a.index_select(0, last_index(std::move(batch)).to(a.device()));
}

Tensor Rows::first(const Tensor& a, c10::SymInt batch, int64_t group) const {
  if (!batch_sizes_)
    return a.select_symint(0, reverse_[group] ? a.sym_size(0) - 1 : c10::SymInt(0));
  if (!reverse_[group]) return a.narrow_symint(0, 0, std::move(batch));
  return a.index_select(0, last_index(std::move(batch)).to(a.device()));
}

Tensor Rows::spread_last(const Tensor& at_last, const Tensor& like, int64_t group) const {
  const c10::SymInt rest = like.sym_size(0) - 1, batch = at_last.sym_size(0);
  if (!batch_sizes_) {
    const c10::SymInt before = reverse_[group] ? c10::SymInt(0) : rest;
    return at::constant_pad_nd_symint(at_last.unsqueeze(0), {0, 0, 0, 0, before, rest - before});
  }
  const Tensor index =
      reverse_[group] ? at::arange(batch, batch_sizes_->options()) : last_index(batch);
  return at::zeros_symint(like.sym_sizes(), at_last.options())
      .index_add(0, index.to(at_last.device()), at_last);
}

Tensor Rows::grad_initial(const Tensor& v, at::TensorList weight, const OptTensor& passed_on,
                          c10::SymInt batch) const {
  if (empty_) {
    return passed_on ? passed_on->clone() : v.new_zeros_symint({groups(), batch, hidden_});
  }
  std::vector<Tensor> grads;
  for (int64_t g = 0; g < groups(); ++g) {
    grads.push_back(at::mm(first(columns(v, g), batch, g), weight[g]));
  }
  return at::stack(grads);
}

std::vector<Tensor> Rows::grad_weight(const Tensor& v, const Tensor& h, const OptTensor& h0) const {
  std::vector<Tensor> grads;
  for (int64_t g = 0; g < groups(); ++g) {
    const Tensor vg = columns(v, g), hg = columns(h, g);
    const Tensor initial = h0 ? h0->select(0, g) : Tensor();
    if (batch_sizes_ || empty_) {
      grads.push_back(at::mm(flat(vg).t(), flat(previous(hg, initial, g))));
      continue;
    }
    // A plain batch's predecessors lie together, so two products spare a copy.
    const c10::SymInt rest = v.sym_size(0) - 1;
    const Tensor after = flat(vg.narrow_symint(0, reverse_[g] ? 0 : 1, rest));
    const Tensor before = flat(hg.narrow_symint(0, reverse_[g] ? 1 : 0, rest));
    Tensor grad = at::mm(after.t(), before);
    if (h0) grad = at::addmm(grad, first(vg, h0->sym_size(1), g).t(), initial);
    grads.push_back(grad);
  }
  return grads;
}

}  // namespace rnnkern
