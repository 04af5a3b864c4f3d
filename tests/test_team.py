"""Threads that share a scan's columns: csrc/cpu/team.h, which needs no torch, under a sanitizer."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnnkern
from rnnkern.parity import TOLERANCES, relative_error

HERE = Path(__file__).parent


@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("sanitizer", ["thread", None], ids=["TSan", "plain"])
def test_late_and_preempted_members(sanitizer, tmp_path):
    """They fall behind, are left behind, and leave; the states are right, and nothing races."""
    program = tmp_path / "team"
    flags = [f"-fsanitize={sanitizer}", "-g"] if sanitizer else []
    command = ["g++", "-std=c++17", "-O2", "-pthread", *flags, str(HERE / "team.cpp")]
    built = subprocess.run([*command, "-o", program], capture_output=True, text=True)
    if sanitizer and "tsan" in built.stderr:
        pytest.skip("this g++ has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr[-3000:]
    run = subprocess.run([program, "60"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    counts = re.fullmatch(r"alone (\d+) excluded (\d+) early (\d+)\n", run.stdout).groups()
    assert all(int(count) > 0 for count in counts), run.stdout  # it did happen


def outputs_and_grads(rnn, x, hx):
    out, h_n = rnn(x, hx)
    wanted = [x, hx, *rnn.parameters()]
    return [out, h_n, *torch.autograd.grad(out.square().sum() + h_n.sum(), wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "steps, batch, hidden, two",
    [(40, 1, 300, False), (9, 2, 530, True), (20, 3, 260, False)]  # columns are shared
    + [(64, 32, 66, False), (70, 33, 100, True)]  # rows are
    + [(64, 31, 300, False), (20, 99, 288, False)],  # and products are of parts, with AMX
)
@pytest.mark.parametrize("features", [5, 16, 160], ids=["x in the scan", "x before", "much x"])
def test_the_same_bits_on_any_number_of_threads(features, steps, batch, hidden, two, dtype):
    """Outputs and every gradient, and none of them what the memory held before."""
    torch.manual_seed(0)
    rnn = rnnkern.RNN(features, hidden, bidirectional=two, dtype=dtype)
    x = torch.randn(steps, batch, features, dtype=dtype, requires_grad=True)
    hx = torch.randn(1 + two, batch, hidden, dtype=dtype, requires_grad=True)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        poison = [torch.full((n,), 777.0) for n in (64, 300, 4096, 100_000) for _ in "123"]
        del poison
        results.append(outputs_and_grads(rnn, x, hx))
    exact = dtype != torch.bfloat16  # torch's own products of half types may add in another order
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("features", [4, 16], ids=["x in the scan", "x before"])
def test_shared_columns_beside_other_programs(features):
    """Threads lose their cores in the midst of many steps, and nothing is lost with them."""
    torch.manual_seed(0)
    rnn, x = rnnkern.RNN(features, 256), torch.randn(1000, 1, features)
    spin = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(3)]
    try:
        with torch.no_grad():
            right = rnn(x)[0]
            torch.set_num_threads(2)
            for _ in range(40):
                assert torch.equal(rnn(x)[0], right)
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_threads_share_the_columns_of_a_low_gradient(dtype):
    """grad_weight_ih of 3 units and 700 features: one tile of rows, many panels of columns."""

    def run(kind, dtype, threads=1):
        torch.set_num_threads(threads)
        module = kind(700, 3, dtype=dtype)
        module.load_state_dict(weights)
        h0 = torch.zeros(1, 4, 3, dtype=dtype, requires_grad=True)
        return outputs_and_grads(module, x.to(dtype).requires_grad_(), h0)

    weights = rnnkern.RNN(700, 3, dtype=dtype).state_dict()
    x = torch.randn(300, 4, 700).to(dtype)
    right, got = run(torch.nn.RNN, torch.float64), run(rnnkern.RNN, dtype)
    half = TOLERANCES[dtype].times_peer > 0
    stock = run(torch.nn.RNN, dtype) if half else right
    for threads in (1, 2, 3, 7):
        results = run(rnnkern.RNN, dtype, threads)
        for a, first, b, c in zip(results, got, right, stock, strict=True):
            allowed = TOLERANCES[dtype].allowed(relative_error(c, b)) if half else 1e-4
            assert relative_error(a, b) <= allowed
            assert half or torch.equal(a, first)  # half types' products may be torch's own
