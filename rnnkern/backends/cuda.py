"""The compiled CUDA kernels (csrc/cuda/): the ops of the CPU, under the CUDA key.

A float64 call, or one of larger H than the kernels hold, is Triton's; a script that calls the ops
themselves gets it from there too.
"""

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
    the blocks that run one together; or why no kernel serves it."""

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


@torch.compiler.assume_constant_result
def _refusals(dtype: torch.dtype, hidden_size: int, index: int) -> list[str]:
    """What a GPU has against such calls, for each recurrence and precision; "": it runs them."""
    return [
        plan(hidden_size, precision=precision, recurrence=recurrence, index=index).refusal
        for precision in PRECISIONS[dtype]
        for recurrence in RECURRENCES
    ]


def never_runs(x: torch.Tensor, hidden_size: int) -> bool:
    """Whether the ops never run these kernels on such a tensor, and so Triton's."""
    return x.dtype not in PRECISIONS or all(_refusals(x.dtype, hidden_size, x.device.index))


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
    if not reasons and hidden_size > 0:
        found = [_refusals(dtype, hidden_size, i) for i in range(torch.cuda.device_count())]
        reasons += dict.fromkeys(reason for each in found for reason in each if reason)
    return reasons


if library.loaded:
    rnn_scan = torch.ops.rnnkern.rnn_scan.default
    rnn_layer = torch.ops.rnnkern.rnn_layer.default
    linear_scan = torch.ops.rnnkern.linear_scan.default
