// Autograd nodes of our own, and how an op below autograd gets one: the machinery of autograd.cpp.
//
// Hand-written as ATen's code generator writes them, because only such nodes carry forward mode,
// torch.func, compiled autograd and a scripted module's gradients alike. The price is one version
// guard, in make_node.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/version.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

namespace rnnkern {

using at::Tensor;
using namespace torch::autograd;

inline Tensor tangent(const Tensor& t) { return t.defined() ? t._fw_grad(/*level=*/0) : Tensor(); }
inline Tensor primal(const Tensor& t) {
  return t.defined() && isFwGradDefined(t) ? t._fw_primal(/*level=*/0) : t;
}
// Whether anybody takes forward derivatives: it has a lock, and so has each tensor's tangent.
inline bool forward_mode() { return ForwardADLevel::try_get_by_idx(0) != nullptr; }
inline bool has_tangent(at::TensorList inputs) {
  for (const Tensor& t : inputs) {
    if (t.defined() && isFwGradDefined(t)) return true;
  }
  return false;
}
inline bool requires_grad(at::TensorList inputs) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& t : inputs) {
    if (t.defined() && t.requires_grad()) return true;
  }
  return false;
}
inline at::TensorList as_list(const Tensor& t) { return t; }
inline at::TensorList as_list(const OptTensor& t) {
  return t ? at::TensorList(*t) : at::TensorList();
}
inline at::TensorList as_list(at::TensorList list) { return list; }
// Whether autograd has anything to do with these, each a tensor or a list of tensors.
template <class... Inputs>
bool any_differentiated(const Inputs&... inputs) {
  return (... || requires_grad(as_list(inputs))) ||
         (forward_mode() && (... || has_tangent(as_list(inputs))));
}
// Tensors and lists of tensors, one after another.
using Lists = std::initializer_list<at::TensorList>;
inline size_t count_of(Lists lists) {
  size_t count = 0;
  for (const at::TensorList list : lists) count += list.size();
  return count;
}
inline bool any_defined(const variable_list& list) {
  for (const Tensor& t : list) {
    if (t.defined()) return true;
  }
  return false;
}

// What an op saves besides its tensors.
struct Spec {
  std::vector<int64_t> reverse;
  std::string nonlinearity;  // empty for linear_scan
};

// Formula: kName, the gradients as apply(), and where the saved output can be had again,
// recompute().
template <class Formula>
struct ScanNode : public Node {
  std::vector<SavedVariable> saved;  // the first output, then what apply() needs
  Spec spec;
  bool released = false;
  // To have the output again after someone changed it in place: the inputs that apply() does not
  // need, and how old the output was.
  std::vector<SavedVariable> for_recompute;
  c10::VariableVersion output_version{c10::VariableVersion::DISABLED};
  uint32_t saved_version = 0;

  std::string name() const override { return Formula::kName; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
    for (auto& s : for_recompute) s.reset_data();
    released = true;
  }

  std::vector<bool> needed() const {
    std::vector<bool> need;
    for (size_t i = 0; i < num_outputs(); ++i) need.push_back(task_should_compute_output(i));
    return need;
  }

  // Whether unpack() makes the output again.
  bool is_output_lost() const {
    return Formula::kRecomputes && output_version.current_version() != saved_version;
  }

  variable_list unpack() {
    variable_list out(saved.size());
    for (size_t i = 1; i < saved.size(); ++i) out[i] = saved[i].unpack();
    if constexpr (Formula::kRecomputes) {
      if (is_output_lost()) {
        variable_list rest;
        for (auto& s : for_recompute) rest.push_back(s.unpack());
        out[0] = Formula::recompute(out, rest, spec);
        return out;
      }
    }
    out[0] = saved[0].unpack(getptr());
    return out;
  }

  // visit() of all that unpack() will read.
  template <class Self, class Visit>
  static void for_each_read(Self& node, const Visit& visit) {
    const bool lost = node.is_output_lost();
    for (size_t i = lost; i < node.saved.size(); ++i) visit(node.saved[i], /*is_output=*/i == 0);
    for (size_t i = 0; lost && i < node.for_recompute.size(); ++i) {
      visit(node.for_recompute[i], /*is_output=*/false);
    }
  }

  static variable_list gradients(const variable_list& saved, const variable_list& grads,
                                 const Spec& spec, const std::vector<bool>& need) {
    if (!any_defined(grads)) return variable_list(need.size());
    variable_list out = Formula::apply(saved, grads, spec, need);
    for (size_t i = 0; i < need.size(); ++i) {
      if (!need[i]) out[i] = Tensor();
    }
    return out;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, ERR_BACKWARD_TWICE);
    return gradients(unpack(), grads, spec, needed());
  }

  // Compiled autograd calls the formula as a function of its saved tensors.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(is_output_lost());
    for_each_read(*this,
                  [&](const SavedVariable& s, bool is_output) { args.collect(s, is_output); });
    args.collect(spec.reverse);
    args.collect(spec.nonlinearity);
  }

  static variable_list apply_packed(const variable_list& grads,
                                    const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const auto saved = packed.unpack<variable_list>();
    const auto reverse = packed.unpack<std::vector<int64_t>>();
    const auto nonlinearity = packed.unpack<std::string>();
    const auto need = packed.unpack<std::vector<bool>>();
    return gradients(saved, grads, {reverse, nonlinearity}, need);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for_each_read(*this, [&](SavedVariable& s, bool) { swap.before(s); });
    PackedArgs packed;
    packed.pack(unpack());
    packed.pack(spec.reverse);
    packed.pack(spec.nonlinearity);
    packed.pack(needed());
    const auto args = std::move(packed).vec();
    std::vector<at::TypePtr> schema;
    for (const auto& arg : args)
      schema.push_back(arg.isTensor() ? at::TensorType::get() : arg.type());
    const auto metadata = IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
        get_input_metadata(next_edges()));
    const auto& compiler = getPyCompilerInterface();
    const std::string function = compiler->bind_function(swap.get_py_compiler(), Formula::kName,
                                                         apply_packed, schema, true, true);
    variable_list out = compiler->call_function(swap.get_py_compiler(), "apply_functional",
                                                function, grads, args, metadata);
    for_each_read(*this, [&](SavedVariable& s, bool) { swap.after(s); });
    return out;
  }
};

template <class Formula>
auto make_node() {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 12
  return std::shared_ptr<ScanNode<Formula>>(new ScanNode<Formula>(), deleteNode);
#else
  return c10::make_intrusive<ScanNode<Formula>>();
#endif
}

// Runs compute() below autograd and makes its outputs differentiable in `inputs`. The order is the
// code generator's, and matters: the tangent is set before the output is saved, since a
// SavedVariable copies it.
template <class Formula, class Compute, class Tangents>
variable_list differentiable(Lists inputs, Lists to_save, Spec spec, Compute&& compute,
                             Tangents&& set_tangents, Lists for_recompute = {}) {
  decltype(make_node<Formula>()) node;
  if (std::any_of(inputs.begin(), inputs.end(), requires_grad)) {
    node = make_node<Formula>();
    edge_list edges;
    edges.reserve(count_of(inputs));
    for (const at::TensorList list : inputs) {
      for (const Tensor& t : list) edges.push_back(t.defined() ? impl::gradient_edge(t) : Edge());
    }
    node->set_next_edges(std::move(edges));
    node->spec = std::move(spec);
  }
  variable_list outputs;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    outputs = compute();
  }
  if (node) {
    for (Tensor& out : outputs) set_history(out, node);
  }
  if (forward_mode() && std::any_of(inputs.begin(), inputs.end(), has_tangent)) {
    set_tangents(outputs);
  }
  if (node) {
    const auto save = [](std::vector<SavedVariable>& to, Lists lists) {
      for (const at::TensorList list : lists) {
        for (const Tensor& t : list) to.emplace_back(t, /*is_output=*/false);
      }
    };
    node->saved.reserve(1 + count_of(to_save));
    node->for_recompute.reserve(count_of(for_recompute));
    node->saved.emplace_back(outputs[0], /*is_output=*/true);
    save(node->saved, to_save);
    save(node->for_recompute, for_recompute);
    if (Formula::kRecomputes) {
      node->output_version = impl::version_counter(outputs[0]);
      node->saved_version = node->output_version.current_version();
    }
  }
  return outputs;
}

}  // namespace rnnkern
