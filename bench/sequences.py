"""Packed input, two directions, stacked layers and ensembles: results checked, then timed in turns.

    python bench/sequences.py [--threads N] [--rounds N] [--json FILE]

Each row is a way to do a case's work, in float32: the medians of its microseconds without
gradients and for a training step, and how many times the case's first way, torch.nn.RNN's, takes
as long (above 1: faster than torch.nn.RNN).
"""

import copy
import statistics
from collections.abc import Callable

import torch
from timing import arguments, finish, host, measure, ratio
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.parity import relative_error

# A way of a case: a call, what it wants the gradients of, how many members those are stacks of (0:
# of none), and whether its results are the case's.
Way = tuple[Callable[[], list[Tensor]], list[Tensor], int, bool]


def twins(*sizes, **options) -> tuple[nn.Module, nn.Module]:
    stock, ours = nn.RNN(*sizes, **options), rnnkern.RNN(*sizes, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def layer(module, x) -> Way:
    out = lambda: [(o if isinstance(o, Tensor) else o.data) for o in module(x)]  # noqa: E731
    return out, list(module.parameters()), 0, True


def long_tailed(batch: int = 64, longest: int = 400) -> dict[str, Way]:
    """Lengths as texts have them: log-normal, a median of 40 steps, cut at 400."""
    lengths = (40 * torch.randn(batch).exp()).long().clamp(1, longest)
    lengths[0] = longest
    stock, ours = twins(64, 128)
    padded = torch.randn(longest, batch, 64)
    x = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    print(f"packed: {int(lengths.sum())} steps of {batch} rows, {batch * longest} when padded")
    return {
        "torch.nn.RNN, packed": layer(stock, x),
        "rnnkern.RNN, packed": layer(ours, x),
        "rnnkern.RNN, padded": (*layer(ours, padded)[:3], False),
    }


def directions(batch: int, steps: int, size: int) -> dict[str, Way]:
    x = torch.randn(steps, batch, size)
    stock, ours = twins(size, size, bidirectional=True)
    return {
        "torch.nn.RNN, two directions": layer(stock, x),
        "rnnkern.RNN, two directions": layer(ours, x),
        "rnnkern.RNN, one direction": (*layer(rnnkern.RNN(size, size), x)[:3], False),
    }


def stacked(layers: int) -> dict[str, Way]:
    x = torch.randn(128, 16, 64)
    stock, ours = twins(64, 128, layers)
    return {"torch.nn.RNN": layer(stock, x), "rnnkern.RNN": layer(ours, x)}


def ensemble(members: int, batch: int, steps: int, features: int, hidden: int) -> dict[str, Way]:
    """The same input to every member."""
    x = torch.randn(steps, batch, features)
    stock, ours = zip(*(twins(features, hidden) for _ in range(members)), strict=True)
    params, buffers = stack_module_state(list(ours))
    base = copy.deepcopy(ours[0]).to("meta")
    weights = [[getattr(m, f"{name}_l0") for m in ours] for name in
               ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip

    def calls(modules) -> Way:
        parameters = [p for m in modules for p in m.parameters()]
        return lambda: [torch.cat([m(x)[0] for m in modules], -1)], parameters, 0, True

    def groups():
        return [rnnkern.rnn_layer(x, *weights)[0]]

    def vmapped():
        one = lambda p, b: functional_call(base, (p, b), (x,))[0]  # noqa: E731
        out = torch.vmap(one)(params, buffers)
        return [out.permute(1, 2, 0, 3).flatten(2)]

    flat = [w for m in ours for w in m.parameters()]
    return {
        f"torch.nn.RNN, {members} calls": calls(stock),
        f"rnnkern.RNN, {members} calls": calls(ours),
        f"rnnkern.rnn_layer, {members} groups": (groups, flat, 0, True),
        "rnnkern.RNN, torch.vmap": (vmapped, list(params.values()), members, True),
    }


CASES = {
    "64 rows of long-tailed lengths, H 128": long_tailed,
    "2 directions (1, 256, 64, 64)": lambda: directions(1, 256, 64),
    "2 directions (16, 128, 128, 128)": lambda: directions(16, 128, 128),
    "4 layers (16, 128, 64, 128)": lambda: stacked(4),
    "ensemble of 8 (1, 100, 1, 16)": lambda: ensemble(8, 1, 100, 1, 16),
    "ensemble of 8 (16, 5, 1, 16)": lambda: ensemble(8, 16, 5, 1, 16),
    "ensemble of 8 (1, 256, 64, 64)": lambda: ensemble(8, 1, 256, 64, 64),
}


def train(call, wanted):
    return torch.autograd.grad(call()[0].sum(), wanted)


def results(call, wanted, members) -> list[Tensor]:
    """The outputs, and all gradients as one vector, member by member where they are stacked."""
    grads = train(call, wanted)
    parts = [g[k] for k in range(members) for g in grads] if members else grads
    return [*call(), torch.cat([part.flatten() for part in parts])]


def check(ways: dict[str, Way]) -> None:
    """The outputs and the gradients agree with the first way's.

    Raises:
        AssertionError: they do not, so nothing is timed.
    """
    right = results(*next(iter(ways.values()))[:3])
    for call, wanted, members, same in ways.values():
        if not same:
            continue
        for a, b in zip(results(call, wanted, members), right, strict=True):
            if not relative_error(a, b) < 1e-4:
                raise AssertionError(f"results differ by {relative_error(a, b):.1e}: not timed")


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    about = host(args)
    print("| case | way | forward us | x | training us | x |\n" + "| --- " * 6 + "|")
    rows = []
    for case, make in CASES.items():
        torch.manual_seed(0)
        ways = make()
        check(ways)
        forward = [torch.no_grad()(way[0]) for way in ways.values()]
        training = [lambda w=way: train(w[0], w[1]) for way in ways.values()]
        times = [measure(calls, args.rounds) for calls in (forward, training)]
        for i, way in enumerate(ways):
            row, cells = {"case": case, "way": way}, []
            for name, of in zip(("forward", "training"), times, strict=True):
                us = statistics.median(of[i]) * 1e6
                row[name] = {"us": us, "ratio": ratio(of[0], of[i])}
                cells += [f"{us:.0f}", f"{row[name]['ratio']:.2f}"]
            rows.append(row)
            print(f"| {case} | {way} | {' | '.join(cells)} |", flush=True)
    finish(args, about, rows)


if __name__ == "__main__":
    main()
