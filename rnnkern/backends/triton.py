"""Fused Triton kernels (triton_kernels.py) on CUDA GPUs.

Where the compiled library is loaded, these are its ops' implementations under the CUDA key, so the
derivatives, vmap, torch.compile, export and autocast of CUDA tensors are those of CPU tensors. Of a
library with CUDA kernels (cuda.py) they are so for the calls that those do not serve. Else the
scans go through autograd.py's Functions, as the eager backend's do, and as that they are plain
torch operations under torch.compile and torch.vmap.

With TRITON_INTERPRET=1 in the environment from the start, Triton interprets the kernels with numpy,
and the backend runs tensors on the CPU, if it is named. For tests: it is very slow.
"""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import autograd, library, reference
from ..checks import (
    check_linear_scan,
    check_rnn_layer,
    check_rnn_layer_backward,
    check_rnn_scan,
    check_rnn_scan_backward,
)
from ..reference import ACTIVATIONS
from . import cuda, eager

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None  # here: no torch.compile traces it
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST_CAPABILITY = (8, 0)  # TF32 and bfloat16 products

# Up to so many features, x_proj is made inside the scan, by a product 16 deep, the least there is:
# cheap for tensor cores, but not for IEEE's float32, which they do not multiply.
FUSED_FEATURES = 8
FEATURES_BLOCK = 16


class Fused(NamedTuple):
    """How scan_kernel runs: rows of a tile, warps, and how many steps ahead it reads."""

    rows: int
    warps: int
    unroll: int


class Steps(NamedTuple):
    """How step_kernel runs: units and depth of a tile, warps, stages of its pipeline."""

    units: int
    depth: int
    warps: int
    stages: int


# How products of each kind run: scan_kernel for H up to the last key, by H rounded up to a power of
# two, chosen by what the compiler makes of it (tests/test_triton.py: nothing spills in the loop).
# Beyond, step_kernel, by the rows of its tile: the fewest that let all tiles run at once, for that
# was fastest on an H100, of rows 16 to 128, units 64 and 128, and depths 32 to 128. IEEE's
# float32, of which tensor cores have no product, is multiplied by cuBLAS where torch's switch for
# matrix products lets it, from TORCH_HIDDEN on: a step of 16 rows took it 9 us at H 512, 33 at 256.
FUSED = {
    "half": {
        16: Fused(16, 2, 2), 32: Fused(16, 2, 4), 64: Fused(16, 4, 4),
        128: Fused(16, 8, 4), 256: Fused(16, 16, 1),
    },
    "tf32": {
        16: Fused(16, 2, 4), 32: Fused(16, 2, 3), 64: Fused(16, 4, 4), 128: Fused(16, 8, 4),
    },
    "ieee": {16: Fused(16, 2, 4), 32: Fused(16, 4, 4), 64: Fused(16, 8, 4)},
    "float64": {16: Fused(16, 2, 2), 32: Fused(16, 4, 2), 64: Fused(16, 8, 2)},
}  # fmt: skip
STEPS = {
    "half": {16: Steps(64, 128, 4, 4), 32: Steps(64, 128, 4, 4), 64: Steps(64, 128, 4, 3)},
    "tf32": {16: Steps(64, 64, 4, 4), 32: Steps(64, 64, 4, 4), 64: Steps(64, 64, 4, 3)},
    "ieee": {16: Steps(32, 32, 4, 2), 32: Steps(32, 32, 4, 2)},
    "float64": {16: Steps(32, 32, 4, 2), 32: Steps(32, 16, 4, 2)},
}
TORCH_HIDDEN = 512
# Groups of one launch: it has one bit of an int32 for each one's direction; and of groups that all
# run one way, as many as a grid's second dimension may have.
MIXED_GROUPS, GROUPS = 31, 65535


@torch.compiler.assume_constant_result  # torch.compile does not trace into it
def _capability() -> tuple[int, int]:
    """The least of all visible GPUs'."""
    return min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def unsupported(device, dtype, hidden_size, groups, nonlinearity) -> list[str]:
    reasons = []
    if not INSTALLED:
        reasons.append("the package triton is not installed")
    if INTERPRETED:
        if device != "cpu":
            reasons.append(f"under TRITON_INTERPRET=1 it runs on the CPU, not on {device}")
    elif device != "cuda":
        reasons.append(f"it runs on CUDA GPUs, the tensors are on {device}")
    elif not torch.cuda.is_available():
        reasons.append("torch sees no CUDA GPU")
    elif _capability() < LEAST_CAPABILITY:
        least, found = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, _capability()))
        reasons.append(f"it needs GPUs of compute capability {least}, there is one of {found}")
    if dtype not in DTYPES:
        reasons.append(f"it has no kernel for {dtype}")
    if nonlinearity is not None and nonlinearity not in ACTIVATIONS:
        reasons.append(f"it has no kernel for the nonlinearity '{nonlinearity}'")
    return reasons


# ---- launches ----


def _kind(dtype: torch.dtype) -> str:
    """Which kind of products a dtype's are; float32's as torch.nn.RNN's, by torch's own switch."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"
    return "float64" if dtype == torch.float64 else "half"


def _block(hidden: int) -> int:
    """The units of scan_kernel's tile."""
    return max(16, 1 << (hidden - 1).bit_length())


def _fused(kind: str, hidden: int, x: Tensor) -> Fused | None:
    """How scan_kernel runs; None where one program cannot hold the weight."""
    block = _block(hidden)
    how = FUSED[kind].get(block)
    if block == 256 and hidden % 16 != 0:  # it would be read in pieces, for which registers lack
        return None
    if how is None or not x.is_cuda:
        return how
    # The weight, and up to four tiles of states on their way from one layout to another.
    needed = block * (block + 4 * how.rows) * x.element_size()
    return how if needed <= _shared_memory(x.device) else None


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of it that a program can have; AMD's all have 64 KiB, and do not say."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 65536)


def _step_rows(kind: str, hidden: int, batch: int, groups: int, device: torch.device) -> int:
    """The rows of step_kernel's tile."""
    multiprocessors = 1  # the interpreter runs them one by one
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    for rows, how in STEPS[kind].items():
        if -(-batch // rows) * -(-hidden // how.units) * groups <= multiprocessors:
            return rows
    return max(STEPS[kind])


def _by_torch(kind: str, hidden: int) -> bool:
    """Whether torch multiplies a step's state and weight in float32 as IEEE has it."""
    precise = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return kind == "ieee" and hidden >= TORCH_HIDDEN and precise


def _plain(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


def _spaced(tensors: Sequence[Tensor], contiguous: bool = False) -> tuple[Tensor, int]:
    """The first of the tensors, and how many elements it is from each to the next: of two, wherever
    they are, and of any number that lie evenly. Others are stacked."""
    size, strides = tensors[0].element_size(), {t.stride() for t in tensors}
    distances = {b.data_ptr() - a.data_ptr() for a, b in pairwise(tensors)} or {0}
    distance = distances.pop()
    even = not distances and distance % size == 0 and len(strides) == 1
    as_they_are = not any(t.is_neg() or (contiguous and not t.is_contiguous()) for t in tensors)
    # On AMD the compiler goes by 32-bit offsets within one tensor.
    if even and as_they_are and (len(tensors) == 1 or not torch.version.hip):
        return tensors[0], distance // size
    stack = torch.stack([*tensors])
    return stack[0], stack.stride(0)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Integers of the CPU on the device, which nobody waits for."""
    if device.type == "cpu":
        return values
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            return values.pin_memory().to(device, non_blocking=True)
        # The graph would copy what is in that host memory by the time it is replayed.
        there = torch.empty(values.shape, dtype=values.dtype, device=device)
        for place, value in zip(there.view(-1), values.flatten().tolist(), strict=True):
            place.fill_(value)
        return there


def _steps_table(batch_sizes: Tensor | None, device: torch.device) -> Tensor | None:
    """(2, T): each step's batch size and first row."""
    if batch_sizes is None:
        return None
    return _on_device(torch.stack([batch_sizes, batch_sizes.cumsum(0) - batch_sizes]), device)


class _Layer(NamedTuple):
    """What scan_kernel makes x_proj of, besides x."""

    weight_ih: list[Tensor]
    bias_ih: list[Tensor]
    bias_hh: list[Tensor]


class _Scan(NamedTuple):
    """A call of a kernel; shapes as in csrc/signatures.h, rows and states contiguous."""

    mode: str  # a constant of triton_kernels
    nonlinearity: str
    batch: int
    weight: list[Tensor]
    reverse: list[bool]
    table: Tensor | None  # _steps_table
    output: Tensor  # rows
    input: Tensor | None = None  # rows; None: zeros
    aux: Tensor | None = None  # rows
    initial: Tensor | None = None  # states
    entry: Tensor | None = None  # states
    last: Tensor | None = None  # states
    layer: _Layer | None = None

    def groups(self, begin: int, end: int) -> "_Scan":
        """Of some groups alone; the rows keep their stride."""
        hidden = self.weight[0].size(0)

        def columns(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[..., begin * hidden : end * hidden]

        def cut(x):
            return None if x is None else x[begin:end]

        layer = self.layer and _Layer(*(cut(tensors) for tensors in self.layer))
        return self._replace(
            weight=cut(self.weight),
            reverse=cut(self.reverse),
            output=columns(self.output),
            input=self.input if layer else columns(self.input),
            aux=columns(self.aux),
            initial=cut(self.initial),
            entry=cut(self.entry),
            last=cut(self.last),
            layer=layer,
        )


def _run(scan: _Scan) -> None:
    """Launch the kernels of a scan, on the current stream of its device."""
    groups, hidden = len(scan.weight), scan.weight[0].size(0)
    row_stride = groups * hidden
    if scan.batch * row_stride == 0:
        return
    largest = max(scan.output.size(0), scan.batch, 16 * row_stride)
    if largest >= 2**31:
        raise ValueError(
            "rnnkern: the Triton kernels expect N, B and 16*G*H below 2^31, got one of "
            f"{largest}: rows {list(scan.output.shape)}"
        )
    device = scan.output.device
    at = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    alike = len(set(map(bool, scan.reverse))) == 1
    each = GROUPS if alike else MIXED_GROUPS
    with at:
        for begin in range(0, groups, each):
            _launch(scan if groups <= each else scan.groups(begin, begin + each), row_stride)


def _launch(scan: _Scan, row_stride: int) -> None:
    """The kernel of a scan of so many groups as one launch takes."""
    from . import triton_kernels as kernels

    groups, hidden, batch, table = len(scan.weight), scan.weight[0].size(0), scan.batch, scan.table
    steps = scan.output.size(0) if table is None else table.size(1)
    flags = [bool(flag) for flag in scan.reverse]
    reverse = -flags[0] if len({*flags}) == 1 else sum(flag << g for g, flag in enumerate(flags))
    kind, x = _kind(scan.output.dtype), scan.output
    how, block = _fused(kind, hidden, x), _block(hidden)
    if how is None and kind == "tf32" and scan.mode == "BACKWARD":
        # Hopper's instructions have no transposed factors of 32 bits.
        weight = torch.stack([w.t() for w in scan.weight])
        stride_g, stride_n, stride_k = weight.stride()
    else:
        weight, stride_g = _spaced(scan.weight)
        stride_n, stride_k = weight.stride()
        if scan.mode == "BACKWARD":  # by W^T
            stride_n, stride_k = stride_k, stride_n
    shared = (weight, table, steps, batch, hidden, int(reverse))
    shared += (row_stride, stride_n, stride_k, stride_g)

    precision = "tf32" if kind == "tf32" else "ieee"
    # Inline assembly is NVIDIA's.
    approximate = x.dtype == torch.bfloat16 and not INTERPRETED and not torch.version.hip
    variant = (getattr(kernels, scan.mode).value, scan.nonlinearity, precision, approximate)
    variant += (stride_g % 16 == 0,)

    if how is not None:
        layer: list = [None, None, None, 0, 0, 0, 0]
        if scan.layer is not None:
            pairs = [_spaced(t, contiguous=True) if t else (None, 0) for t in scan.layer]
            distances = [distance for _, distance in pairs]
            layer = [*(tensor for tensor, _ in pairs), scan.input.size(-1), *distances]
        kernels.scan_kernel[-(-batch // how.rows), groups](
            *(scan.input, scan.aux, scan.initial, scan.entry, x, scan.last, *shared, *layer),
            *(*variant, block == hidden, block, how.rows, FEATURES_BLOCK, how.unroll),
            num_warps=how.warps,
            num_stages=1,
        )
        return

    rows = _step_rows(kind, hidden, batch, groups, x.device)
    how = STEPS[kind][rows]
    even = hidden % how.units == 0 and hidden % how.depth == 0
    tile = (even, how.units, rows, how.depth)
    grid = (-(-batch // rows), -(-hidden // how.units), groups)
    sums = matrices = None
    if _by_torch(kind, hidden):
        sums = x.new_empty(groups, batch, hidden)
        matrices = torch.stack(scan.weight) if groups > 1 else scan.weight[0].unsqueeze(0)
        matrices = matrices if scan.mode == "BACKWARD" else matrices.mT
    # Without an initial state W meets zeros, of which inf makes NaN.
    state = x.new_zeros(groups, batch, hidden) if scan.initial is None else scan.initial
    spare = [x.new_empty(groups, batch, hidden) for _ in range(2)]
    compiled = None
    for i in range(steps):
        at_end = i == steps - 1 and scan.last is not None
        following = scan.last if at_end else spare[i % 2]
        if sums is not None:
            torch.bmm(state, matrices, out=sums)
        arguments = (i, scan.input, scan.aux, state, sums, scan.entry, x, following, *shared)
        arguments += (*variant, *tile)
        if compiled is not None and not at_end:
            compiled[grid](*arguments)
        else:
            launched = kernels.step_kernel[grid](
                *arguments, num_warps=how.warps, num_stages=how.stages
            )
            # From one spare state to the other it is always the same kernel, and to find that out
            # takes Triton longer than the launch. (The interpreter has none to give.)
            compiled = launched if i > 0 else None
        state = following
    if steps == 0 and scan.last is not None:
        scan.last.copy_(state)


# ---- the kernels of autograd.py, and the ops ----


def _batch(x: Tensor, initial: Tensor | None, batch_sizes: Tensor | None) -> int:
    """The batch size; of packed rows that of the states or, without any, of the first step."""
    if batch_sizes is None:
        return x.size(1)
    if initial is not None:
        return initial.size(1)
    return int(batch_sizes[0]) if batch_sizes.numel() else 0


def _forward(mode, x, h, h0, weight, batch_sizes, reverse, nonlinearity, layer=None):
    """Into h, which may be x itself."""
    batch = _batch(x, h0, batch_sizes)
    h_n = h.new_empty(len(weight), batch, weight[0].size(0))
    table = _steps_table(batch_sizes, h.device)
    scan = _Scan(mode, nonlinearity, batch, weight, reverse, table, h)
    _run(scan._replace(input=x, initial=_plain(h0), last=h_n, layer=layer))
    return h, h_n


def rnn_scan_kernel(x_proj, h0, weight, batch_sizes, reverse, nonlinearity):
    """h and h_n."""
    x = _plain(x_proj)
    h = torch.empty_like(x)
    return _forward("FORWARD", x, h, h0, weight, batch_sizes, reverse, nonlinearity)


def _backward_scan(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse, nonlinearity):
    """v, and the batch sizes where the gradient products find them without waiting."""
    batch = _batch(h, h0 if grad_h_n is None else grad_h_n, batch_sizes)
    v, table = torch.empty_like(h), _steps_table(batch_sizes, h.device)
    flipped = [not flag for flag in reverse]
    scan = _Scan("BACKWARD", nonlinearity, batch, weight, flipped, table, v)
    _run(scan._replace(input=_plain(grad_h), aux=h, entry=_plain(grad_h_n)))
    return v, None if table is None else table[0]


def rnn_scan_backward_kernel(
    grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse, nonlinearity, need
):
    need_h0, need_weight = need
    h = _plain(h)
    v, sizes = _backward_scan(grad_h, grad_h_n, h, h0, weight, batch_sizes, reverse, nonlinearity)
    if not need_h0 or h0 is None:
        grad_h0 = None
    elif h.size(0) == 0:  # it is what is returned
        grad_h0 = torch.zeros_like(h0) if grad_h_n is None else grad_h_n.clone()
    else:
        grad_h0 = autograd.initial_gradient(v, weight, h0.size(1), sizes, reverse)
    grads = autograd.weight_gradients(v, h, h0, len(weight), sizes, reverse) if need_weight else []
    return v, grad_h0, grads


def linear_scan_kernel(u, gain, s0, weight, batch_sizes, reverse):
    """s."""
    u = _plain(u)
    s, table = torch.empty_like(u), _steps_table(batch_sizes, u.device)
    scan = _Scan("LINEAR", "identity", _batch(u, s0, batch_sizes), weight, reverse, table, s)
    _run(scan._replace(input=u, aux=_plain(gain), initial=_plain(s0)))
    return s


def _unless_batched(kernel, plain):
    """The kernel; under a vmap, which hides where its tensors lie, the same in torch operations."""

    def run(*arguments):
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        batched = any(map(torch._C._functorch.is_batchedtensor, tensors))
        return (plain if batched else kernel)(*arguments)

    return run


class _Kernels:
    rnn_scan_kernel = staticmethod(_unless_batched(rnn_scan_kernel, reference.rnn_scan))
    rnn_scan_backward_kernel = staticmethod(
        _unless_batched(rnn_scan_backward_kernel, eager.rnn_scan_backward_kernel)
    )
    linear_scan_kernel = staticmethod(_unless_batched(linear_scan_kernel, reference.linear_scan))


def _rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity):
    check_rnn_scan(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)
    return rnn_scan_kernel(x_proj, h0, weight_hh, batch_sizes, reverse, nonlinearity)


def _rnn_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, nonlinearity):
    check_rnn_layer(x, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes)
    hidden, features = weight_ih[0].shape
    h = x.new_empty(*x.shape[:-1], len(weight_hh) * hidden)
    check_rnn_scan(h, h0, weight_hh, batch_sizes, reverse, nonlinearity)
    rest = (h0, weight_hh, batch_sizes, reverse, nonlinearity)
    x = _plain(x)
    kind = _kind(x.dtype)
    if features <= FUSED_FEATURES and kind != "ieee" and _fused(kind, hidden, x):
        return _forward("LAYER", x, h, *rest, _Layer(weight_ih, bias_ih, bias_hh))
    # One product for all steps and groups, to where h will stand.
    weight, x_proj = torch.cat(weight_ih).t(), h.view(-1, h.size(-1))
    if bias_ih:
        bias = torch.cat(bias_ih) + torch.cat(bias_hh)
        torch.addmm(bias, x.view(-1, features), weight, out=x_proj)
    else:
        torch.mm(x.view(-1, features), weight, out=x_proj)
    return _forward("FORWARD", h, h, *rest)


def _rnn_scan_backward(grad_h, grad_h_n, h, h0, *rest):
    check_rnn_scan_backward(grad_h, grad_h_n, h, h0, *rest[:-1])
    v, grad_h0, grads = rnn_scan_backward_kernel(grad_h, grad_h_n, h, h0, *rest)
    return v, h.new_empty(0) if grad_h0 is None else grad_h0, grads


def _rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, *rest):
    *rest, (need_x, need_h0, need_weight_ih, need_weight_hh, need_bias) = rest
    check_rnn_layer_backward(grad_h, grad_h_n, h, x, h0, weight_ih, weight_hh, *rest)
    v, grad_h0, grad_weight_hh = _rnn_scan_backward(
        grad_h, grad_h_n, h, h0, weight_hh, *rest, (need_h0, need_weight_hh)
    )
    flat_v, flat_x = v.flatten(0, -2), x.flatten(0, -2)
    columns = flat_v.chunk(len(weight_hh), -1) if v.size(-1) else [flat_v] * len(weight_hh)
    grad_x = (flat_v @ torch.cat(weight_ih)).view(x.shape) if need_x else x.new_empty(0)
    grad_weight_ih = [c.t() @ flat_x for c in columns] if need_weight_ih else []
    grad_bias = [c.sum(0) for c in columns] if need_bias else []
    # Both biases of a group have the same gradient, each its own tensor.
    grad_bias += [grad.clone() for grad in grad_bias]
    return grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias


def _linear_scan(u, gain, s0, weight, batch_sizes, reverse):
    check_linear_scan(u, gain, s0, weight, batch_sizes, reverse)
    return linear_scan_kernel(u, gain, s0, weight, batch_sizes, reverse)


_OPS = (_rnn_scan, _rnn_layer, _rnn_scan_backward, _rnn_layer_backward, _linear_scan)


def register(key: str) -> torch.library.Library:
    """Make these the compiled ops' implementations under a dispatch key, while the result lives."""
    implementations = torch.library.Library("rnnkern", "IMPL", key)
    for op in _OPS:
        implementations.impl(op.__name__[1:], op)
    return implementations


def register_apart(key: str) -> torch.library.Library:
    """Make these ops of their own, rnnkern_triton's, under a dispatch key, while the result lives:
    csrc/cuda/ops.cpp calls them for what its own kernels do not serve."""
    ops = torch.library.Library("rnnkern_triton", "DEF")
    for op in _OPS:
        name = op.__name__[1:]
        ops.define(str(getattr(torch.ops.rnnkern, name).default._schema).removeprefix("rnnkern::"))
        ops.impl(name, op, key)
    return ops


# ---- the backend ----


def _beside_cuda(weight_at: int, op, function):
    """The op, where it comes here; the Function where it would run the library's own kernels. The
    weights are the argument at weight_at."""

    def run(x, *rest):
        here = cuda.never_runs(x, rest[weight_at - 1][0].size(0))
        return (op if here else function)(x, *rest)

    return run


rnn_scan, rnn_layer, linear_scan = eager.functions(_Kernels)
if library.loaded and not INTERPRETED:
    _ops = torch.ops.rnnkern
    if cuda.COMPILED:
        _registered = register_apart("CUDA") if INSTALLED else None
        rnn_scan = _beside_cuda(2, _ops.rnn_scan.default, rnn_scan)
        rnn_layer = _beside_cuda(3, _ops.rnn_layer.default, rnn_layer)
        linear_scan = _beside_cuda(3, _ops.linear_scan.default, linear_scan)
    else:
        _registered = register("CUDA")
        rnn_scan, rnn_layer = _ops.rnn_scan.default, _ops.rnn_layer.default
        linear_scan = _ops.linear_scan.default


def warmup(
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    nonlinearity: str = "tanh",
    input_size: int | None = None,
    groups: int = 1,
    device: str | torch.device = "cuda",
) -> None:
    """Compile what a layer of this kind launches, in training and without, before it is needed.

    None of it depends on the number of steps or rows, so one call will do for all. input_size: of
    rnn_layer; None: of rnn_scan. Packed input is apart, and compiled when it first comes.
    Triton keeps what it compiled on disk.
    """
    reverse = [g % 2 == 1 for g in range(groups)]
    options: dict = {"dtype": dtype, "device": torch.device(device)}
    weight_hh = [torch.zeros(hidden_size, hidden_size, **options) for _ in reverse]
    kind = _kind(dtype)
    if _fused(kind, hidden_size, weight_hh[0]):
        batches = {0: 1}
    else:  # one for each tile
        sizes = [2**i for i in range(13, -1, -1)]
        batches = {_step_rows(kind, hidden_size, b, groups, options["device"]): b for b in sizes}
    for batch in batches.values():
        h0 = torch.zeros(groups, batch, hidden_size, **options)
        for initial in (None, h0):
            if input_size is None:
                x = torch.zeros(2, batch, groups * hidden_size, **options)
                h, h_n = rnn_scan_kernel(x, initial, weight_hh, None, reverse, nonlinearity)
            else:
                x = torch.zeros(2, batch, input_size, **options)
                weight_ih = [torch.zeros(hidden_size, input_size, **options) for _ in reverse]
                bias = [torch.zeros(hidden_size, **options) for _ in reverse]
                h, h_n = _rnn_layer(
                    x, initial, weight_ih, weight_hh, bias, bias, None, reverse, nonlinearity
                )
        for grads in ((h, None), (None, h_n), (h, h_n)):
            _backward_scan(*grads, h, h0, weight_hh, None, reverse, nonlinearity)
