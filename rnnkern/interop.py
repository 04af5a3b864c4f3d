"""Models that others wrote: accelerate() makes rnnkern's layers of torch.nn's."""

import dataclasses

import torch
import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from . import dispatch
from .modules import FX_LEAF, RNN, RNNCell, nonlinearity_of

SWAPS = {nn.RNN: RNN, nn.RNNCell: RNNCell}


@dataclasses.dataclass(frozen=True)
class Accelerated:
    """What accelerate() did, under the names of model.named_modules(); the model itself is ""."""

    swapped: list[str]
    left: dict[str, str]  # name -> reason

    def __str__(self) -> str:
        lines = [f"swapped {name or 'the model itself'}" for name in self.swapped]
        lines += [f"left {name or 'the model itself'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "there is no recurrent layer in the model"


def accelerate(model: nn.Module, backend: str = "auto") -> Accelerated:
    """Turn every torch.nn.RNN and torch.nn.RNNCell in a model into rnnkern's, in place.

    A layer stays the object that it was, with its parameters (an optimiser goes on), hooks,
    parametrizations, training mode and device, wherever it is referred to; only its class is
    another. The model itself may be such a layer. What builds the model anew, as many libraries do
    when they load a checkpoint, has torch's layers again: call it again.

    Args:
        model: any module, on the device and in the dtype that it will run with.
        backend: of the layers, as in rnnkern.RNN.
    Returns:
        The names of what was swapped, and of what was left with the reason: subclasses of
        torch.nn.RNN and layers with a forward of their own (who knows what they rely on), what
        TorchScript has compiled, and what no fast backend can run. Print it.
    Raises:
        ValueError: there is no such backend.

    >>> model = torch.nn.Sequential(torch.nn.RNN(10, 20), torch.nn.LSTM(20, 20))
    >>> print(rnnkern.accelerate(model))
    swapped 0
    left 1: it is a torch.nn.LSTM, not a vanilla RNN
    """
    dispatch.check_backend(backend)
    swapped, left = [], {}
    for name, module in model.named_modules():
        if not _is_stock(module):
            continue
        reason = _reason_to_leave(module, backend)
        if reason:
            left[name] = reason
        else:
            _swap(module, backend)
            swapped.append(name)
    return Accelerated(swapped, left)


def _is_stock(module: nn.Module) -> bool:
    """Whether it is one of torch.nn's recurrent layers, or was before it was compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module.original_name in ("RNN", "RNNCell") and not hasattr(module, "backend")
        return scripted and (hasattr(module, "weight_hh_l0") or hasattr(module, "weight_hh"))
    recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    return recurrent and not isinstance(module, (RNN, RNNCell))


def _own_class(module: nn.Module) -> type:
    """The class that was written; a parametrization derives another from it, for one module."""
    kind = type(module)
    return kind.__bases__[0] if is_parametrized(module) else kind


def _reason_to_leave(module: nn.Module, backend: str) -> str:
    """Why accelerate() had better not touch a layer; "" if it may."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has compiled it: accelerate the model before"
    kind = _own_class(module)
    if kind not in SWAPS:
        name = f"{kind.__module__}.{kind.__qualname__}".replace(".modules.rnn", "")
        if issubclass(kind, tuple(SWAPS)):
            return f"it is a subclass, {name}, which may rely on what the swap would change"
        return f"it is a {name}, not a vanilla RNN"
    if "forward" in vars(module):
        return "its forward was replaced by another"
    weight = next(module.parameters(), None)
    if weight is None:
        return "it has no parameters, from which to know its device and dtype"
    reasons = dispatch.explain(
        weight.device, weight.dtype, module.hidden_size, nonlinearity=nonlinearity_of(module)
    )
    fast = [b for b in dispatch.AUTO if b not in dispatch.SLOW] if backend == "auto" else [backend]
    if all(reasons[name] for name in fast):
        return "; ".join(f"backend {name}: {', '.join(reasons[name])}" for name in fast)
    return ""


def _swap(module: nn.Module, backend: str) -> None:
    """rnnkern's layers hold what torch.nn's hold, and the backend besides."""
    module.nonlinearity, module.backend = nonlinearity_of(module), backend
    module.__module__ = FX_LEAF
    ours = SWAPS[_own_class(module)]
    if is_parametrized(module):  # the derived class anew, with its properties
        special = ("__dict__", "__weakref__")
        body = {name: value for name, value in vars(type(module)).items() if name not in special}
        ours = type(type(module).__name__, (ours,), body)
    module.__class__ = ours
