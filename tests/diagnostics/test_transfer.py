"""Sweeps: the arithmetic on curves with known answers, and that a sweep can be stopped, resumed and spread out."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.digits import DigitsResNet, digits
from torch_depthmup.diagnostics.plots import transfer_figure
from torch_depthmup.diagnostics.transfer import Job, Run, Sweep, Training, transfer_sweep


def parabola(
    rule: str, depth: int, centre: float, floor: float = 0.1, edge: float = math.inf, seeds: int = 2
) -> list[Run]:
    """Runs whose log loss is a parabola in log2 lr around ``centre``, diverged from ``edge`` on."""
    runs = []
    for i in range(-10, 0):
        loss = math.inf if i >= edge else floor * math.exp(0.1 * (i - centre) ** 2)
        runs += [Run(Job(rule, depth, 2.0**i, seed), loss, 1.0) for seed in range(seeds)]
    return runs


def test_optimum_drift_regret_and_edge_of_known_curves() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5.3) + parabola("mup", 64, -7.6, floor=0.05, edge=-3)))
    assert sweep.optimum("mup", 4).lr == 2**-5 and sweep.optimum("mup", 64).lr == 2**-8
    assert sweep.optimum("mup", 4).log2_lr == pytest.approx(-5.3)
    assert sweep.drift("mup", 64) == pytest.approx(-2.3)
    wanted = 0.05 * math.exp(0.1 * 2.6**2) - 0.05 * math.exp(0.1 * 0.4**2)
    assert sweep.regret("mup", 64) == pytest.approx(wanted)
    assert sweep.edge("mup", 64) == 2**-3 and sweep.edge("mup", 4) == math.inf
    assert not sweep.optimum("mup", 4).at_edge


def test_an_optimum_outside_the_grid_is_said_to_be() -> None:
    assert Sweep(tuple(parabola("mup", 4, -14))).optimum("mup", 4).at_edge


def test_a_curve_that_diverged_everywhere_has_no_optimum() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5, edge=-100) + parabola("mup", 8, -5)))
    assert math.isnan(sweep.optimum("mup", 4).lr) and sweep.optimum("mup", 4).loss == math.inf
    assert sweep.transferred("mup", 8) == [math.inf] and math.isnan(sweep.drift("mup", 8))
    assert len(transfer_figure(sweep).axes) == 1
    with pytest.raises(dm.DepthMuPError, match="mup at depth 5: the sweep has no such run"):
        sweep.optimum("mup", 5)


def test_runs_survive_json_also_diverged_ones() -> None:
    for run in (Run(Job("mup", 4, 0.1, 0), 0.3, 1.0), Run(Job("mup", 4, 0.1, 0), math.inf, 1.0)):
        assert Run.from_json(run.to_json()) == run


GRID = {"depths": [2, 4], "lrs": [0.001, 0.01], "rules": ["mup", "depth-mup"], "seeds": 2, "progress": False}


def small(depth: int) -> nn.Module:
    return DigitsResNet(depth, 8)


def training(steps: int = 3) -> Training:
    return Training(*(part[:64] for part in digits()), steps=steps, batch_size=16)


def here(job_or_model: nn.Module, lr: float, seed: int) -> float:
    """A loss that needs no training, so that only the sweep is tested."""
    return lr + seed + sum(p.numel() for p in job_or_model.parameters())


X = torch.zeros(4, 64)


def test_a_sweep_is_the_loop_written_by_hand() -> None:
    sweep = transfer_sweep(small, training(), **GRID, example_inputs=X, executor=ThreadPoolExecutor(1))
    for run in sweep.runs:
        torch.manual_seed(run.job.seed)
        model = small(run.job.depth)
        base = None if run.job.rule == "mup" else 2
        dm.parametrize(model, base_depth=base, example_inputs=X, rule=run.job.rule)
        assert training()(model, run.job.lr, run.job.seed) == run.loss
    assert len(sweep.runs) == 16 and sweep.rules == ["mup", "depth-mup"]
    assert len(sweep.frame()) == 16


def test_processes_give_the_losses_of_one_thread_to_the_bit() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = transfer_sweep(small, training(), **GRID, example_inputs=X, executor=ThreadPoolExecutor(1))
    finally:
        torch.set_num_threads(threads)
    many = transfer_sweep(small, training(), **GRID, example_inputs=X)
    assert [run.loss for run in many.runs] == [run.loss for run in one.runs]


def test_a_finished_sweep_is_read_and_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with ThreadPoolExecutor(1) as executor:
        first = transfer_sweep(small, here, **GRID, example_inputs=X, executor=executor, path=path)
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])  # killed while it wrote the fifth run
        second = transfer_sweep(small, here, **GRID, example_inputs=X, executor=executor, path=path)
    assert [(run.job, run.loss) for run in second.runs] == [(run.job, run.loss) for run in first.runs]
    after = path.read_text().splitlines()
    assert after[:5] == lines[:5] and len(after) == 17 and len({Run.from_json(line).job for line in after[1:]}) == 16


def elsewhere(model: nn.Module, lr: float, seed: int) -> float:
    return -here(model, lr, seed)


@pytest.mark.parametrize("change", [{"depths": [3, 4]}, {"train": elsewhere}, {"example_inputs": torch.ones(4, 64)}])
def test_a_file_of_another_sweep_is_refused(tmp_path: Path, change) -> None:
    options = {**GRID, "train": here, "example_inputs": X, "path": tmp_path / "runs.jsonl"}
    with ThreadPoolExecutor(1) as executor:
        transfer_sweep(small, **options, executor=executor)
        more = transfer_sweep(small, **{**options, "seeds": 3, "lrs": [0.001, 0.1]}, executor=executor)
        assert len(more.runs) == 24  # more of the same is welcome
        with pytest.raises(dm.DepthMuPError, match="another model, training, data or base depth"):
            transfer_sweep(small, **{**options, **change}, executor=executor)


def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("shopping\nlist\n")
    with pytest.raises(dm.DepthMuPError, match="holds no sweep"):
        transfer_sweep(small, here, **GRID, example_inputs=X, executor=ThreadPoolExecutor(1), path=path)
    assert path.read_text() == "shopping\nlist\n"


SCRIPT = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import torch
from torch_depthmup.diagnostics.digits import DigitsResNet
from torch_depthmup.diagnostics.transfer import transfer_sweep

def slow(model, lr, seed):
    time.sleep(0.05)
    return lr + seed + sum(p.numel() for p in model.parameters())

transfer_sweep(
    lambda depth: DigitsResNet(depth, 8), slow, depths=[2, 4], lrs=[0.001, 0.01, 0.1], rules=["mup", "depth-mup"],
    seeds=4, example_inputs=torch.zeros(4, 64), executor=ThreadPoolExecutor(1), path=sys.argv[1], progress=False,
)
"""


def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    assert 5 <= kept.count(b"\n") < 48
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, timeout=60)
    finished = path.read_bytes()
    assert finished.startswith(kept)
    jobs = [Run.from_json(line).job for line in finished.decode().splitlines()[1:]]
    assert len(jobs) == len(set(jobs)) == 48


def diverging(model: nn.Module, lr: float, seed: int) -> float:
    return math.nan if lr > 0.005 else 1.0


def test_diverged_runs_are_data() -> None:
    sweep = transfer_sweep(small, diverging, **GRID, example_inputs=X, executor=ThreadPoolExecutor(1))
    assert sweep.edge("mup", 4) == 0.01 and sweep.optimum("mup", 4).lr == 0.001
    blown = Training(*(part[:64] for part in digits()), optimizer="sgd", steps=50)
    model = small(2)
    dm.parametrize(model, rule="mup")
    assert blown(model, 1e6, 0) == math.inf


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depths": []}, "at least one"),
        ({"depths": [0]}, "positive integers"),
        ({"lrs": [-1.0]}, "must be positive"),
        ({"lrs": [math.nan]}, "must be positive"),
        ({"rules": ["deep"]}, "no rule is called"),
        ({"seeds": 0}, "at least one"),
        ({"example_inputs": None}, "example_inputs"),
    ],
)
def test_bad_grids_are_refused(change, message: str) -> None:
    with pytest.raises(dm.DepthMuPError, match=message):
        transfer_sweep(small, here, **{**GRID, "example_inputs": X, "executor": ThreadPoolExecutor(1), **change})


def plain(depth: int) -> nn.Module:
    return nn.Linear(64, 10)


def test_a_factory_without_branches_is_named() -> None:
    with pytest.raises(dm.DepthMuPError, match="depth-mup at depth .: .*no residual branches"):
        transfer_sweep(
            plain, here, **{**GRID, "rules": ["depth-mup"]}, example_inputs=X, executor=ThreadPoolExecutor(1)
        )


def test_any_executor_does(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        sweep = transfer_sweep(small, here, **GRID, example_inputs=X, executor=executor)
    assert sweep.runs[0].loss == here(small(4), sweep.runs[0].job.lr, sweep.runs[0].job.seed)


def test_the_figure_has_a_panel_for_each_rule_and_a_line_for_each_depth() -> None:
    sweep = Sweep(tuple(parabola("mup", 4, -5) + parabola("mup", 64, -7) + parabola("complete-p", 4, -5)))
    figure = transfer_figure(Sweep(sweep.runs + tuple(parabola("complete-p", 64, -5, edge=-2))), title="curves")
    assert [axis.get_title() for axis in figure.axes] == ["mup", "complete-p"]
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["4", "64"]


def slow(model: nn.Module, lr: float, seed: int) -> float:
    time.sleep(0.2)
    return here(model, lr, seed)


@pytest.mark.evidence
def test_a_dask_worker_that_dies_loses_nothing(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
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
