"""oneDNN's vanilla RNN, called through its C API (ctypes: no headers, no compiler).

The library is the wheel onednn-cpu-gomp's. libtorch_cpu has a newer oneDNN inside but exports no
symbol of it, and the newer wheels (onednn) run on SYCL's threads. This one runs on GNU OpenMP,
whose libgomp.so.1 is the one that torch has loaded: torch.set_num_threads sets its threads too.

Letters: T steps, B batch, I input_size, H hidden_size; one layer, one direction, h_0 = 0.
"""

import ctypes
import functools
import importlib.metadata
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_void_p

import torch
from torch import Tensor

WHEEL = "onednn-cpu-gomp"
# Enumerators of dnnl_types.h, the same in 3.2 and 3.13.
CPU, IN_ORDER, ANY, LEFT_TO_RIGHT, TANH = 1, 1, 1, 1, 33
TRAINING, INFERENCE, BACKWARD, OVERWRITE = 64, 96, 128, 1
WEIGHTS, DIFF_WEIGHTS, WORKSPACE, NAME = 131, 132, 135, 8  # to query
TYPES = {torch.float32: 3, torch.bfloat16: 2}
# DNNL_ARG_*
SRC, SRC_ITER, DST, DST_ITER, W_LAYER, W_ITER, BIAS, SPACE = 1, 2, 17, 18, 33, 34, 41, 64
DIFF_SRC, DIFF_SRC_ITER, DIFF_DST, DIFF_DST_ITER = 129, 130, 145, 146
DIFF_W_LAYER, DIFF_W_ITER, DIFF_BIAS = 161, 162, 169


class _Argument(ctypes.Structure):
    _fields_ = [("index", c_int), ("memory", c_void_p)]


@functools.cache
def library() -> ctypes.CDLL:
    """The wheel's libdnnl.

    Raises:
        ImportError: the wheel is not installed.
    """
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"no {WHEEL}") from error
    path = next(file.locate() for file in files if file.name == "libdnnl.so.3")
    loaded = ctypes.CDLL(str(path))
    loaded.dnnl_memory_desc_get_size.restype = c_size_t
    loaded.dnnl_memory_desc_get_size.argtypes = [c_void_p]
    loaded.dnnl_primitive_desc_query_md.restype = c_void_p
    loaded.dnnl_primitive_desc_query_md.argtypes = [c_void_p, c_int, c_int]
    return loaded


def _new(create: str, *arguments) -> c_void_p:
    """What a dnnl_*_create makes. Raises NotImplementedError where oneDNN has no kernel for it."""
    made = c_void_p()
    status = getattr(library(), f"dnnl_{create}_create")(byref(made), *arguments)
    if status:
        raise NotImplementedError(f"oneDNN's {create}_create returns {status}")
    return made


@functools.cache
def _engine() -> c_void_p:
    return _new("engine", CPU, c_size_t(0))


@functools.cache
def _stream() -> c_void_p:
    return _new("stream", _engine(), IN_ORDER)


def _description(dtype: torch.dtype, *size: int, strides: tuple[int, ...] | None = None):
    """Of a memory; strides None: in whatever layout the primitive likes."""
    made, dims = c_void_p(), (c_int64 * 12)(*size)
    if strides is None:
        create, layout = library().dnnl_memory_desc_create_with_tag, ANY
    else:
        create, layout = library().dnnl_memory_desc_create_with_strides, (c_int64 * 12)(*strides)
    if create(byref(made), len(size), dims, TYPES[dtype], layout):
        raise ValueError(f"oneDNN refuses a memory of {size}, strides {strides}")
    return made


def _wanted(primitive: c_void_p, what: int, index: int = 0) -> c_void_p:
    """The description that a primitive's description has chosen."""
    return c_void_p(library().dnnl_primitive_desc_query_md(primitive, what, index))


class _Memory:
    """A dnnl_memory over a tensor's memory, or over its own."""

    def __init__(self, description: c_void_p, tensor: Tensor | None = None) -> None:
        if tensor is None:
            size = library().dnnl_memory_desc_get_size(description)
            tensor = torch.zeros(max(size, 1), dtype=torch.uint8)
        self.description, self.tensor = description, tensor
        self.handle = _new("memory", description, _engine(), c_void_p(tensor.data_ptr()))
        self._destroy = library().dnnl_memory_destroy

    def __del__(self) -> None:
        self._destroy(self.handle)


class _Run:
    """A primitive with its arguments, ready to execute."""

    def __init__(self, description: c_void_p, arguments: dict[int, _Memory]) -> None:
        self.primitive = _new("primitive", description)
        self.keep = arguments
        handles = [_Argument(i, memory.handle) for i, memory in arguments.items()]
        self.arguments = (_Argument * len(handles))(*handles)
        self.execute = library().dnnl_primitive_execute
        self._destroy = library().dnnl_primitive_destroy

    def __del__(self) -> None:
        self._destroy(self.primitive)  # and its scratchpad, which can be as large as the states

    def __call__(self) -> None:
        status = self.execute(self.primitive, _stream(), len(self.arguments), self.arguments)
        if status:
            raise RuntimeError(f"oneDNN's execute returns {status}")


def _reorder(source: _Memory, to: _Memory) -> _Run:
    made = _new(
        "reorder_primitive_desc", source.description, _engine(), to.description, _engine(), None
    )
    return _Run(made, {SRC: source, DST: to})


def _over(tensor: Tensor, *size: int, strides: tuple[int, ...]) -> _Memory:
    return _Memory(_description(tensor.dtype, *size, strides=strides), tensor)


def _rows(tensor: Tensor) -> _Memory:
    """(T, B, I) or (T, B, H)."""
    return _over(tensor, *tensor.shape, strides=tensor.stride())


def _weight(tensor: Tensor) -> _Memory:
    """(layers, directions, inputs, gates, outputs) over torch's (outputs, inputs)."""
    n, (outputs, inputs) = tensor.numel(), tensor.shape
    return _over(tensor, 1, 1, inputs, 1, outputs, strides=(n, n, 1, n, inputs))


def _vector(tensor: Tensor) -> _Memory:
    """(layers, directions, gates, outputs) over (H,)."""
    n = tensor.numel()
    return _over(tensor, 1, 1, 1, n, strides=(n, n, n, 1))


def _state(batch: int, hidden: int, dtype: torch.dtype) -> _Memory:
    """Zeros: (layers, directions, B, H)."""
    n = batch * hidden
    zeros = torch.zeros(batch, hidden, dtype=dtype)
    return _over(zeros, 1, 1, batch, hidden, strides=(n, n, hidden, 1))


def _in_layout(memory: _Memory, description: c_void_p) -> _Memory:
    copy = _Memory(description)
    _reorder(memory, copy)()
    return copy


def on_one_thread(call: Callable, threads: int) -> Callable:
    """The call with OpenMP at one thread, and at `threads` again after it; 1 us more."""
    set_threads = ctypes.CDLL("libgomp.so.1").omp_set_num_threads  # torch's: it is loaded

    def on_one():
        set_threads(1)
        result = call()
        set_threads(threads)
        return result

    return on_one


class VanillaRNN:
    """One shape, its memories and its primitives.

    The weights are in oneDNN's own layouts beforehand, as for a model that only infers; training
    has that gift too (ours packs them in the call). What it computes goes to the same memory every
    time.

    x: (T, B, I) of float32 or bfloat16. w_ih: (H, I), w_hh: (H, H), bias: (H,), float32.
    """

    def __init__(self, x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor) -> None:
        self.x, dtype = x, x.dtype
        (steps, batch, inputs), hidden = x.shape, w_hh.size(0)
        self.out = torch.empty(steps, batch, hidden, dtype=dtype)

        self._source, self._out = _rows(x), _rows(self.out)
        self._weights, self._bias = (_weight(w_ih), _weight(w_hh)), _vector(bias)
        any_layout = [
            _description(dtype, 1, 1, width, 1, hidden, strides=None) for width in (inputs, hidden)
        ]
        # src_layer, src_iter, weights, bias, dst_layer, dst_iter. Both states are there, since
        # without them 3.2 takes the gradient of w_hh from h_t in the place of h_{t-1}.
        self._initial, self._last = (_state(batch, hidden, dtype) for _ in "12")
        self._descriptions = (
            self._source.description,
            self._initial.description,
            *any_layout,
            self._bias.description,
            self._out.description,
            self._last.description,
        )
        self._forward = self._forward_run(INFERENCE)[0]

    def _forward_run(self, kind: int) -> tuple[_Run, c_void_p]:
        made = _new(
            "vanilla_rnn_forward_primitive_desc",
            *(_engine(), kind, TANH, LEFT_TO_RIGHT, *self._descriptions),
            *(0, c_float(0), c_float(0), None),
        )
        arguments = {
            SRC: self._source,
            SRC_ITER: self._initial,
            W_LAYER: _in_layout(self._weights[0], _wanted(made, WEIGHTS, 0)),
            W_ITER: _in_layout(self._weights[1], _wanted(made, WEIGHTS, 1)),
            BIAS: self._bias,
            DST: self._out,
            DST_ITER: self._last,
        }
        if kind == TRAINING:
            arguments[SPACE] = _Memory(_wanted(made, WORKSPACE))
        return _Run(made, arguments), made

    def implementation(self) -> str:
        """Which of oneDNN's kernels runs."""
        name = ctypes.c_char_p()
        described = c_void_p()
        library().dnnl_primitive_get_primitive_desc(self._forward.primitive, byref(described))
        library().dnnl_primitive_desc_query(described, NAME, 0, byref(name))
        return (name.value or b"").decode()

    def forward(self) -> Tensor:
        """The output, (T, B, H)."""
        self._forward()
        return self.out

    def make_train(self, grad: Tensor):
        """A call for forward and backward with this gradient (T, B, H) of the output.

        It returns the gradients of x, w_ih, w_hh and the bias, laid out as torch's.
        """
        forward, hint = self._forward_run(TRAINING)
        batch, hidden, dtype = *self._initial.tensor.shape, self.x.dtype
        grads = [torch.empty_like(self.x), *(torch.empty_like(m.tensor) for m in self._weights)]
        grads.append(torch.empty_like(self._bias.tensor))
        made = _new(
            "vanilla_rnn_backward_primitive_desc",
            *(_engine(), BACKWARD, TANH, LEFT_TO_RIGHT, *self._descriptions, *self._descriptions),
            *(OVERWRITE, c_float(0), c_float(0), hint, None),
        )
        blocked = [_Memory(_wanted(made, DIFF_WEIGHTS, i)) for i in range(2)]
        backward = _Run(
            made,
            forward.keep
            | {
                W_LAYER: _in_layout(self._weights[0], _wanted(made, WEIGHTS, 0)),
                W_ITER: _in_layout(self._weights[1], _wanted(made, WEIGHTS, 1)),
                DIFF_DST: _rows(grad),
                DIFF_DST_ITER: _state(batch, hidden, dtype),
                DIFF_SRC: _rows(grads[0]),
                DIFF_SRC_ITER: _state(batch, hidden, dtype),
                DIFF_W_LAYER: blocked[0],
                DIFF_W_ITER: blocked[1],
                DIFF_BIAS: _vector(grads[3]),
            },
        )
        plain = [
            _reorder(source, _weight(to)) for source, to in zip(blocked, grads[1:3], strict=True)
        ]

        def train() -> list[Tensor]:
            forward()
            backward()
            for reorder in plain:
                reorder()
            return grads

        return train
