"""Builds rnnkern._C, the compiled ops, and rnnkern._python, a short way into them, against the
torch that is installed.

RNNKERN_BUILD=1 insists on the library, =0 leaves it out; by default it is left out, with a warning,
only where there is no torch to build against or no C++ compiler. RNNKERN_EMULATE=1 makes the
kernels for instructions that this processor lacks of others, so that they can be tested here
(RNNKERN_CPU_CAPABILITY names one). RNNKERN_SANITIZE=1 does so too, and builds all else with ASan
and UBSan.

The CUDA kernels are part of it where torch is a CUDA build and there is an nvcc (on PATH, or in
CUDA_HOME); RNNKERN_CUDA=1 insists on them, =0 leaves them out.
"""

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from typing import NamedTuple

from setuptools import setup
from setuptools.modified import newer_group

SOURCES = "ops meta autograd autocast composite vmap rows steps".split()
SOURCES += "cpu/isa cpu/packed cpu/products cpu/runner cpu/ops".split()
KERNEL_FLAGS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    KERNEL_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    KERNEL_FLAGS["avx512"] = KERNEL_FLAGS["avx2"] + [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
    ]
    KERNEL_FLAGS["avx512_bf16"] = KERNEL_FLAGS["avx512"] + ["-mavx512bf16", "-mavx512vnni"]
    KERNEL_FLAGS["amx"] = KERNEL_FLAGS["avx512_bf16"] + ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# Of what is for tests. GCC fuses multiply-adds, which the kernels' precision counts on, from -O2 on
# or if told to.
CHEAP = ["-O1", "-fexpensive-optimizations"]
# /proc/cpuinfo's word for what each adds.
FEATURES = {"avx2": "avx2", "avx512": "avx512bw", "avx512_bf16": "avx512_bf16", "amx": "amx_bf16"}

CUDA_SOURCES = "cuda/launch cuda/ops".split()
# Of csrc/cuda/kernels.cu, which is compiled for every pair.
CUDA_KERNELS = [
    *itertools.product(
        ("kWarp", "kBlock", "kCluster", "kGrid"), ("kBFloat16", "kHalf", "kTf32", "kTf32x3")
    ),
    ("kFma", "kTf32x3"),
]
# Machine code for A100 and its kin, for Hopper with its own instructions; PTX for what is later.
NVCC_FLAGS = ["-std=c++17", "-O3", "--compress-mode=size"]  # a tenth of it
NVCC_FLAGS += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
NVCC_FLAGS += ["-gencode=arch=compute_90,code=compute_90"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
LEAST_CUDA = (12, 8)  # its PTX has fence.acquire.sync_restrict


def find_torch():
    """torch.utils.cpp_extension; inside pip's isolated build, the environment's around it."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        sys.path.append(sysconfig.get_paths()["purelib"])
        try:
            from torch.utils import cpp_extension
        except ImportError:
            return None
    return cpp_extension


def is_gcc(compiler: str) -> bool:
    """Whether it is GCC, whose OpenMP torch's Linux builds have; Clang's is another."""
    command = [*(compiler.split() if shutil.which(compiler.split()[0]) else ["g++"]), "--version"]
    version = subprocess.run(command, capture_output=True, text=True).stdout
    return "Free Software Foundation" in version


class Cuda(NamedTuple):
    """CUDA's compiler, and the folder of its runtime library."""

    nvcc: str
    libraries: str


def output_of(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout + run.stderr


def find_cuda() -> Cuda | str:
    """The toolkit that can build for the torch that is installed, or why there is none."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        return "there is no nvcc on PATH or in CUDA_HOME"
    release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    version = tuple(map(int, release.groups())) if release else (0, 0)
    # Within a major version every driver that runs torch runs what nvcc makes.
    if version < LEAST_CUDA or version[0] != int(torch.version.cuda.split(".")[0]):
        least = ".".join(map(str, LEAST_CUDA))
        found = ".".join(map(str, version))
        return (
            f"{nvcc} is of CUDA {found}; torch's is {torch.version.cuda}, so that it takes one of "
            f"the same major version, {least} or later"
        )
    # nvcc may be a script somewhere else; it knows.
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "x.cu"), re.MULTILINE)
    folders = [f"{top[1]}/{name}" for name in ("lib64", "lib")] if top else []
    for folder in folders:
        if os.path.exists(f"{folder}/libcudart_static.a"):
            return Cuda(nvcc, folder)
    return f"the toolkit of {nvcc} has no libcudart_static.a"


def choose_cuda() -> Cuda | None:
    """The toolkit to build the CUDA kernels with; None: they are left out."""
    wanted = os.environ.get("RNNKERN_CUDA", "auto")
    found = "RNNKERN_CUDA=0" if wanted == "0" else find_cuda()
    if isinstance(found, Cuda):
        return found
    if wanted == "1":
        raise SystemExit(f"rnnkern: cannot build the CUDA kernels: {found}")
    if wanted != "0" and "no CUDA build" not in found:
        warnings.warn(f"rnnkern is built without its CUDA kernels: {found}", stacklevel=1)
    return None


def emulate() -> dict[str, list[str]]:
    """The flags of each instruction set that this processor lacks: those of its best, and
    csrc/cpu/emulated.h."""
    if not os.path.exists("/proc/cpuinfo"):
        raise SystemExit("rnnkern: to emulate instruction sets takes Linux")
    with open("/proc/cpuinfo") as file:
        has = file.read().split()
    lacks = [isa for isa in KERNEL_FLAGS if isa in FEATURES and FEATURES[isa] not in has]
    if "avx2" in lacks:
        raise SystemExit("rnnkern: to emulate instruction sets takes a processor with AVX2")
    best = [isa for isa in KERNEL_FLAGS if isa not in lacks][-1]
    emulated = [f"-DRNNKERN_EMULATE_{isa.upper()}" for isa in lacks]
    return {
        isa: [*KERNEL_FLAGS[best], *CHEAP, "-DRNNKERN_EMULATED", *emulated[: i + 1]]
        for i, isa in enumerate(lacks)
    }


def build_options() -> dict:
    # ninja, installed beside this Python, is found though the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    wanted = os.environ.get("RNNKERN_BUILD", "auto")
    if wanted == "0":
        return {}
    cpp_extension = find_torch()
    compiler = os.environ.get("CXX", "c++")
    missing = None
    if cpp_extension is None:
        missing = (
            "torch is not installed here (install it first; then build with --no-build-isolation)"
        )
    elif not (shutil.which(compiler.split()[0]) or shutil.which("g++")):
        missing = f"there is no C++ compiler ({compiler})"
    if missing:
        if wanted == "1":
            raise SystemExit(f"rnnkern: cannot build the compiled library: {missing}")
        warnings.warn(f"rnnkern is built without its compiled library: {missing}", stacklevel=1)
        return {}

    wanted = "1" in (os.environ.get("RNNKERN_EMULATE"), os.environ.get("RNNKERN_SANITIZE"))
    emulated = emulate() if wanted else {}
    of_kernels = KERNEL_FLAGS | emulated
    # At -O1, and the kernels with all checks for one instruction set: the checks of pointers and
    # of sums, which have no instruction set, double the time that a kernel file takes. Emulated
    # ones have none: with them each takes minutes. (They are linked last: of an inline function
    # that another file has too, theirs is dropped.)
    sanitize = []
    if os.environ.get("RNNKERN_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
        fewer = "null,alignment,object-size,pointer-overflow,vptr,signed-integer-overflow"
        for isa in of_kernels.keys() - emulated.keys():
            of_kernels[isa] = of_kernels[isa] + sanitize
            if isa != "default":
                of_kernels[isa].append(f"-fno-sanitize={fewer}")
    common = ["-Wall", *(CHEAP if sanitize else ["-O3"])]
    # at::parallel_for is a loop without it. Compiled so, but not linked: the runtime, and with it
    # the threads, are those that torch brings.
    openmp = ["-fopenmp"] if sys.platform == "linux" and is_gcc(compiler) else []
    if not openmp:
        warnings.warn(
            "rnnkern's kernels run on one thread: only GCC on Linux makes more", stacklevel=1
        )

    # Vector types in signatures, and GCC 12's own AVX-512 header, make it warn of nothing that is
    # wrong.
    quiet = ["-Wno-psabi", "-Wno-maybe-uninitialized"]

    cuda = choose_cuda()

    class Build(cpp_extension.BuildExtension):
        """Compiles scan_<isa>.cpp with that instruction set's flags, and the CUDA kernels with
        nvcc, and hands on the objects."""

        def build_extensions(self):
            def compile_for(isa: str) -> list[str]:
                return self.compiler.compile(
                    [f"csrc/cpu/scan_{isa}.cpp"],
                    output_dir=self.build_temp,
                    extra_postargs=["-fPIC", "-g0", "-std=c++17", *quiet, *common]
                    + of_kernels[isa],
                    depends=[*glob("csrc/cpu/*.h"), "csrc/activation.h"],
                )

            def compile_cuda(name: str, *defines: str) -> list[str]:
                source, out = f"csrc/cuda/{name}.cu", "-".join([name, *defines])
                out = os.path.join(self.build_temp, "csrc", "cuda", f"{out}.o")
                if newer_group([source, *glob("csrc/cuda/*.*h"), "csrc/activation.h"], out):
                    os.makedirs(os.path.dirname(out), exist_ok=True)
                    flags = [f"-DRNNKERN_{define}" for define in defines]
                    self.spawn([cuda.nvcc, *NVCC_FLAGS, *flags, "-c", source, "-o", out])
                return [out]

            # A minute or so each of the CPU's, half a minute of CUDA's.
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                tasks = [pool.submit(compile_for, isa) for isa in of_kernels]
                if cuda:
                    tasks.append(pool.submit(compile_cuda, "machine"))
                    tasks += [
                        pool.submit(compile_cuda, "kernels", f"REGIME={r}", f"PRECISION={p}")
                        for r, p in CUDA_KERNELS
                    ]
                for task in tasks:
                    self.extensions[0].extra_objects += task.result()
            super().build_extensions()

        def get_ext_filename(self, name):
            # No Python is in it: torch.ops.load_library loads it, any Python's and C++'s alike.
            if name.endswith("_C"):
                return os.path.join(*name.split(".")) + ".so"
            return super().get_ext_filename(name)

    stripped = ["-Wl,-s"] if sys.platform == "linux" and not sanitize else []
    options = {
        "depends": [*glob("csrc/*.h"), *glob("csrc/cpu/*"), *glob("csrc/cuda/*")],
        "extra_compile_args": ["-g0", "-fvisibility=hidden", *openmp, *common, *sanitize],
        # Stripped: 0.3 MB instead of 12.
        "extra_link_args": [*stripped, *sanitize],
    }
    extension = cpp_extension.CppExtension(
        "rnnkern._C",
        [f"csrc/{name}.cpp" for name in SOURCES + (CUDA_SOURCES if cuda else [])],
        py_limited_api=True,
        # The runtime is linked in, so that no other version of it can come in its place.
        library_dirs=[cuda.libraries] if cuda else [],
        libraries=["cudart_static", "rt", "dl", "pthread"] if cuda else [],
        **options,
    )
    python = cpp_extension.CppExtension("rnnkern._python", ["csrc/python.cpp"], **options)
    return {"ext_modules": [extension, python], "cmdclass": {"build_ext": Build}}


setup(**build_options())
