"""The command line: `rnnkern train | info | check`, or `python -m rnnkern`.

Exit codes: 0 done; 1 a failed check, a failed comparison, a diverged loss or a lost worker; 2 bad
input, in one line; 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import platform
import shlex
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

import rnnkern

from . import dispatch, distributed, library, parity, pictures, reference, series, training
from .backends import cuda as cuda_backend
from .results import CHECKPOINT, Checkpoint, Results
from .training import Config, Diverged, Trainer, UserError, flag

CHECKPOINT_SECONDS = 10.0
COMPARE_TOLERANCE = 1e-4
# What a series needs other than counting does; the rest are Config's defaults.
SERIES_DEFAULTS = {"hidden": 32, "seq_len": 24, "batch": 32, "epochs": 200, "lr": 0.003}
# A resumed run may be longer than planned and run elsewhere; anything else makes it another run.
MAY_CHANGE = ("epochs", "device", "backend")
EXTRA = ("rich", "matplotlib", "safetensors")


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code; a worker ends with it."""
    try:
        code = run(argv)
    except BaseException:
        distributed.leave()
        raise
    distributed.leave(code)
    return code


def run(argv: list[str] | None) -> int:
    """What main() runs."""
    try:
        args = parser().parse_args(argv)
        require_extra()
        if args.command == "train":
            distributed.join()
        code = args.run(args)
        distributed.meet()
        return code
    except UserError as error:
        return fail(error, 2)
    except Diverged as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except RuntimeError as error:
        if (reason := distributed.lost(error)) is None:
            raise
        kept = getattr(args, "out", None) and (args.out / CHECKPOINT).is_file()
        hint = "; go on with --resume" if kept else ""
        return fail(f"lost contact with another worker: {reason}{hint}", 1)


def fail(error: object, code: int) -> int:
    """Say what went wrong in one line, once for all workers, and hand back the exit code."""
    speaks, code = distributed.first_to_fail(code)
    if speaks:
        print(f"rnnkern: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def require_extra() -> None:
    """Refuse at the start rather than after an hour of training."""
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise UserError(f"the command line needs {name}: pip install 'rnnkern[cli]'") from None


def parser() -> Parser:
    """The arguments of every command; a flag that was not given is None."""
    defaults = Config()

    def default(name: str) -> str:
        of = getattr(defaults, name)
        return (
            f"{of}, or {SERIES_DEFAULTS[name]} with --csv" if name in SERIES_DEFAULTS else str(of)
        )

    main_parser = Parser(
        prog="rnnkern",
        description="The vanilla RNN layer, fused: train one, see what runs, check it.",
    )
    main_parser.add_argument(
        "--version", action="version", version=f"rnnkern {rnnkern.__version__}"
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train the notebook's counting task, or a forecast of a CSV column",
        description="Train the notebook's RNN to count; with --csv, to forecast a time series.",
    )
    train.set_defaults(run=run_train)
    data = train.add_argument_group("data")
    data.add_argument(
        "--csv",
        metavar="FILE",
        help="a series to forecast; `sunspots` is the sample that comes along",
    )
    data.add_argument(
        "--column", metavar="NAME", help="its column (default: the only one beside the first)"
    )
    model = train.add_argument_group("model and optimiser")
    for name, kind, text in [
        ("hidden", int, "hidden units"),
        ("layers", int, "stacked layers"),
        ("seq_len", int, "steps of a sequence"),
        ("batch", int, "sequences of a batch"),
        ("epochs", int, "passes over the data"),
        ("lr", float, "Adam's learning rate"),
        ("seed", int, "of the weights and of every other draw"),
    ]:
        model.add_argument(
            flag(name),
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"{text} ({default(name)})",
        )
    for name, known in [
        ("nonlinearity", reference.ACTIVATIONS),
        ("cell", training.CELLS),
        ("backend", ("auto", *dispatch.BACKENDS)),
        ("dtype", training.DTYPES),
    ]:
        model.add_argument(flag(name), choices=list(known), help=f"default: {default(name)}")
    model.add_argument(
        "--device", metavar="NAME", help=f"cpu, cuda, cuda:1, ... ({default('device')})"
    )
    train.add_argument(
        "--compare", action="store_true", help="train both cells side by side: losses and times"
    )
    output = train.add_argument_group("results")
    output.add_argument(
        "--out", type=Path, metavar="DIR", help="write checkpoint, metrics and pictures there"
    )
    again = output.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace an earlier result in DIR")
    again.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")

    info = commands.add_parser(
        "info", help="versions, the compiled library, and what each backend can run"
    )
    info.set_defaults(run=run_info)

    check = commands.add_parser(
        "check", help="compare every backend with the definition, on this machine"
    )
    check.set_defaults(run=run_check)
    check.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, ... (cpu)")
    return main_parser


@functools.cache
def console():
    """Where everything but errors is printed; made late, for rich is an extra."""
    from rich.console import Console

    return Console(highlight=False, markup=False, quiet=not distributed.leads())


def say(text: str = "") -> None:
    """Print a line, never wrapped: a path or a command in it can be copied."""
    console().print(text, soft_wrap=True)


def table(title: str, *columns: str, right: tuple[str, ...] = ()):
    """An empty rich table; the columns named in `right` are numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


# train


def run_train(args: argparse.Namespace) -> int:
    """`rnnkern train`."""
    explicit = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Config)
        if getattr(args, field.name) is not None
    }
    if "csv" in explicit:
        explicit["csv"] = series.absolute(explicit["csv"])
    if args.compare:
        if distributed.joined():
            raise UserError("--compare times two cells in one process: run it without torchrun")
        return run_compare(args, explicit)
    if args.out is None and (args.resume or args.overwrite):
        raise UserError(f"--{'resume' if args.resume else 'overwrite'} needs --out DIR")
    checkpoint = Checkpoint.read(args.out / CHECKPOINT) if args.resume else None
    config = resumed_config(checkpoint, explicit) if checkpoint else new_config(explicit)
    distributed.take_device(config.device)
    training.check_backend(config)
    shared = distributed.joined()
    trainer = (distributed.SharedTrainer if shared else Trainer)(config, make_task)
    if config.csv:  # the column that was meant, for a later --resume --column
        trainer.config = dataclasses.replace(config, column=trainer.task.series.column)
    if checkpoint:
        checkpoint.restore(trainer)
    if shared:
        trainer.connect()
    results = None
    if args.out and distributed.leads():
        results = Results(args.out, trainer.epoch if checkpoint else None, args.overwrite)
    introduce(trainer)
    asked = contextlib.nullcontext(trainer.stop) if shared else sigint_flag()
    with training.few_threads(config), asked as interrupted:
        train(trainer, results, interrupted)
        if results:
            results.save(trainer)
    if trainer.epoch < config.epochs:
        after = f"stopped after {trainer.epoch} of {config.epochs} epochs"
        if not results:
            say(f"{after}; nothing was kept, for want of --out DIR")
        else:
            say(f"{after}; the checkpoint is {results.path / CHECKPOINT}")
            run = f"torchrun --nproc-per-node {distributed.count()}" if shared else "python"
            say(f"resume with: {run} -m rnnkern train --resume --out {shlex.quote(str(args.out))}")
        return 130
    trainer.use_best()
    summary, drawn = conclude_series(trainer) if config.csv else conclude_counting(trainer)
    if results:
        results.log(
            {"summary": True, "epochs": trainer.epoch, "seconds": trainer.seconds, **summary}
        )
        for name, png in drawn().items():
            results.picture(name, png)
        say(f"results are in {results.path}")
    return 0


def new_config(explicit: dict) -> Config:
    """The configuration of a run that starts, from the flags that were given."""
    if "column" in explicit and "csv" not in explicit:
        raise UserError("--column needs --csv FILE")
    return Config(**(SERIES_DEFAULTS if "csv" in explicit else {}) | explicit)


def resumed_config(checkpoint: Checkpoint, explicit: dict) -> Config:
    """The checkpoint's configuration, with what the flags may change of it.

    Raises:
        UserError: a flag says otherwise than the checkpoint.
    """
    for name, value in explicit.items():
        saved = getattr(checkpoint.config, name)
        if name not in MAY_CHANGE and value != saved:
            raise UserError(
                f"{flag(name)} {value} is not the checkpoint's {saved}: leave it out to resume"
            )
    config = dataclasses.replace(checkpoint.config, **explicit)
    if config.epochs < checkpoint.epoch:
        raise UserError(
            f"--epochs {config.epochs} is behind the checkpoint, at epoch {checkpoint.epoch}"
        )
    return config


def make_task(config: Config):
    """What `config` trains on."""
    return series.Forecast(config) if config.csv else training.Counting(config)


def introduce(trainer: Trainer) -> None:
    """Say what is about to be trained, and on what."""
    config, task = trainer.config, trainer.task
    if config.csv:
        data, axis, train = task.series, task.series.axis, task.train
        say(f"{data.path}, column {data.column}: {len(data.values)} values")
        say(
            f"trained on {data.axis_name} {axis[0]:g}..{axis[train - 1]:g}, "
            f"held out {axis[train]:g}..{axis[-1]:g} ({len(axis) - train} values)"
        )
    cell = config.cell if config.cell == "reference" else f"{config.cell} ({config.backend})"
    say(
        f"cell {cell}, hidden {config.hidden}, layers {config.layers}, {config.nonlinearity}, "
        f"{config.dtype} on {config.device}, seed {config.seed}"
        + (f", {distributed.count()} workers" if distributed.joined() else "")
    )
    if trainer.epoch:
        say(f"resumed at epoch {trainer.epoch} of {config.epochs}")


@contextlib.contextmanager
def sigint_flag():
    """Make Ctrl-C set a flag, so that the epoch is finished and saved; a second stops at once."""
    flag_set = threading.Event()
    # Only the main thread may handle signals.
    if threading.current_thread() is not threading.main_thread():
        yield flag_set
        return

    def handler(signum, frame):
        flag_set.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield flag_set
    finally:
        signal.signal(signal.SIGINT, before)


def train(trainer: Trainer, results: Results | None, interrupted: threading.Event) -> None:
    """Train to the end or the interrupt, with progress, loss lines, metrics and checkpoints."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    # Refreshed by hand: the thread that would do it takes the interpreter from the loop, and at
    # these sizes it shows.
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.6f}  {task.fields[rate]:.0f} epochs/s"),
        TimeRemainingColumn(),
        console=console(),
        auto_refresh=False,
        disable=not console().is_terminal,
    )
    first_epoch, first_seconds = trainer.epoch, trainer.seconds
    saved = time.monotonic()

    def rate() -> float:
        seconds = trainer.seconds - first_seconds
        return (trainer.epoch - first_epoch) / seconds if seconds else 0.0

    def on_log() -> None:
        epoch, loss = trainer.epoch - 1, trainer.losses[-1]
        record = {
            "epoch": epoch,
            "loss": loss,
            "seconds": trainer.seconds,
            "epochs_per_second": rate(),
        }
        line = f"epoch: {epoch} - loss: {loss}"
        if trainer.scores:
            record["early_stop_loss"] = trainer.scores[-1]
            line += f" - early stop: {trainer.scores[-1]}"
        say(line)
        if results:
            results.log(record)

    def on_tick() -> None:
        nonlocal saved
        if not bar.disable:
            bar.update(
                shown, completed=trainer.epoch, loss=trainer.last_loss(), rate=rate(), refresh=True
            )
        if results and time.monotonic() - saved >= CHECKPOINT_SECONDS:
            results.save(trainer)
            saved = time.monotonic()

    with bar:
        shown = bar.add_task(
            "", total=trainer.config.epochs, completed=trainer.epoch, loss=float("nan"), rate=0.0
        )
        training.fit(trainer, interrupted.is_set, on_log, on_tick)
        if trainer.losses:
            bar.update(
                shown, completed=trainer.epoch, loss=trainer.losses[-1], rate=rate(), refresh=True
            )


def conclude_counting(trainer: Trainer):
    """Print the notebook's prediction; return the summary and a drawer of the pictures."""
    task, losses = trainer.task, trainer.losses
    predicted = task.predict(trainer.model)
    note = ""
    if task.inputs[0] not in task.starts:
        starts = ", ".join(map(str, task.starts))
        note = (
            f"an extrapolation: the training sequences start at {starts}, not at {task.inputs[0]}"
        )
    best = min(losses[-20:])
    say(f"best loss of the last 20 epochs: {best:.3g}, after {trainer.seconds:.2f} s of training")
    say(f"prediction for {task.inputs}: [{', '.join(f'{value:.4f}' for value in predicted)}]")
    if note:
        say(f"note: {note}")
    summary = {
        "loss": losses[-1],
        "best_loss_of_last_20": best,
        "prediction": predicted,
        "extrapolation": bool(note),
    }
    return summary, lambda: {
        "loss.png": pictures.loss(losses, [], "Counting: training loss", "squared numbers"),
        "prediction.png": pictures.prediction(task.inputs, predicted, note),
    }


def conclude_series(trainer: Trainer):
    """Print the errors on the held-out values; return the summary and a drawer of the pictures."""
    task, data = trainer.task, trainer.task.series
    found, following = task.errors(trainer.model), task.next_value(trainer.model)
    title = f"{data.column}: errors on the {len(data.values) - task.train} held-out values"
    shown = table(title, "one-step forecast", "RMSE", "MAE", right=("RMSE", "MAE"))
    for name, label in (("model", "this RNN"), ("naive", "naive (the last value again)")):
        shown.add_row(label, f"{found[name]['rmse']:.4g}", f"{found[name]['mae']:.4g}")
    console().print(shown)
    better = 1 - found["model"]["rmse"] / found["naive"]["rmse"] if found["naive"]["rmse"] else 0.0
    if better > 0:
        say(f"the RNN's RMSE is {better:.0%} below the naive forecast's")
    else:
        say("the naive forecast is the better one here")
    best = min(range(len(trainer.scores)), key=trainer.scores.__getitem__)
    say(f"weights of epoch {best}, the best of {trainer.epoch} on the end of the training part")
    say(f"{trainer.seconds:.2f} s of training")
    say(f"next value after {data.axis_name} {data.axis[-1]:g}: {following:.4g}")
    title = f"{data.column}: training loss"
    summary = {
        "loss": trainer.losses[-1],
        "best_epoch": best,
        "held_out": found,
        "next_value": following,
    }
    predicted = task.forecast(trainer.model).tolist()
    return summary, lambda: {
        "loss.png": pictures.loss(trainer.losses, trainer.scores, title, "normalised units"),
        "forecast.png": pictures.forecast(data, task.train, predicted, found),
    }


def run_compare(args: argparse.Namespace, explicit: dict) -> int:
    """`rnnkern train --compare`."""
    for name, given in (
        ("--out", args.out),
        ("--resume", args.resume),
        ("--overwrite", args.overwrite),
    ):
        if given:
            raise UserError(f"--compare trains two models and keeps neither: drop {name}")
    if "cell" in explicit:
        raise UserError("--compare trains both cells: drop --cell")
    config = new_config(explicit)
    training.check_backend(config)
    with training.few_threads(config):
        found = training.compare(config, make_task)
    numbers = ("us/epoch", "epochs/s", "final loss")
    title = f"{config.epochs} epochs, the same weights and data, in turns"
    shown = table(title, "cell", *numbers, right=numbers)
    median = {cell: statistics.median(blocks) for cell, blocks in found.block_us.items()}
    for cell, us in median.items():
        shown.add_row(cell, f"{us:.1f}", f"{1e6 / us:.0f}", f"{found.losses[cell][-1]:.6g}")
    console().print(shown)
    ratio = median["reference"] / median["fused"]
    say(f"fused is {ratio:.2f} x as fast as the reference (medians of the turns)")
    judged, error = min(100, config.epochs), found.loss_error()
    say(f"largest relative difference of the losses over the first {judged} epochs: {error:.2e}")
    if config.dtype in ("bfloat16", "float16"):
        say(f"not judged: one {config.dtype} rounding is more than {COMPARE_TOLERANCE:g}")
    elif not error <= COMPARE_TOLERANCE:
        # Saturated units have gradients that are all rounding, and Adam makes full steps of them.
        hint = "" if config.dtype == "float64" else "; --dtype float64 tells a fault from rounding"
        what = f"the two cells' losses differ by {error:.2e}, more than {COMPARE_TOLERANCE:g}"
        return fail(what + hint, 1)
    return 0


# info


def run_info(args: argparse.Namespace) -> int:
    """`rnnkern info`."""
    shown = table("This installation", "what", "is")
    shown.add_row("rnnkern", rnnkern.__version__)
    shown.add_row("torch", torch.__version__)
    shown.add_row(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    shown.add_row("triton", version_of("triton"))
    shown.add_row("CUDA", cuda())
    shown.add_row(
        "compiled library",
        library.path if library.loaded else f"{library.reason}; {library.HOW_TO_BUILD}",
    )
    shown.add_row("CUDA kernels", str(len(cuda_backend.kernels())))
    shown.add_row("instruction set", library.capability() if library.loaded else "-")
    shown.add_row("threads", str(torch.get_num_threads()))
    console().print(shown)

    shown = table(
        "What each backend can run (hidden 16, tanh)", "backend", "device", "dtypes", "runs"
    )
    for backend in dispatch.BACKENDS:
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            answers: dict[str, list[str]] = {}
            for name, dtype in training.DTYPES.items():
                reasons = dispatch.explain(device=device, dtype=dtype)[backend]
                answers.setdefault("; ".join(reasons) or "yes", []).append(name)
            for answer, dtypes in answers.items():
                shown.add_row(
                    backend,
                    device,
                    " ".join(dtypes),
                    answer if answer == "yes" else f"no: {answer}",
                )
    console().print(shown)
    return 0


def version_of(module: str) -> str:
    """An optional module's version."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    return importlib.import_module(module).__version__


def cuda() -> str:
    """The CUDA that torch was built with, and the devices that it sees."""
    if not torch.version.cuda:
        return "torch was built without it"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names) or 'no device'}"


# check


def run_check(args: argparse.Namespace) -> int:
    """`rnnkern check`."""
    device, began = training.find_device(args.device), time.perf_counter()
    with console().status("checking"):
        outcomes = parity.run(device)
    shown = table(
        f"Largest relative error, {device} (share of what is allowed)",
        "backend",
        *training.DTYPES,
        right=tuple(training.DTYPES),
    )
    refused: dict[str, set[str]] = {}
    for backend in dispatch.BACKENDS:
        cells = []
        for dtype in training.DTYPES.values():
            of = [o for o in outcomes if (o.backend, o.dtype) == (backend, dtype)]
            ran = [o for o in of if not o.refused]
            refused.setdefault(backend, set()).update(o.refused for o in of if o.refused)
            failed = sum(o.failed for o in ran)
            if not ran:
                cells.append("-")
            elif failed:
                cells.append(f"{failed} of {len(ran)} wrong")
            else:
                worst = max(ran, key=lambda o: o.error / o.allowed)
                cells.append(f"{worst.error:.1e} ({worst.error / worst.allowed:.0%})")
        shown.add_row(backend, *cells)
    console().print(shown)
    for backend, reasons in refused.items():
        for reason in sorted(reasons):
            say(f"{backend} did not run everything: {reason}")
    ran, failed = [o for o in outcomes if not o.refused], [o for o in outcomes if o.failed]
    say(f"{len(ran)} comparisons in {time.perf_counter() - began:.1f} s, {len(failed)} wrong")
    for o in failed[:10]:
        dtype = str(o.dtype).removeprefix("torch.")
        what = f"{o.worst}: error {o.error:.2e}, allowed {o.allowed:.2e}" if o.allowed else o.worst
        fail(f"{o.backend}, {dtype}, {o.case}: {what}", 1)
    return 1 if failed else 0
