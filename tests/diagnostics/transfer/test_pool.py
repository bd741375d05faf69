"""Sweeps in processes that are killed, die, or cannot import what they run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import distributed
import pytest
import torch
from sweeps import GRID, X, here, small, training
from torch import nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.transfer.runs import Run
from torch_depthmup.diagnostics.transfer.sweep import transfer_sweep


def test_processes_give_the_losses_of_one_thread_to_the_bit() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = transfer_sweep(small, training(), **GRID, example_inputs=X, executor=ThreadPoolExecutor(1))
    finally:
        torch.set_num_threads(threads)
    many = transfer_sweep(small, training(), **GRID, example_inputs=X)
    assert [run.loss for run in many.runs] == [run.loss for run in one.runs]


SCRIPT = """
import sys
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits
from torch_depthmup.diagnostics.shared.training import Training
from torch_depthmup.diagnostics.transfer.sweep import transfer_sweep

def network(depth):
    return DigitsResNet(depth, 8)

if __name__ == "__main__":
    sweep = transfer_sweep(
        network, Training(*digits(), steps=5, batch_size=16), depths=[2, 4], lrs=[0.001, 0.01, 0.1, 1.0],
        rules=["mup", "depth-mup-corrected"], seeds=4, path=sys.argv[1], progress=False,
    )
    print(sweep.frame().drop(columns="seconds").to_csv())
"""


def workers_of(parent: int) -> list[int]:
    """The worker processes that a pool has started (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that ended while we looked
            if _status(int(entry.name))[1] == str(parent) and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _status(pid: int) -> list[str]:
    """A process's state, its parent, and what /proc says more of it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def alive(pid: int) -> bool:
    try:
        return _status(pid)[0] != "Z"
    except OSError:
        return False


def test_a_sweep_killed_in_the_middle_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Real training in the default pool, kill -9: the workers go too, and the resumed frame is that of one go."""
    script, path = tmp_path / "script.py", tmp_path / "runs.jsonl"
    script.write_text(SCRIPT)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    child = subprocess.Popen([sys.executable, script, path], env={**os.environ, "TMPDIR": str(scratch)})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    workers = workers_of(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    assert 5 <= kept.count(b"\n") < 65
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(map(alive, workers)):
        time.sleep(0.05)
    assert not any(map(alive, workers))
    if Path("/proc").exists():
        assert workers and not list(scratch.rglob("work.pickle"))
    resumed, whole = (
        subprocess.run([sys.executable, script, file], check=True, timeout=120, capture_output=True, text=True).stdout
        for file in (path, tmp_path / "other.jsonl")
    )
    assert resumed == whole and len(whole.splitlines()) > 64
    assert path.read_bytes().startswith(kept)
    jobs = [Run.from_json(line).job for line in path.read_text().splitlines()[1:]]
    assert len(jobs) == len(set(jobs)) == 64


def dying(model: nn.Module, lr: float, seed: int) -> float:
    os._exit(1)


UNGUARDED = """
from torch_depthmup.diagnostics import transfer_sweep
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits

def network(depth):
    return DigitsResNet(depth, 8)

transfer_sweep(network, digits(), depths=[2, 4], lrs=[0.01], seeds=1, progress=False)
"""


@pytest.mark.parametrize("how", ["a script without a guard", "standard input"])
def test_workers_that_cannot_import_what_they_run_do_not_hang(tmp_path: Path, how: str) -> None:
    """The data are larger than a pipe holds."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    command, given = [sys.executable, *([script] if "script" in how else ["-"])], "" if "script" in how else UNGUARDED
    ended = subprocess.run(command, input=given, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert ended.returncode == 1
    assert "a worker process ended before its run did" in ended.stderr.splitlines()[-1]
    assert "if __name__ == '__main__'" in ended.stderr.splitlines()[-1]


def test_any_executor_does(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        sweep = transfer_sweep(small, here, **GRID, example_inputs=X, executor=executor)
    assert sweep.runs[0].loss == here(small(4), sweep.runs[0].job.lr, sweep.runs[0].job.seed)


def slow(model: nn.Module, lr: float, seed: int) -> float:
    time.sleep(0.2)
    return here(model, lr, seed)


def test_a_dask_worker_that_dies_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        victim = next(iter(client.run(os.getpid).values()))
        killer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
        killer.start()
        options = {**GRID, "seeds": 4, "example_inputs": X, "path": path}
        sweep = transfer_sweep(small, slow, **options, executor=client.get_executor())
        killer.join()
    assert len(sweep.runs) == len({run.job for run in sweep.runs}) == 32
    assert all(run.loss == here(small(run.job.depth), run.job.lr, run.job.seed) for run in sweep.runs)
    assert path.read_text().count("\n") == 33


def test_a_worker_that_ends_before_its_run_is_said_to() -> None:
    with pytest.raises(dm.DepthMuPError, match="a worker process ended before its run did"):
        transfer_sweep(small, dying, **GRID, example_inputs=X)


PATIENT = """
import time
from torch_depthmup.diagnostics import transfer_sweep
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits

def network(depth):
    return DigitsResNet(depth, 8)

def train(model, lr, seed):
    print("training", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    transfer_sweep(
        network, train, depths=[2, 4], lrs=[0.01], seeds=2, progress=False, example_inputs=digits()[0][:4]
    )
"""


def test_an_interrupted_sweep_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PATIENT)
    child = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None and child.stdout.readline() == "training\n"
    workers = workers_of(child.pid)
    start = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)  # as the terminal does, workers too
    _, said = child.communicate(timeout=30)
    assert time.monotonic() - start < 3
    assert said.strip().splitlines()[-1] == "KeyboardInterrupt" and said.count("Traceback") == 1
    assert workers and not any(map(alive, workers))
