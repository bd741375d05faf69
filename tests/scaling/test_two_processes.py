"""Sharding on two processes with the gloo backend equals one process. Every process is started, and ended, here."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TITAN = ROOT / "examples" / "recipes" / "torchtitan_order.py"
TENSOR_PARALLEL = ROOT / "tests" / "tensor_parallel.py"
SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def printed(script: Path, processes: int) -> str:
    """What the first of some processes prints; all must end well."""
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **place, "RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return outputs[0][0]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split() if "." in word]


def test_plan_shard_initialize_scale_save_and_resume_on_two_processes_as_on_one(capsys) -> None:
    """The order of torchtitan, with a sharded checkpoint."""
    runpy.run_path(str(TITAN), run_name="__main__")
    alone, shared = numbers(capsys.readouterr().out), numbers(printed(TITAN, 2))
    assert len(alone) == 3 and shared == pytest.approx(alone, rel=1e-4)


def test_tensor_parallel_parameters_are_scaled_and_trained_as_whole_ones() -> None:
    losses = numbers(printed(TENSOR_PARALLEL, 2))
    assert len(losses) == 8
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-4)
