// The short way from Python into rnn_layer, for the calls that are most common and may be smallest:
// plain tensors on the CPU. torch.ops takes 4 us to read nine arguments, which at the notebook's
// sizes is more than the scan; this takes a tenth of it.
//
// Each function returns None where a call is not plain (a tensor subclass or a mode wants to see
// it, it is being traced, or something does not fit), and the caller goes the way that serves or
// refuses everything.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/transpose.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops.h"

namespace rnnkern {
namespace {

// Tensors that Python objects own, which live as long as this does. In inference they are borrowed:
// a second owner in C++ makes torch count the object's owners too, each time under Python's
// lock. Where autograd will keep them, they are
// owned.
class Tensors {
 public:
  Tensors() : borrow_(!at::GradMode::is_enabled()) {}
  Tensors(const Tensors&) = delete;
  ~Tensors() {
    for (Tensor& t : tensors_) {
      if (borrow_) c10::MaybeOwnedTraits<Tensor>::destroyBorrow(t);
    }
    for (PyObject* object : objects_) Py_DECREF(object);
  }

  void push_back(PyObject* object) {
    const Tensor& t = THPVariable_Unpack(object);
    if (borrow_) {
      objects_.push_back(Py_NewRef(object));
      tensors_.push_back(c10::MaybeOwnedTraits<Tensor>::createBorrow(t));
    } else {
      tensors_.push_back(t);
    }
  }
  bool empty() const { return tensors_.empty(); }
  const Tensor& operator[](size_t i) const { return tensors_[i]; }
  operator at::TensorList() const { return tensors_; }

 private:
  bool borrow_;
  c10::SmallVector<PyObject*, 8> objects_;
  c10::SmallVector<Tensor, 8> tensors_;
};

// Lets other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// Whether someone wants to see the call itself, as torch.ops would show it.
bool observed() {
  return at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled();
}

bool is_plain(PyObject* object) { return THPVariable_CheckExact(object); }

// A tensor that the CPU's kernels compute with. Symbolic sizes are for those who trace.
bool is_computed(const Tensor& t) {
  const auto type = t.scalar_type();
  return t.device().is_cpu() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
         (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf);
}

// False: there is something else in the list.
bool read(PyObject* list, Tensors& out) {
  if (!PyList_CheckExact(list)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* item = PyList_GET_ITEM(list, i);
    if (!is_plain(item)) return false;
    out.push_back(item);
  }
  return true;
}

bool read(PyObject* object, OptTensor& out) {
  if (object == Py_None) return true;
  if (!is_plain(object)) return false;
  out = THPVariable_Unpack(object);
  return true;
}

c10::string_view read_string(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw python_error();
  return {text, static_cast<size_t>(size)};
}

PyObject* wrap(const std::tuple<Tensor, Tensor>& outputs) {
  PyObject* out = PyTuple_New(2);
  if (out == nullptr) throw python_error();
  PyTuple_SET_ITEM(out, 0, THPVariable_Wrap(std::get<0>(outputs)));
  PyTuple_SET_ITEM(out, 1, THPVariable_Wrap(std::get<1>(outputs)));
  return out;
}

// rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity): the
// op.
PyObject* rnn_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "rnn_layer: expected 9 arguments, got ", count);
  OptTensor h0, batch_sizes;
  Tensors weight_ih, weight_hh, bias_ih, bias_hh;
  const bool plain = !observed() && is_plain(args[0]) && read(args[1], h0) &&
                     read(args[2], weight_ih) && read(args[3], weight_hh) &&
                     read(args[4], bias_ih) && read(args[5], bias_hh) &&
                     read(args[6], batch_sizes) && PyList_CheckExact(args[7]) &&
                     PyUnicode_CheckExact(args[8]) && is_computed(THPVariable_Unpack(args[0]));
  if (!plain || weight_hh.empty()) Py_RETURN_NONE;
  c10::SmallVector<int64_t, 2> reverse;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(args[7]); ++g) {
    reverse.push_back(PyObject_IsTrue(PyList_GET_ITEM(args[7], g)) == 1);
  }
  const Tensor& x = THPVariable_Unpack(args[0]);
  const c10::string_view nonlinearity = read_string(args[8]);
  std::tuple<Tensor, Tensor> outputs;
  {
    const WithoutGil others;
    outputs = ops::rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse,
                             nonlinearity);
  }
  return wrap(outputs);
  END_HANDLE_TH_ERRORS
}

// rnn_forward(parameters, names, input, hx, batch_first, bidirectional, nonlinearity): forward of a
// module with one layer, of the parameters (a dict) with these names (a list), for a batch of
// sequences.
PyObject* rnn_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "rnn_forward: expected 7 arguments, got ", count);
  PyObject *parameters = args[0], *names = args[1];
  OptTensor hx;
  const bool plain = !observed() && PyDict_CheckExact(parameters) && PyList_CheckExact(names) &&
                     is_plain(args[2]) && read(args[3], hx) && PyUnicode_CheckExact(args[6]) &&
                     is_computed(THPVariable_Unpack(args[2]));
  if (!plain) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(args[2]);
  const bool batch_first = PyObject_IsTrue(args[4]) == 1;

  // weight_ih, weight_hh and, if there are any, bias_ih, bias_hh of one direction, then of the
  // other.
  Tensors lists[4];
  const Py_ssize_t size = PyList_GET_SIZE(names), groups = PyObject_IsTrue(args[5]) == 1 ? 2 : 1;
  const Py_ssize_t each = size / groups;
  if (size != groups * each || (each != 2 && each != 4)) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* parameter = PyDict_GetItemWithError(parameters, PyList_GET_ITEM(names, i));
    if (parameter == nullptr || !is_plain(parameter)) Py_RETURN_NONE;
    const Tensor& weight = THPVariable_Unpack(parameter);
    if (!weight.device().is_cpu() || weight.scalar_type() != x.scalar_type()) Py_RETURN_NONE;
    lists[i % each].push_back(parameter);
  }
  const auto& [weight_ih, weight_hh, bias_ih, bias_hh] = lists;

  // What torch.nn.RNN refuses, with other exceptions than the op's.
  if (x.dim() != 3 || weight_ih[0].dim() != 2 || x.size(2) != weight_ih[0].size(1)) Py_RETURN_NONE;
  if (x.size(batch_first ? 1 : 0) == 0) Py_RETURN_NONE;
  if (hx && (hx->dim() != 3 || hx->size(0) != groups ||
             hx->size(1) != x.size(batch_first ? 0 : 1) || hx->size(2) != weight_ih[0].size(0) ||
             hx->scalar_type() != x.scalar_type() || !hx->device().is_cpu())) {
    Py_RETURN_NONE;
  }
  const c10::string_view nonlinearity = read_string(args[6]);
  constexpr int64_t reverse[] = {0, 1};
  std::tuple<Tensor, Tensor> outputs;
  {
    const WithoutGil others;
    const Tensor transposed = batch_first ? x.transpose(0, 1) : Tensor();
    outputs = ops::rnn_layer(batch_first ? transposed : x, hx, weight_ih, weight_hh, bias_ih,
                             bias_hh, std::nullopt, Flags(reverse, groups), nonlinearity);
    if (batch_first) std::get<0>(outputs) = std::get<0>(outputs).transpose(0, 1);
  }
  return wrap(outputs);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"rnn_layer", reinterpret_cast<PyCFunction>(rnn_layer), METH_FASTCALL, nullptr},
    {"rnn_forward", reinterpret_cast<PyCFunction>(rnn_forward), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "rnnkern._python", nullptr, -1, methods};

}  // namespace
}  // namespace rnnkern

PyMODINIT_FUNC PyInit__python() { return PyModule_Create(&rnnkern::definition); }
