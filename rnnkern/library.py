"""Loads the compiled ops, `_C.so`, into torch.ops.rnnkern, or keeps the reason why it could not.

Beside them, `_python`: a short way into them for this Python.
"""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

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


def _load_python() -> ModuleType | None:
    """The way in that knows this Python; what serves any Python goes without, and says so."""
    try:
        return importlib.import_module("._python", __package__)
    except ImportError as error:
        warnings.warn(
            "rnnkern calls its library through torch.ops, which is slower for small sizes: "
            f"{error}; {HOW_TO_BUILD}",
            RuntimeWarning,
            stacklevel=3,
        )
    return None


path, reason = _load()
loaded = path is not None
if not loaded:
    warnings.warn(
        f"rnnkern runs without its compiled library and is much slower: {reason}; {HOW_TO_BUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
python = _load_python() if loaded else None


def capability() -> str:
    """The CPU kernels' instruction set: "amx", "avx512_bf16", "avx512", "avx2" or "default"; ""
    without the library.

    The best that the machine has, unless the environment's RNNKERN_CPU_CAPABILITY names another, or
    ATEN_CPU_CAPABILITY does for torch's kernels and these.
    """
    return torch.ops.rnnkern.cpu_capability() if loaded else ""
