"""The simulator and its table notice what the CUDA kernels must not leave out: mutants are caught.

Each is the kernels' sources with one thing changed, which breaks an order, an address, a protocol
or a formula; compiled and run as tests/cuda/kernels.cpp, it must fail.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[0])
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

# Name -> the families of kernels to run, the file, and pairs of what stands there and what instead.
MUTANTS = {
    "as it is": ("warp fma block cluster grid", "team.cuh", []),
    # team.cuh
    "the input is not waited for": (
        "cluster",
        "team.cuh",
        [("copies_wait<S::kAhead - 1>();", "copies_wait<S::kAhead + 9>();")],
    ),
    "the input is waited for a step late": (
        "cluster grid",
        "team.cuh",
        [("copies_wait<S::kAhead - 1>();", "copies_wait<S::kAhead>();")],
    ),
    "no block_sync before the partial sums": (
        "cluster",
        "team.cuh",
        [("copies_wait<S::kAhead - 1>();\n      block_sync();", "copies_wait<S::kAhead - 1>();")],
    ),
    "one buffer of partial sums": (
        "grid",
        "team.cuh",
        [("(t & 1 ? S::kPartialBytes : 0)", "0")],
    ),
    "no units in the product": (
        "cluster",
        "team.cuh",
        [
            (
                "{is_unit ? pair_sum[0] : 0.0f, is_unit ? pair_sum[1] : 0.0f}",
                "{pair_sum[0], pair_sum[1]}",
            )
        ],
    ),
    "fragments by columns": (
        "cluster",
        "team.cuh",
        [
            (
                "const int row = lane_ & 15, chunk = 2 * step + (lane_ >> 4);",
                "const int row = (lane_ & 7) + lane_ / 16 * 8, chunk = 2 * step + (lane_ / 8 & 1);",
            )
        ],
    ),
    "entry joins at every step": (
        "cluster",
        "team.cuh",
        [("p_.entry && n >= entered && is_unit", "p_.entry && is_unit")],
    ),
    "rows that take no part go on": ("grid", "team.cuh", [("if (n < here) {", "if (true) {")]),
    "the last step sends": (
        "cluster",
        "team.cuh",
        [("if (t + 1 < p_.steps) exchange.send", "exchange.send")],
    ),
    "wgmma is not waited for": ("cluster", "team.cuh", [("wgmma_wait();", "")]),
    "no fence before wgmma": (
        "cluster",
        "team.cuh",
        [("      fence_for_wgmma();\n      float even", "      float even")],
    ),
    # cluster.cuh
    "the other parity": ("cluster", "cluster.cuh", [("((t - 1) >> 1) & 1", "(t >> 1) & 1")]),
    "no wait for the state": (
        "cluster",
        "cluster.cuh",
        [("barrier_wait(barriers_ + 8 * at, static_cast<uint32_t>((t - 1) >> 1) & 1);", "")],
    ),
    "one state": (
        "cluster",
        "cluster.cuh",
        [
            ("return states_ + at * S::kStateBytes;", "return states_;"),
            ("const uint32_t at = to * S::kStateBytes + ", "const uint32_t at = "),
        ],
    ),
    "bytes of a whole tile": (
        "cluster",
        "cluster.cuh",
        [("bytes_(tile.rows * blocks_", "bytes_(S::kRows * blocks_")],
    ),
    "a block that nobody sends to": (
        "cluster",
        "cluster.cuh",
        [
            (
                "if (i * kLanes + thread() % kLanes < blocks_) {",
                "if (i * kLanes + thread() % kLanes < blocks_ - 1) {",
            )
        ],
    ),
    "barriers armed once": (
        "cluster",
        "cluster.cuh",
        [
            (
                "if (thread() == 0) barrier_expect(barriers_ + 8 * at, bytes_);",
                "",
            )
        ],
    ),
    "no cluster_sync before the first message": (
        "cluster",
        "cluster.cuh",
        [("cluster_sync();  // before anybody sends", "block_sync();")],
    ),
    "sent where the chunks are not permuted": (
        "cluster",
        "cluster.cuh",
        [("S::state_at(chunk, row);", "S::state_at(chunk, row & ~7) + (row & 7) * 128;")],
    ),
    # grid.cuh
    "what is gathered is not looked at": (
        "grid",
        "grid.cuh",
        [("for (bool missing = true; missing;)", "for (bool missing = false; missing;)")],
    ),
    "three words of four are looked at": (
        "grid",
        "grid.cuh",
        [
            (
                "v[i].z != kNotYet && v[i].w != kNotYet;",
                "v[i].z != kNotYet;",
            )
        ],
    ),
    "rows that enter late start from zero": (
        "grid",
        "grid.cuh",
        [("running < tile_.rows && running < here", "false")],
    ),
    # warp.cuh
    "the input is a step late, of a warp": (
        "warp",
        "warp.cuh",
        [("copies_wait<kAhead - 2>();", "copies_wait<kAhead - 1>();")],
    ),
    "units in their natural order": (
        "warp",
        "warp.cuh",
        [("(g >> 1) * kOwn + 2 * j + (g & 1)", "8 * j + g")],
    ),
    "rows that take no part go on, in a warp": (
        "warp",
        "warp.cuh",
        [("is_next ? words[w] : state[h][w]", "words[w]")],
    ),
    # block.cuh
    "no block_sync between steps": (
        "block",
        "block.cuh",
        [("copies_wait<kAhead - 2>();\n      block_sync();", "copies_wait<kAhead - 2>();")],
    ),
    "one state, of a block": ("block", "block.cuh", [("to = states + kState;", "to = states;")]),
    "the output is written a step late": (
        "block",
        "block.cuh",
        [("if (kBytes == 2) write();\n      ask(free", "ask(free")],
    ),
    # fma.cuh
    "no sync between steps, without tensor cores": (
        "fma",
        "fma.cuh",
        [("copies_wait<kAhead - 2>();\n      sync();", "copies_wait<kAhead - 2>();")],
    ),
    "the input is a step late, without tensor cores": (
        "fma",
        "fma.cuh",
        [("copies_wait<kAhead - 2>();\n      sync();", "copies_wait<kAhead - 1>(); sync();")],
    ),
    "the upper half of the sums is given away": (
        "fma",
        "fma.cuh",
        [("given = is_upper ? lower : upper", "given = is_upper ? upper : lower")],
    ),
    "half of the sums are not finished": (
        "fma",
        "fma.cuh",
        [("const bool is_first = split % kSame == 0;", "const bool is_first = split < 4;")],
    ),
    "rows that take no part go on, without tensor cores": (
        "fma",
        "fma.cuh",
        [("is_unit[i] && (!packed || here) ? next[i] : state[i]", "next[i]")],
    ),
    # features.cuh
    "a row of x begins with a word": (
        "warp",
        "features.cuh",
        [("} else if (odd_ >> (slots - 2) & 1) {", "} else if (false) {")],
    ),
    "what follows a row of x": (
        "block",
        "features.cuh",
        [("left_ + before < 4 ? left_ + before : 4;", "4;")],
    ),
    "the row of x before": (
        "warp",
        "features.cuh",
        [("q() ? word : word & 0xffff0000u", "word")],
    ),
    "one bias": (
        "block",
        "features.cuh",
        [("(p.bias_hh, group, n, 0)", "(p.bias_ih, group, n, 0)")],
    ),
    # epilogue.cuh
    "f' of the sum": ("block", "epilogue.cuh", [("f.times_df(sum, aux)", "f.times_df(sum, in)")]),
    "the gain counts twice": (
        "grid",
        "epilogue.cuh",
        [("in[i] + aux[i] * sum[i]", "aux[i] * (in[i] + sum[i])")],
    ),
}
SEEDS = "4"
REGIMES = ("warp", "block", "cluster", "grid", "fma")  # as csrc/cuda/kernel.h numbers them


def run(name: str, folder: Path) -> str:
    """What the driver says of a mutant; "" if it found nothing wrong."""
    families, file, edits = MUTANTS[name]
    sources = folder / "csrc" / "cuda"
    sources.parent.mkdir(parents=True)
    shutil.copytree(ROOT / "csrc" / "cuda", sources)
    shutil.copy(ROOT / "csrc" / "activation.h", sources.parent)
    text = (sources / file).read_text()
    for before, after in edits:
        pattern = r"\s+".join(map(re.escape, before.split()))  # wherever the lines break
        text, count = re.subn(pattern, lambda _, after=after: after, text)
        assert count, f"{file} has no more {before!r}"
    (sources / file).write_text(text)
    program, driver = folder / "kernels", ROOT / "tests" / "cuda" / "kernels.cpp"
    compiled = sum(1 << REGIMES.index(family) for family in families.split())
    command = [COMPILER, "-std=c++17", "-O1", "-w", "-DRNNKERN_SIMULATE"]
    command += [f"-DRNNKERN_FEW={compiled}", f"-I{sources}", f"-I{driver.parent}"]
    command += [str(driver), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for family in families.split():
        done = subprocess.run(
            [program, family, SEEDS], capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            return done.stdout[-300:] or f"exit status {done.returncode}"
    return ""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Mutant -> what was found, of all of them, as many at once as there are processors."""
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        numbered = enumerate(MUTANTS)
        each = {n: pool.submit(run, n, folder / str(i)) for i, n in numbered}
        return {name: future.exception() or future.result() for name, future in each.items()}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(found, name):
    if isinstance(found[name], Exception):
        raise found[name]
    assert bool(found[name]) == bool(MUTANTS[name][2]), found[name] or "it was not caught"
