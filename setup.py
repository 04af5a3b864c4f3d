"""Builds rnnkern._C, the compiled ops, and rnnkern._python, a short way into them, against the
torch that is installed.

RNNKERN_BUILD=1 insists on the library, =0 leaves it out; by default it is left out, with a warning,
only where there is no torch to build against or no C++ compiler. RNNKERN_SANITIZE=1 builds it with
ASan and UBSan.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import setup

SOURCES = "ops meta autograd autocast composite vmap rows steps cpu/packed cpu/runner cpu/ops".split()
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

    sanitize = []
    if os.environ.get("RNNKERN_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
    common = ["-O2" if sanitize else "-O3", "-Wall", *sanitize]
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

    class Build(cpp_extension.BuildExtension):
        """Compiles scan_<isa>.cpp with that instruction set's flags, and hands on the objects."""

        def build_extensions(self):
            def compile_for(isa: str) -> list[str]:
                return self.compiler.compile(
                    [f"csrc/cpu/scan_{isa}.cpp"],
                    output_dir=self.build_temp,
                    extra_postargs=["-fPIC", "-g0", "-std=c++17", *quiet, *common]
                    + KERNEL_FLAGS[isa],
                    depends=[*glob("csrc/cpu/*.h"), "csrc/activation.h"],
                )

            # A minute or so each.
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                for objects in pool.map(compile_for, KERNEL_FLAGS):
                    self.extensions[0].extra_objects += objects
            super().build_extensions()

        def get_ext_filename(self, name):
            # No Python is in it: torch.ops.load_library loads it, any Python's and C++'s alike.
            if name.endswith("_C"):
                return os.path.join(*name.split(".")) + ".so"
            return super().get_ext_filename(name)

    stripped = ["-Wl,-s"] if sys.platform == "linux" and not sanitize else []
    options = {
        "depends": [*glob("csrc/*.h"), *glob("csrc/cpu/*")],
        "extra_compile_args": ["-g0", "-fvisibility=hidden", *openmp, *common],
        # Stripped: 0.3 MB instead of 12.
        "extra_link_args": [*stripped, *sanitize],
    }
    extension = cpp_extension.CppExtension(
        "rnnkern._C",
        [f"csrc/{name}.cpp" for name in SOURCES],
        py_limited_api=True,
        **options,
    )
    python = cpp_extension.CppExtension("rnnkern._python", ["csrc/python.cpp"], **options)
    return {"ext_modules": [extension, python], "cmdclass": {"build_ext": Build}}


setup(**build_options())
