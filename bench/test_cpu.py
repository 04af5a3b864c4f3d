"""The ways of bench/cpu.py as pytest-benchmark suites: a group for each shape and direction.

    pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=mean
    pytest bench --benchmark-save=before; ...; pytest bench --benchmark-compare=0001
    pytest bench -k "forward and H16 and not JAX"

Each way's results are checked before it is timed; no time makes a test fail. Threads are torch's
default (OMP_NUM_THREADS). For ratios use bench/cpu.py, whose calls take turns.
"""

import functools

import pytest
import torch
from cpu import SHAPES, TINY
from peers import OURSELVES, PEERS, Case, LeftOut, Shape, Way
from peers import make as make_ways

WAYS = [*OURSELVES, *PEERS]


@functools.lru_cache(maxsize=1)  # the shape is the outer loop, and a case can be 100 MB
def case(shape: Shape) -> Case:
    return Case(shape)


@functools.lru_cache(maxsize=2)
def way(shape: Shape, name: str) -> Way:
    """Made and checked once for both directions."""
    ways, left_out = make_ways(case(shape), torch.get_num_threads(), [name])
    if left_out:
        raise LeftOut(left_out[name])
    return ways[name]


def shape_id(shape: Shape) -> str:
    return "tiny" if shape == TINY else f"B{shape.B}T{shape.T}I{shape.I}H{shape.H}"


# The last decorator's parameter varies slowest, as the caches above want it.
@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("shape", [TINY, *SHAPES], ids=shape_id)
def test_way(benchmark, shape: Shape, name: str, direction: str) -> None:
    benchmark.group = f"{shape_id(shape)} {direction}"
    try:
        checked = way(shape, name)
    except LeftOut as reason:
        pytest.skip(f"{name}: {reason}")
    call = checked.forward if direction == "forward" else checked.train
    if call is None:
        pytest.skip(f"{name} does not train")
    with torch.set_grad_enabled(direction == "training"):
        benchmark(call)
