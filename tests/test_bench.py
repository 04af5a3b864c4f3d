"""The benchmarks run, on shapes that say nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import needs_library

ROOT = Path(__file__).parent.parent
# Those that start fast; the others have the same interface.
PEERS = ["notebook loop", "TorchScript loop", "oneDNN", "oneDNN bf16", "ONNX Runtime"]

pytestmark = [needs_library, pytest.mark.processes]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_driver(tmp_path):
    kept = tmp_path / "figures.json"
    said = run("bench/cpu.py", "--threads=1", "--rounds=2", "--seconds=0.0001", f"--json={kept}",
               "--shapes", "tiny", "1,3,2,257", "--peers", *PEERS)  # fmt: skip
    assert said.count("(2, 4, 3, 5)") >= 5 and "(1, 3, 2, 257)" in said
    rows = json.loads(kept.read_text())["rows"]
    assert [row["shape"] for row in rows] == [[2, 4, 3, 5], [1, 3, 2, 257]]
    for row in rows:
        for what in ("forward", "training"):
            assert row[what]["module_ratio"] > 0
            assert row[what]["op_ratio"] > 0
            assert row[what]["best_peer"] in ("torch.nn.RNN", *PEERS)
        assert set(row["training_peak"]) == {"torch.nn.RNN", "rnnkern.RNN"}
        assert set(row["left_out"]) <= set(PEERS)
    assert rows[1]["weights"]["repacked_ratio"] > 0  # H is large enough for weights to be kept


def test_under_load():
    said = run("bench/busy.py", "--rounds=1", "--shapes", "tiny")
    assert said.count("(2, 4, 3, 5)") == 2


def test_the_suites():
    said = run("-m", "pytest", "bench", "--benchmark-disable", "-q", "-p", "no:cacheprovider",
               "-k", "tiny and not compile and not JAX")  # fmt: skip
    assert "passed" in said


def test_the_suites_of_a_gpu_are_found():
    said = run("-m", "pytest", "bench/test_gpu.py", "--collect-only", "-q")
    assert "test_layer[plain forward bfloat16 B16T512H64-cuda]" in said


def test_pytest_alone_does_not_run_them():
    said = run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert "bench/test_cpu.py" not in said
