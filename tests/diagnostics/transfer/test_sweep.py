"""Sweeps: that they train what was asked for, and can be stopped, resumed and spread out."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sweeps import GRID, X, here, small, training
from torch import nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits
from torch_depthmup.diagnostics.shared.training import Training
from torch_depthmup.diagnostics.transfer.runs import Run
from torch_depthmup.diagnostics.transfer.sweep import transfer_sweep


def test_a_sweep_is_the_loop_written_by_hand() -> None:
    sweep = transfer_sweep(small, training(), **GRID, example_inputs=X, executor=ThreadPoolExecutor(1))
    for run in sweep.runs:
        torch.manual_seed(run.job.seed)
        model = small(run.job.depth)
        multiplier = None if run.job.rule == "mup" else run.job.depth / 2
        dm.parametrize(model, depth_multiplier=multiplier, example_inputs=X, rule=run.job.rule)
        assert training()(model, run.job.lr, run.job.seed) == run.loss
    assert len(sweep.runs) == 16 and sweep.rules == ["mup", "depth-mup-corrected"]
    assert len(sweep.frame()) == 16


def test_a_sweep_in_this_process_leaves_its_random_numbers_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    transfer_sweep(small, training(), **GRID, example_inputs=X, executor=ThreadPoolExecutor(1))
    assert torch.equal(torch.rand(3), wanted)


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


def diverging(model: nn.Module, lr: float, seed: int) -> float:
    return math.nan if lr > 0.005 else 1.0


def test_diverged_runs_are_data() -> None:
    sweep = transfer_sweep(small, diverging, **GRID, example_inputs=X, executor=ThreadPoolExecutor(1))
    assert sweep.edge_of_stability("mup", 4) == 0.01 and sweep.optimum("mup", 4).lr == 0.001
    blown = Training(*(part[:64] for part in digits()), optimizer="sgd", steps=50)
    model = small(2)
    dm.parametrize(model, rule="mup")
    assert blown(model, 1e6, 0) == math.inf


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depths": []}, "at least one"),
        ({"depths": [0]}, "positive integers"),
        ({"lrs": [-1.0]}, "lrs must hold positive numbers"),
        ({"lrs": [math.nan]}, "positive numbers"),
        ({"lrs": ["fast"]}, "positive numbers"),
        ({"lrs": []}, "at least one"),
        ({"depths": 4}, "depths must be a list"),
        ({"train": (X, X, X)}, "data must be a pair .inputs, targets. with a tensor of targets, not a tuple of 3"),
        ({"train": (X, torch.zeros(3, 10))}, r"equally many samples, not \[3, 4\]"),
        ({"train": 3}, "train must be data, or a function"),
        ({"rules": ["deep"]}, "no rule is called"),
        ({"seeds": 0}, "at least one"),
        ({"example_inputs": None}, "example_inputs"),
    ],
)
def test_bad_grids_are_refused(change, message: str) -> None:
    with pytest.raises(dm.DepthMuPError, match=message):
        options = {**GRID, "train": here, "example_inputs": X, "executor": ThreadPoolExecutor(1), **change}
        transfer_sweep(small, **options)


def test_numbers_may_come_from_numpy() -> None:
    options = {**GRID, "lrs": np.array([0.01, 0.001], dtype=np.float32), "depths": 2 ** np.arange(1, 3)}
    sweep = transfer_sweep(small, here, **options, example_inputs=X, executor=ThreadPoolExecutor(1))
    assert sweep.depths == [2, 4] and all(type(run.job.depth) is int for run in sweep.runs)


def test_rules_of_ones_own_are_told_by_their_exponents(tmp_path: Path) -> None:
    """Not by their names alone: a file holds two rules of one name, and gives back the runs of the right one."""
    options = {**GRID, "train": training(), "example_inputs": X, "executor": ThreadPoolExecutor(1)}
    path = tmp_path / "runs.jsonl"
    one, other = dm.Rule("mine", alpha=0.75), dm.Rule("mine", alpha=0.25, correction=0.5)
    first = transfer_sweep(small, **{**options, "rules": [one, "mup"]}, path=path)
    assert first.rules == ["mine (alpha 0.75)", "mup"]
    second = transfer_sweep(small, **{**options, "rules": other}, path=path)
    assert second.rules == ["mine (alpha 0.25, correction 0.5)"]
    for rule, sweep in ((one, first), (other, second)):
        run = next(run for run in sweep.runs if run.job.depth == 4 and run.job.rule == rule.label)
        torch.manual_seed(run.job.seed)
        model = small(4)
        dm.parametrize(model, depth_multiplier=2, example_inputs=X, rule=rule)
        assert training()(model, run.job.lr, run.job.seed) == run.loss
    again = transfer_sweep(small, **{**options, "rules": [one, other, "mup"]}, path=path)
    assert again.runs[:8] == first.runs[:8] and path.read_text().count("\n") == 25


def plain(depth: int) -> nn.Module:
    return nn.Linear(64, 10)


def always_two(depth: int) -> nn.Module:
    return DigitsResNet(2, 8)


def a_list(depth: int) -> nn.Module:
    return [small(depth)]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "factory, message",
    [
        (always_two, "depth-mup-corrected at depth 4: the factory gives 2 residual branches at depth 2 and at depth 4"),
        (a_list, "depth-mup-corrected at depth 4: the factory returned list, not an nn.Module"),
        (lambda depth: small(depth), "cannot import make_model or train.*ThreadPoolExecutor"),
    ],
)
def test_factories_that_will_not_do_are_named(factory, message: str) -> None:
    with pytest.raises(dm.DepthMuPError, match=message):
        transfer_sweep(factory, training(), **{**GRID, "rules": ["depth-mup-corrected"]})


def failing(model: nn.Module, lr: float, seed: int) -> float:
    raise RuntimeError("the disk is full")


def test_what_goes_wrong_in_training_names_its_run() -> None:
    with pytest.raises(RuntimeError, match="the disk is full") as caught:
        transfer_sweep(small, failing, **GRID, example_inputs=X)
    assert re.match(r"in the run of (depth-)?mup at depth \d, lr 0.\d+, seed \d$", caught.value.__notes__[0])


class Both(nn.Module):
    """Takes two inputs by keyword, and drops features while it trains."""

    def __init__(self, depth: int):
        super().__init__()
        self.body, self.drop = DigitsResNet(depth, 8), nn.Dropout(0.5)

    def forward(self, images: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.body(self.drop(images * scale))


def test_data_may_be_a_dict_and_the_loss_is_that_of_evaluation_mode() -> None:
    images, labels = (part[:300] for part in digits())
    inputs = {"images": images, "scale": torch.ones(300, 1)}
    loop = Training(inputs, labels, steps=2, batch_size=16)
    model = Both(2)
    dm.parametrize(model, rule="mup")
    final = loop(model, 0.001, 0)
    assert not model.training
    assert final == pytest.approx(nn.functional.cross_entropy(model(**inputs), labels).item(), rel=1e-5)
    sweep = transfer_sweep(Both, (inputs, labels), **{**GRID, "lrs": [0.001], "seeds": 1})
    assert all(math.isfinite(run.loss) for run in sweep.runs)


def test_a_factory_without_branches_is_named() -> None:
    with pytest.raises(dm.DepthMuPError, match="depth-mup-corrected at depth .: .*no residual branches"):
        transfer_sweep(
            plain, here, **{**GRID, "rules": ["depth-mup-corrected"]}, example_inputs=X, executor=ThreadPoolExecutor(1)
        )
