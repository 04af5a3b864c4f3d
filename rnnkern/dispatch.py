"""Which backend runs a call. The only file that knows their order."""

import functools
import warnings
from types import ModuleType

import torch

from .backends import cpu, cuda, eager, reference, triton

_MODULES: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "eager": eager,
    "reference": reference,
}
BACKENDS = tuple(_MODULES)
# In this order. Nobody gets Triton's interpreter unasked.
AUTO = ("cpu", "eager") if triton.INTERPRETED else ("cpu", "cuda", "triton", "eager")
# "auto" warns when it has to choose one of these: nobody is on a slow path without knowing.
SLOW = ("eager",)


def check_backend(backend: str) -> None:
    """Of a name that is neither "auto" nor one of BACKENDS: ValueError."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got '{backend}'")


def select(
    backend: str,
    device: str,
    dtype: torch.dtype,
    hidden_size: int,
    groups: int,
    nonlinearity: str | None,
) -> ModuleType:
    """The backend module for a call: the named one, or for "auto" the first that can run it.

    Raises ValueError where a named backend refuses, or every one does, with the reasons.
    """
    check_backend(backend)
    reasons = explain(device, dtype, hidden_size, groups, nonlinearity)
    candidates = AUTO if backend == "auto" else (backend,)
    told = "; ".join(f"{name}: {', '.join(reasons[name])}" for name in candidates if reasons[name])
    for name in candidates:
        if not reasons[name]:
            if backend == "auto" and name in SLOW:
                text = f"rnnkern runs the slow '{name}' backend. {told}"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
            return _MODULES[name]
    raise ValueError(f"no backend can run this call. {told}")


# For calls in a hurry. torch.compile traces select() itself: it would warn of the cache.
select_cached = functools.cache(select)


def explain(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 16,
    groups: int = 1,
    nonlinearity: str | None = "tanh",
) -> dict[str, list[str]]:
    """Every backend, in the order of "auto", with the reasons why it cannot run such a call.

    An empty list: it can. nonlinearity None asks about linear_scan.

    >>> rnnkern.explain()["eager"]
    []
    """
    device = torch.device(device).type
    call = (device, dtype, hidden_size, groups, nonlinearity)
    return {name: module.unsupported(*call) for name, module in _MODULES.items()}
