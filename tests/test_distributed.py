"""Training in several processes: the same result as in one, and a clean end whatever happens."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rnnkern
from rnnkern import cli, distributed
from rnnkern.cli import main
from rnnkern.training import UserError

pytestmark = pytest.mark.processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SECONDS = 120  # that a run may take on a slow machine
# What `-m rnnkern` does, for workers that a test looks into: it says who it is, saves as often as
# it can, leaves its state behind, and takes the flags after "odd" on rank 1 only.
WORKER = """
import os, sys
import torch
from rnnkern import cli, distributed

rank, use_best = os.environ["RANK"], distributed.SharedTrainer.use_best

def leave_state(trainer):
    use_best(trainer)
    torch.save([trainer.model.state_dict(), trainer.losses, trainer.scores], f"state{rank}")

with open(f"pid{rank}", "w") as file:
    file.write(str(os.getpid()))
cli.CHECKPOINT_SECONDS = 0.0
distributed.SharedTrainer.use_best = leave_state
argv, _, odd = (" ".join(sys.argv[1:])).partition(" odd ")
sys.exit(cli.main((argv + " " + odd * (rank == "1")).split()))
"""


@pytest.fixture
def torchrun(tmp_path):
    """Starts workers in tmp_path; at the end of the test none is left."""
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def start(workers, *argv, program=("worker.py",)):
        command = [*TORCHRUN, str(workers), *program, "train", *map(str, argv)]
        # Loopback, because a machine's own name may lead nowhere.
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": "lo"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, cwd=tmp_path, **pipes))
        return started[-1]

    yield start
    for run in started:
        if run.poll() is None:
            run.terminate()  # torchrun ends its workers, by force after a while
            run.communicate()


def finish(run) -> tuple[str, str, list[str]]:
    """Its output, the output of its errors, and our lines among them; no traceback is ours."""
    said, errors = run.communicate(timeout=SECONDS)
    assert str(Path(rnnkern.__file__).parent) not in errors, errors
    return said, errors, [line for line in errors.splitlines() if line.startswith("rnnkern: ")]


def wait_for(path, run):
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def train(path, *argv) -> None:
    """Train in one process: this one."""
    assert main(["train", "--out", str(path), *map(str, argv)]) == 0


def logged(path) -> list:
    return [json.loads(line).get("epoch") for line in (path / "metrics.jsonl").open()]


def assert_same(path, other, rel=1e-9) -> None:
    """The results in two directories are equal up to the order of sums."""
    files = [load_file(d / "checkpoint.safetensors") for d in (path, other)]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][name], rtol=rel, atol=rel, msg=name)
    assert logged(path) == logged(other)


RUNS = {
    "an uneven batch": (2, 0, ["--batch", 5, "--epochs", 50]),
    "a worker without rows": (3, 0, ["--batch", 2, "--epochs", 50, "--layers", 2]),
    "a series, resumed": (2, 2, ["--csv", "sunspots", "--batch", 33, "--epochs", 5]),
}


@pytest.mark.parametrize("workers, before, argv", RUNS.values(), ids=RUNS)
def test_several_workers_give_the_result_of_one_process(workers, before, argv, torchrun, tmp_path):
    argv = [*argv, "--dtype", "float64"]
    if before:
        train(tmp_path / "shared", *argv, "--epochs", before)
    run = torchrun(workers, "--out", "shared", *argv, *["--resume"] * bool(before))
    train(tmp_path / "alone", *argv)
    said, errors, ours = finish(run)
    assert run.returncode == 0 and ours == [], errors
    lines = said.splitlines()
    assert len(set(lines)) == len(lines) and f", {workers} workers\n" in said, "said twice"
    assert_same(tmp_path / "shared", tmp_path / "alone")
    names = [{p.name for p in (tmp_path / d).iterdir()} for d in ("shared", "alone")]
    assert names[0] == names[1]
    states = [torch.load(tmp_path / f"state{rank}") for rank in range(workers)]
    for weights, *history in states[1:]:
        assert history == states[0][1:]
        assert all(torch.equal(weights[name], tensor) for name, tensor in states[0][0].items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_all_and_resume_goes_on(rank, torchrun, tmp_path):
    out, flags = tmp_path / "killed", ["--dtype", "float64"]
    run = torchrun(2, "--epochs", 1_000_000, "--out", out, *flags)
    wait_for(out / "checkpoint.safetensors", run)
    os.kill(int((tmp_path / f"pid{rank}").read_text()), signal.SIGKILL)
    _, errors, ours = finish(run)
    assert run.returncode != 0
    assert len(ours) == 1 and "lost contact with another worker: " in ours[0], errors
    assert ours[0].endswith("; go on with --resume")

    epochs = ["--epochs", len(load_file(out / "checkpoint.safetensors")["losses"]) + 20]
    train(out, "--resume", *epochs)
    train(tmp_path / "through", *epochs, *flags)
    assert_same(out, tmp_path / "through", rel=1e-6)


@pytest.mark.parametrize("whom", ["torchrun", "a worker"])
def test_ctrl_c_stops_all_after_the_same_epoch(whom, torchrun, tmp_path):
    out = tmp_path / "it's"
    program = ("-m", "rnnkern") if whom == "torchrun" else ("worker.py",)
    run = torchrun(2, "--epochs", 1_000_000, "--out", "it's", program=program)
    wait_for(out / "metrics.jsonl", run)
    if whom == "torchrun":
        run.send_signal(signal.SIGINT)
    else:
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    said, errors, ours = finish(run)
    assert run.returncode != 0 and ours == [], errors
    stopped = len(load_file(out / "checkpoint.safetensors")["losses"])
    assert said.count(f"stopped after {stopped} of 1000000 epochs") == 1
    resume = "torchrun --nproc-per-node 2 -m rnnkern train --resume --out " + shlex.quote("it's")
    assert said.count(f"resume with: {resume}\n") == 1


REFUSED = {
    "only the leader": (["--out", "worker.py"], "cannot write to worker.py"),
    "other flags": (["odd", "--lr", 0.5], "--lr is 0.01 for worker 0, 0.5 for worker 1"),
}


@pytest.mark.parametrize("argv, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_exit_code_2_on_every_worker(argv, message, torchrun):
    run = torchrun(2, *argv)
    _, errors, ours = finish(run)
    assert run.returncode != 0
    assert len(ours) == 1 and message in ours[0], errors
    assert set(re.findall(r"exitcode +: (-?\d+)", errors)) == {"2"}, errors


WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
ENVIRONMENTS = {
    "incomplete": ({"RANK": ""}, "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT but not RANK"),
    "a word": ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
    "outside": ({"RANK": "2"}, "RANK must be below WORLD_SIZE, 2, got 2"),
    "nowhere": ({"MASTER_PORT": "70000"}, "cannot meet at h:70000: port must"),
}


@pytest.mark.parametrize("change, message", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_a_bad_environment_is_refused(change, message, monkeypatch, capsys):
    for name, value in (WHOLE | change).items():
        monkeypatch.setenv(name, value)
    assert main(["train"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_compare_is_for_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "joined", lambda: True)
    with pytest.raises(UserError, match="--compare times two cells in one process"):
        cli.run_train(cli.parser().parse_args(["train", "--compare"]))


def test_every_worker_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(distributed, "joined", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.take_device("cpu")
    distributed.take_device("cuda")
    assert taken == [1]
    with pytest.raises(UserError, match="--device cuda:0: under torchrun choose cpu, or cuda"):
        distributed.take_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="2 GPUs here, and none is left for .* worker 2"):
        distributed.take_device("cuda")
