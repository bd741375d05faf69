"""What models of other packages survive, beside ours: a test for each cell of the second table in docs/survival.md.

A model survives where an optimizer that is made afterwards gives each parameter the rate that it gives it in an
untouched twin.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mup
import pytest
import torch
import unit_scaling as uu
from blocks import PreNorm, Stack
from optimizers import parametrized, rates
from torch import distributed, nn

import torch_depthmup as dm

TABLE = Path(__file__).parents[1] / "docs" / "survival.md"


def of_mup() -> nn.Module:
    torch.manual_seed(0)
    model = Stack(4, PreNorm, 32)
    mup.set_base_shapes(model, Stack(4, PreNorm, 8), delta=Stack(4, PreNorm, 16), do_assert=False)
    return model


def of_unit_scaling() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(uu.Linear(8, 32), uu.MLP(32), uu.LinearReadout(32, 4))


PEERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.optim.Optimizer]]] = {
    "torch": (lambda: Stack(4, PreNorm), torch.optim.AdamW),
    "fold": (parametrized, dm.AdamW),
    "wrap": (lambda: parametrized("wrap"), dm.AdamW),
    "mup": (of_mup, mup.MuAdamW),
    "unit-scaling": (of_unit_scaling, uu.optim.AdamW),
}


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def emptied(model: nn.Module) -> nn.Module:
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(values)
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)._orig_mod


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


ROWS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "EMA (AveragedModel)": averaged,
    "load_state_dict(assign=True)": assigned,
    "to_empty": emptied,
    "torch.compile": compiled,
    "FSDP2 (fully_shard)": sharded,
    "a tensor as learning rate": lambda model: model,
}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def outcome(row: str, peer: str) -> str:
    build, make = PEERS[peer]
    lr: Any = torch.tensor(1.0) if row == "a tensor as learning rate" else 1.0
    twin = build()
    wanted = rates(make(twin.parameters(), lr=1.0), twin)
    try:
        model = ROWS[row](build())
        found = rates(make(model.parameters(), lr=lr), model)
    except Exception:  # whatever a package raises
        return "error"
    return "yes" if found == pytest.approx(wanted, rel=1e-6) else "wrong"


def table() -> dict[tuple[str, str], str]:
    """The documented outcome of each cell."""
    cells = {}
    for line in TABLE.read_text().partition("## Beside other packages")[2].splitlines():
        row, *outcomes = [cell.strip() for cell in line.strip("|").split(" | ")]
        if name := re.fullmatch(r"`(.+)`", row):
            cells |= {(name[1], peer): told.split(":")[0] for peer, told in zip(PEERS, outcomes, strict=True)}
    return cells


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("row", ROWS)
def test_the_cell_is_as_documented(group: None, row: str, peer: str) -> None:
    assert outcome(row, peer) == table()[row, peer]


def test_every_documented_row_is_tested() -> None:
    assert {row for row, _ in table()} == set(ROWS)
