"""Where a monitor's rows go."""

from __future__ import annotations

import csv
import json

import blocks
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from trained import train

from torch_depthmup.diagnostics.monitor.recording import COLUMNS, FeatureMonitor
from torch_depthmup.diagnostics.monitor.writers import CSVWriter, JSONLinesWriter, TensorBoardWriter


def test_writers_get_every_row(tmp_path) -> None:
    model, x, seen, board = blocks.Stack(1, blocks.PreNorm), torch.randn(4, 8), [], SummaryWriter(tmp_path / "board")
    writers = [CSVWriter(tmp_path / "a.csv"), JSONLinesWriter(tmp_path / "a.jsonl"), TensorBoardWriter(board)]
    with FeatureMonitor(model, x, every=2, writers=[*writers, seen.append]) as monitor:
        train(model, x, 3, monitor)
    assert [row for rows in seen for row in rows] == monitor.rows
    assert sorted({row["step"] for row in monitor.rows}) == [0, 2]
    with open(tmp_path / "a.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["own"] for row in table] == [str(row["own"]) for row in monitor.rows]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["size"] for line in lines] == [row["size"] for row in monitor.rows]
    last = next(r for r in monitor.rows if r["step"] == 2 and r["layer"] == "blocks.0.fc1.weight")
    board.close()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert "gradient_alignment/blocks.0.fc1.weight" in events.Tags()["scalars"]
    (first, second) = events.Scalars("own/blocks.0.fc1.weight")
    assert (first.step, second.step) == (0, 2) and second.value == pytest.approx(last["own"], rel=1e-6)
    frame = monitor.frame()
    assert tuple(frame.columns) == COLUMNS and len(frame) == len(monitor.rows)
    with FeatureMonitor(model, x, writers=[writers[0]]) as again:
        again.record(4)
    with open(tmp_path / "a.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(monitor.rows) + len(again.rows)  # appended, one header
