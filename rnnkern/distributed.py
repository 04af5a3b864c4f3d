"""Training in several processes, the workers that torchrun starts: how they meet, share and part.

Every worker makes the same model and data, and trains on its share of each batch with the whole
batch's gradient: all hold the same weights, moments, losses and scores at any time. Only the leader
(rank 0) prints and writes. In a process that torchrun did not start, none of it does anything.
"""

import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .training import Config, Trainer, UserError, flag

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_interrupted = threading.Event()


def join() -> None:
    """Meet the other workers, if torchrun started this process. From then on a SIGINT or SIGTERM to
    one asks all to stop after the same epoch; torchrun, when it sends them, kills after 30 s.

    Raises:
        UserError: torchrun's variables are incomplete or wrong, or the others cannot be reached.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given.keys() & set(VARIABLES[:3]):  # a MASTER_ADDR alone may be there for other reasons
        return
    if missing := [name for name in VARIABLES if name not in given]:
        raise UserError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}: "
            "torchrun sets all of them, a run in one process needs none"
        )
    for name in VARIABLES:
        if name != "MASTER_ADDR" and not given[name].isdecimal():
            raise UserError(f"the environment's {name} must be a number, got {given[name]!r}")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise UserError(
            f"the environment's RANK must be below WORLD_SIZE, {given['WORLD_SIZE']}, "
            f"got {given['RANK']}"
        )
    try:
        # Gradients of a GPU's model go through NCCL; everything else is on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        where = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
        raise UserError(f"the workers cannot meet at {where}: {_reason(error)}") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _interrupted.set())


def joined() -> bool:
    """Whether this process is a worker."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many workers there are."""
    return dist.get_world_size() if joined() else 1


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return not joined() or dist.get_rank() == 0


def meet() -> None:
    """Wait for all workers. None may leave before the leader has written everything: torchrun ends
    the others when one stops early."""
    if joined():
        dist.barrier()


def leave(code: int | None = None) -> None:
    """Part from the other workers, who notice; the last that a worker does, with an exit code."""
    if joined():
        # The handlers end with the interpreter, before the process does; what torchrun sends then
        # must not replace the exit code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        dist.destroy_process_group()
        if code is not None:
            # Not through the interpreter's end, where torch's own threads have been seen to abort.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def first_to_fail(code: int) -> tuple[bool, int]:
    """Whether this process, about to fail with `code`, is to say why, and what to exit with.

    The first worker that fails is the cause of the others' failing: it speaks, its code is theirs.
    """
    if not joined():
        return True, code
    rank = dist.get_rank()
    try:
        store = dist.group.WORLD.get_group_store()
        first, code = store.compare_set("failed", "", f"{rank} {code}").decode().split()
    except RuntimeError:  # the store has gone with its host
        return True, code
    return int(first) == rank, int(code)


def lost(error: RuntimeError) -> str | None:
    """What `error` says of a worker that is gone, or None if it is about something else."""
    if joined() and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """The first line, without gloo's place in its source and advice."""
    return re.sub(r"^\[\S+\] |\. This is typically.*", "", str(error).partition("\n")[0])


def take_device(name: str) -> None:
    """Make `--device cuda` this worker's own GPU.

    Raises:
        UserError: a device that workers cannot use or would all share, or fewer GPUs than workers.
    """
    if not joined() or name == "cpu":
        return
    if name != "cuda":
        raise UserError(
            f"--device {name}: under torchrun choose cpu, or cuda, which gives each worker its own"
        )
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise UserError(
            f"--device cuda: {there} GPUs here, and none is left for this machine's worker {local}"
        )
    torch.cuda.set_device(local)


class SharedTrainer(Trainer):
    """A Trainer that trains on this worker's share; its losses are those of the whole batches.

    `stop` is set when any worker was interrupted, on all of them after the same epoch.
    """

    def __init__(self, config: Config, make_task: Callable[[Config], object]):
        super().__init__(config, make_task)
        self.stop = threading.Event()

    def connect(self) -> None:
        """Connect the models, after `restore` if there is one.

        Raises:
            UserError: the workers were told to train different things.
        """
        mine = {flag(name): value for name, value in dataclasses.asdict(self.config).items()}
        del mine["--csv"]  # its place may be another on another machine
        mine |= {"the data": self.task.fingerprint, "the checkpoint's epoch": self.epoch}
        all_of = [mine] * count()
        dist.all_gather_object(all_of, mine)
        for rank, theirs in enumerate(all_of):
            for name, value in theirs.items():
                if value != all_of[0][name]:
                    raise UserError(
                        f"the workers do not train the same: {name} is {all_of[0][name]} "
                        f"for worker 0, {value} for worker {rank}"
                    )
        # It copies the mean gradients into those that are there, so they stay FlatAdam's views.
        self._connected = nn.parallel.DistributedDataParallel(self.model)

    def advance(self) -> None:
        """Train one epoch together."""
        super().advance()
        both = torch.tensor([self._unread[-1].item(), _interrupted.is_set()], dtype=torch.float64)
        dist.all_reduce(both)
        self._unread[-1] = both[0] / count()
        if both[1]:
            self.stop.set()

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        workers, rank, whole = count(), dist.get_rank(), len(x)
        x, y = (rows.tensor_split(workers)[rank] for rows in (x, y))
        outputs, _ = self._connected(x)
        # So that the workers' mean, of this as of its gradient, is the whole batch's. A share
        # without rows adds nothing to it: their mean would be NaN, their sum is 0.
        loss = nn.functional.mse_loss(outputs, y) if len(x) else outputs.sum()
        loss = loss * (workers * len(x) / whole)
        loss.backward()
        return loss.detach()
