"""The CUDA kernels without a GPU: their sources on the host, under tests/cuda/simulator.h."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[0])
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """tests/cuda/kernels.cpp, compiled."""
    program = tmp_path_factory.mktemp("cuda") / "kernels"
    source, sources = HERE / "cuda" / "kernels.cpp", HERE.parent / "csrc" / "cuda"
    command = [COMPILER, "-std=c++17", "-O1", "-DRNNKERN_SIMULATE", f"-I{sources}"]
    command += [f"-I{source.parent}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return program


@pytest.mark.parametrize("family", ["warp", "block", "cluster", "grid", "fma"])
def test_simulated(kernels, family):
    """Every shape of the table, under adversarial schedules, against double precision."""
    run = subprocess.run([kernels, family, "2"], capture_output=True, text=True, timeout=600)
    wrong = [line for line in run.stdout.splitlines() if " OK" not in line]
    assert run.returncode == 0 and " OK\n" in run.stdout, "\n".join(wrong) + run.stderr[-3000:]
