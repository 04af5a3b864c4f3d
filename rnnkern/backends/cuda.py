"""The compiled CUDA kernels (csrc/cuda/): the ops of the CPU, under the CUDA key.

A float64 call, or one of larger H than the kernels hold, is Triton's; a script that calls the ops
themselves gets it from there too.
"""

import bisect
import functools
import itertools
import os
from typing import NamedTuple

import torch

from .. import library
from .cpu import ACTIVATIONS

COMPILED = library.loaded and hasattr(torch.ops.rnnkern, "cuda_kernels")
# What products of a dtype are made of; float32's by torch's switch at the time of the call.
PRECISIONS = {
    torch.bfloat16: ("bfloat16",),
    torch.float16: ("float16",),
    torch.float32: ("TF32", "3xTF32"),
}
RECURRENCES = ("forward", "backward", "linear")


class Plan(NamedTuple):
    """How a scan would run: the regime (csrc/cuda/kernel.h), the rows of the batch in a tile, and
    the blocks that run one together; or why no kernel serves it. Of regime
    "steps" the Triton backend launches kernels of single steps, since that is faster."""

    regime: str
    tile_rows: int
    blocks: int
    refusal: str


def kernels() -> list[str]:
    """A line for each CUDA kernel that is compiled into the library."""
    return torch.ops.rnnkern.cuda_kernels() if COMPILED else []


def plan(
    hidden_size: int,
    batch: int = 1,
    steps: int = 1,
    groups: int = 1,
    precision: str = "bfloat16",
    recurrence: str = "forward",
    nonlinearity: str = "tanh",
    index: int = 0,
) -> Plan:
    """What the launcher makes of a scan on the GPU of this index.

    precision: "bfloat16", "float16" or, of float32, "TF32" or "3xTF32", which is IEEE's.
    recurrence: "forward", "backward", "linear", or "layer", which is forward from few features.
    """
    shape = (steps, batch, hidden_size, groups)
    device = torch.device("cuda", index)
    return Plan(*torch.ops.rnnkern.cuda_plan(device, precision, recurrence, nonlinearity, *shape))


def _not_compiled() -> str:
    """Why the library has no CUDA kernels, and how it gets them."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build, so the library has no CUDA kernels"
    return (
        "the library was built without its CUDA kernels: have an nvcc of CUDA "
        f"{torch.version.cuda.split('.')[0]} on PATH or in CUDA_HOME and build it again with "
        "`RNNKERN_CUDA=1 pip install --no-build-isolation -e .`"
    )


class _Capacity(NamedTuple):
    """The largest H of a dtype that a GPU's kernels hold in all recurrences and precisions, and in
    any; and why not even the smallest, or ""."""

    all: int
    any: int
    refusal: str


@functools.cache
def _ask(dtype: torch.dtype, index: int, _regime: str | None) -> _Capacity:
    def refusal(hidden_size: int, precision: str, recurrence: str) -> str:
        how = {"precision": precision, "recurrence": recurrence, "index": index}
        return plan(hidden_size, **how).refusal

    ways = list(itertools.product(PRECISIONS[dtype], RECURRENCES))
    try:
        # Whoever holds an H holds all below.
        most = [
            bisect.bisect(range(1, 1 << 16), False, key=lambda h, way=way: bool(refusal(h, *way)))
            for way in ways
        ]
        refusals = [refusal(1, *way) for way in ways]
        return _Capacity(min(most), max(most), next(filter(None, refusals), ""))
    except RuntimeError as error:  # of the driver, for one
        return _Capacity(0, 0, str(error).splitlines()[0])


# torch.compile traces none of this.
@torch.compiler.assume_constant_result
def _capacities(dtype: torch.dtype) -> tuple[tuple[int, int, str], ...]:
    """Of every GPU, or none."""
    regime = os.environ.get("RNNKERN_CUDA_REGIME")
    return tuple(tuple(_ask(dtype, i, regime)) for i in range(torch.cuda.device_count()))


def never_runs(x: torch.Tensor, hidden_size: int) -> bool:
    """Whether the ops never run these kernels on such a tensor, and so Triton's."""
    return x.dtype not in PRECISIONS or hidden_size > _capacities(x.dtype)[x.device.index][1]


def unsupported(device, dtype, hidden_size, groups, nonlinearity) -> list[str]:
    reasons = []
    if not library.loaded:
        reasons.append(f"the compiled library is not loaded: {library.reason}")
    elif not COMPILED:
        reasons.append(_not_compiled())
    if device != "cuda":
        reasons.append(f"it runs on CUDA GPUs, the tensors are on {device}")
    elif not torch.cuda.is_available():
        reasons.append("torch sees no CUDA GPU")
    if dtype not in PRECISIONS:
        reasons.append(f"it has no kernel for {dtype}")
    if nonlinearity is not None and nonlinearity not in ACTIVATIONS:
        reasons.append(f"it has no kernel for the nonlinearity '{nonlinearity}'")
    for index, (most, _, refusal) in enumerate(() if reasons else _capacities(dtype)):
        if refusal:
            reasons.append(f"cuda:{index}: {refusal}")
        elif hidden_size > most:
            reasons.append(f"cuda:{index}: its kernels for {dtype} hold H up to {most}")
    return reasons


if library.loaded:
    rnn_scan = torch.ops.rnnkern.rnn_scan.default
    rnn_layer = torch.ops.rnnkern.rnn_layer.default
    linear_scan = torch.ops.rnnkern.linear_scan.default
