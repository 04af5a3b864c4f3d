"""What all tests share: markers, seeds, poisoned memory, and how many tests wanted a GPU."""

import os

import pytest
import torch

import rnnkern

MARKERS = [
    "compiles: runs torch.compile",
    "processes: starts other processes",
    "gpu: needs a CUDA GPU",
]
# Exit status of a run that was asked for an instruction set which this CPU does not have.
NO_SUCH_CPU = 77


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    asked = os.environ.get("RNNKERN_CPU_CAPABILITY")
    if asked:
        try:
            rnnkern.library.capability()
        except ValueError as error:
            pytest.exit(str(error).splitlines()[0], NO_SUCH_CPU)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """How many processes `-n auto` makes: there are few files, and each process imports torch."""
    return min(os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="GPU: torch sees no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "gpu" in getattr(report, "keywords", {})
    ]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests were skipped")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """One thread, unless a test sets more: these sizes gain nothing from a second one, and where
    another program has the other core, waiting for it made the whole run four times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def poisoned():
    """Fills memory with NaN and frees it, so that what a kernel leaves unwritten may show."""

    def poison(*sizes: int) -> None:
        """sizes: bytes of the blocks that a call is about to allocate."""
        blocks = [
            torch.empty(size, dtype=torch.uint8).fill_(0xFF) for size in sizes for _ in "1234"
        ]
        del blocks

    return poison
