"""Sharding on two processes with the gloo backend equals one process. Every process is started, and ended, here."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import torch_depthmup as dm

ROOT = Path(__file__).parents[2]
TITAN = ROOT / "examples" / "recipes" / "torchtitan_order.py"
OTHERS = ROOT / "tests" / "two_processes.py"
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
    losses = numbers(printed(OTHERS, 2))
    assert len(losses) == 8
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-4)


@pytest.mark.filterwarnings("ignore:the base is narrower and on the meta device")
def test_seventy_billion_parameters_are_planned_without_being_allocated() -> None:
    transformers = pytest.importorskip("transformers")

    def llama(layers: int, width: int) -> torch.nn.Module:
        heads = width // 128
        sizes = {"hidden_size": width, "intermediate_size": width * 7 // 2, "num_hidden_layers": layers}
        config = transformers.LlamaConfig(
            vocab_size=128256, num_attention_heads=heads, num_key_value_heads=heads // 8, use_cache=False, **sizes
        )
        return transformers.LlamaForCausalLM(config)

    with torch.device("meta"):
        model, base = llama(80, 8192), llama(4, 1024)
    start = time.process_time()
    plan = dm.plan(model, base=base, example_inputs=torch.zeros(1, 16, dtype=torch.long))
    assert time.process_time() - start < 20
    assert sum(parameter.numel() for parameter in model.parameters()) > 70e9
    assert len(plan.branches) == 160 and plan["lm_head.weight"].folded == 1 / 8
