"""Loads the compiled ops, `_C.so`, into torch.ops.rnnkern; or keeps the reason why it could not."""

import warnings
from pathlib import Path

import torch

HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` (needs a C++ compiler)"


def _load() -> tuple[str | None, str]:
    file = Path(__file__).with_name("_C.so")
    if not file.exists():
        return None, f"{file} does not exist"
    try:
        torch.ops.load_library(file)
    except OSError as error:  # built against another torch, most of the time
        why = error.__cause__ or error
        return None, f"{file} does not load into torch {torch.__version__}: {why}"
    return str(file), ""


path, reason = _load()
loaded = path is not None
if not loaded:
    warnings.warn(
        f"rnnkern runs without its compiled library and is much slower: {reason}; {HOW_TO_BUILD}",
        RuntimeWarning,
        stacklevel=2,
    )


def capability() -> str:
    """The CPU kernels' instruction set: "avx512", "avx2" or "default"; "" without the library.

    The environment's ATEN_CPU_CAPABILITY selects it, as for torch's own kernels.
    """
    return torch.ops.rnnkern.cpu_capability() if loaded else ""
