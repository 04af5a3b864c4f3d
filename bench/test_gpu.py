"""The layers of bench/gpu.py as pytest-benchmark suites, to compare one GPU between versions.

    pytest bench/test_gpu.py --benchmark-columns=median,iqr,rounds --benchmark-sort=mean
    pytest bench/test_gpu.py --benchmark-save=before; ...; ... --benchmark-compare=0001
    pytest bench/test_gpu.py -k "bfloat16 and forward and H256"

A group for each case. Results are checked before anything is timed; no time makes a test fail. A
timing is from a call until the GPU has done it. For ratios use bench/gpu.py.
"""

import functools
from types import SimpleNamespace

import gpu
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
CASES = gpu.grid(torch.device("cuda"))


@functools.lru_cache(maxsize=1)  # the case is the outer loop
def checked(case: gpu.Case) -> tuple[dict[str, torch.nn.Module], object]:
    """The layers, and an input."""
    args = SimpleNamespace(
        dry_run=False, small=False, resume=False, budget=float("inf"), out=None, backend=None
    )
    bench, dtype = gpu.Bench(args), gpu.set_mode(case.mode)
    layers = {}
    for backend in gpu.backends(bench, case):
        gpu.check_results(bench, case, backend)
        layers["torch.nn.RNN"], layers[backend] = gpu.twins(case, bench.device, dtype, backend)
    return layers, gpu.data(case, bench.device, dtype)


def name(case: gpu.Case) -> str:
    return f"{case.kind} {case.what} {case.mode} B{case.batch}T{case.steps}H{case.hidden}"


@pytest.mark.parametrize("way", ["torch.nn.RNN", *gpu.BACKENDS])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_layer(benchmark, case: gpu.Case, way: str) -> None:
    benchmark.group = name(case)
    modules, x = checked(case)
    if way not in modules:
        pytest.skip(f"the backend {way} does not run it")
    of = gpu.forward if case.what == "forward" else gpu.train

    def call():
        of(modules[way], x)
        torch.cuda.synchronize()

    benchmark(call)
