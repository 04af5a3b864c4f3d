"""What nvcc makes of the CUDA kernels, which needs no GPU: registers, spills, instructions.

The largest kernel of each kind stands for the others: it is the one that has the most weights to
keep in registers.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

# Kernel (E: its element type, P: its epilogue) -> element types, and least compute capability.
KERNELS = {
    "WarpScan<E, 32, P>": ("BFloat16 Half Tf32 Tf32x3", 80),
    "FmaScan<E, 32, P>": ("Tf32x3", 80),
    "FmaScan<E, 128, P>": ("Tf32x3", 80),
    "FmaScan<E, 192, P>": ("Tf32x3", 80),
    "BlockScan<E, 256, P>": ("BFloat16 Half", 80),
    "BlockScan<E, 128, P>": ("Tf32 Tf32x3", 80),
    "ClusterScan<E, 1024, 8, P>": ("BFloat16 Half", 90),
    "ClusterScan<E, 1024, 16, P, 2>": ("BFloat16 Half", 90),
    "ClusterScan<E, 1024, 32, P, 2>": ("BFloat16", 90),
    "ClusterScan<E, 512, 32, P, 4>": ("BFloat16", 90),
    "ClusterScan<E, 512, 16, P>": ("Tf32", 90),
    "ClusterScan<E, 256, 16, P>": ("Tf32x3", 90),
    "GridScan<E, 2048, 8, P>": ("BFloat16", 80),
    "GridScan<E, 2048, 32, P>": ("Half", 80),
    "GridScan<E, 2048, 8, P, 16, 28>": ("Tf32", 80),
    "GridScan<E, 2048, 8, P, 16, 12>": ("Tf32x3", 80),
    # More shared memory than a block of an A100 may have.
    "GridScan<E, 4096, 8, P, 32, 16>": ("BFloat16", 90),
}
EPILOGUES = [
    "Forward<Known<Tanh<DeviceMath<E::kApproximate>>>>",
    "Backward<Known<Tanh<DeviceMath<E::kApproximate>>>>",
    "Linear",
    "Layer<Known<Tanh<DeviceMath<E::kApproximate>>>>",
]


def epilogues(kernel: str) -> list[str]:
    return EPILOGUES if kernel.startswith(("Warp", "Fma", "Block")) else EPILOGUES[:-1]


# nvcc's name of an architecture -> compute capability.
ARCHITECTURES = {"sm_80": 80, "sm_90a": 90}
CASES = [
    (kernel, element, arch)
    for kernel, (elements, least) in KERNELS.items()
    for element in elements.split()
    for arch, capability in ARCHITECTURES.items()
    if capability >= least
]

SOURCE = """
#include "block.cuh"
#include "cluster.cuh"
#include "fma.cuh"
#include "grid.cuh"
#include "warp.cuh"
namespace rnnkern::cuda {
template <class K>
__global__ void __launch_bounds__(K::kThreads, 1) scan_kernel(const __grid_constant__ Scan p) {
  K::run(p);
}
using E = ELEMENT;
"""


def tool(name: str) -> str | None:
    """NVIDIA's, or that which Triton brings."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(NVCC or "").parent))
    if found is None and importlib.util.find_spec("triton"):
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def compile_kernel(case: tuple[str, str, str], folder: Path) -> dict[str, tuple[str, str]]:
    """What the assembler says of each kernel, and its code, by epilogue."""
    kernel, element, arch = case
    stem = re.sub(r"\W+", "_", " ".join(case))
    source, cubin = folder / f"{stem}.cu", folder / f"{stem}.cubin"
    instances = "".join(
        f"template __global__ void scan_kernel<{kernel.replace('P', epilogue)}>"
        "(const __grid_constant__ Scan);\n"
        for epilogue in epilogues(kernel)
    )
    source.write_text(SOURCE.replace("ELEMENT", element) + instances + "}\n")
    command = [NVCC, "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc' / 'cuda'}"]
    command += [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = re.split(r"Compiling entry function '", done.stderr)[1:]
    code = subprocess.run(
        [tool("cuobjdump"), "--dump-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    codes = {f.split("\n", 1)[0].strip(): f for f in re.split(r"\n\s*Function : ", code)[1:]}
    return {name: (text, codes[name]) for name, text in (s.split("'", 1) for s in said)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All cases, as many at once as there are processors."""
    folder = tmp_path_factory.mktemp("cubins")
    if tool("cuobjdump") is None:
        pytest.skip("there is no cuobjdump")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CASES, pool.map(lambda c: compile_kernel(c, folder), CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}".replace(" ", ""))
def test_cubin(compiled, case):
    kernel, element, _ = case
    assert len(compiled[case]) == len(epilogues(kernel))
    for name, (said, code) in compiled[case].items():
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert spills.groups() == ("0", "0"), f"{name}: {spills[0]}"
        assert "warning" not in said, f"{name}: {said}"  # such as that products are serialised
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        wgmma = element in ("BFloat16", "Half") and re.search(r"P, [24]>", kernel)
        assert ("HGMMA" in code) == bool(wgmma), f"{name}: wgmma"
        is_fma = kernel.startswith("Fma")
        assert ("HMMA" in code) != bool(wgmma or is_fma), f"{name}: mma.sync"
        assert "LDGSTS" in code, f"{name} does not copy ahead"
        assert ("STAS" in code) == kernel.startswith("Cluster"), f"{name}: messages"
        # A wait that flushes the level 1 cache each time.
        assert "CCTL.IVALL" not in code or kernel.startswith("Cluster"), f"{name}: CCTL.IVALL"
        if kernel.startswith("Cluster"):
            loop = code[code.index("SYNCS.PHASECHK") :]
            assert "CCTL.IVALL" not in loop[: loop.rindex("STAS")], f"{name}: CCTL.IVALL"
