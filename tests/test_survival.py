"""What a parametrized model survives: a small test for each cell of the table in docs/survival.md.

Each case takes a model parametrized one way, does what the row says, and returns the model to train. It survives where
that model still computes and trains as a twin to which nothing was done, or as the row says. A refusal is an outcome
too: it names the cause.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from blocks import PreNorm, Stack
from optimizers import X, parametrized, rates
from torch import distributed, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import torch_depthmup as dm

TABLE = Path(__file__).parents[1] / "docs" / "survival.md"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> torch.Tensor:
    """The outputs after two steps."""
    optimizer = optimizer or dm.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model(X)


def same_training(changed: nn.Module, how: str) -> None:
    torch.testing.assert_close(trained(changed), trained(parametrized(how)), rtol=1e-4, atol=1e-5)


def same_outputs(function: Callable[[torch.Tensor], torch.Tensor], how: str) -> None:
    torch.testing.assert_close(function(X), parametrized(how)(X), rtol=1e-4, atol=1e-5)


# Copies and files


def deepcopy(how: str) -> None:
    same_training(copy.deepcopy(parametrized(how)), how)


def pickled(how: str) -> None:
    same_training(pickle.loads(pickle.dumps(parametrized(how))), how)


def weights_only(how: str) -> None:
    saved, model = io.BytesIO(), parametrized(how)
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    model.load_state_dict(torch.load(saved, weights_only=True))
    same_training(model, how)


def assigned(how: str) -> None:
    model = parametrized(how)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    same_training(model, how)


def emptied(how: str) -> None:
    model = parametrized(how)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(values)
    same_training(model, how)


def averaged(how: str) -> None:
    model = parametrized(how)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    same_outputs(average, how)
    assert dm.plan_of(average) == dm.plan_of(model)


# Compilers and transforms


def compiled(how: str) -> None:
    torch._dynamo.reset()
    same_training(torch.compile(parametrized(how), backend="aot_eager"), how)


def exported(how: str) -> None:
    same_outputs(torch.export.export(parametrized(how), (X,)).module(), how)


def traced(how: str) -> None:
    same_outputs(torch.jit.trace(parametrized(how), (X,)), how)


def vmapped(how: str) -> None:
    model = parametrized(how)
    parameters = dict(model.named_parameters())
    same_outputs(torch.vmap(lambda x: torch.func.functional_call(model, parameters, (x,))), how)


# Training


def autocast(how: str) -> None:
    model, twin = parametrized(how), parametrized(how)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(X), twin(X).bfloat16(), rtol=0.05, atol=0.05)
    trained(model)


def grad_scaler(how: str) -> None:
    model, scaler = parametrized(how), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = dm.AdamW(model, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(model(X).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(model(X), trained(parametrized(how)), rtol=1e-4, atol=1e-5)


def accumulation(how: str) -> None:
    model = parametrized(how)
    optimizer = dm.AdamW(model, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        for part in X.split(2):
            (model(part).square().mean() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(model(X), trained(parametrized(how)), rtol=1e-4, atol=1e-5)


def clipped(how: str) -> None:
    """Both ways train alike with dm.clip_grad_norm_."""
    results = []
    for one in (how, "wrap"):
        model = parametrized(one)
        optimizer = dm.SGD(model, lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            dm.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        results.append(model(X))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def checkpointed(how: str) -> None:
    model = parametrized(how)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    same_training(model, how)


def frozen(how: str) -> None:
    model = parametrized(how)
    model.stem.requires_grad_(False)
    before = model.stem.weight.clone()
    trained(model)
    assert torch.equal(model.stem.weight, before)


# Distributed


def data_parallel(how: str) -> None:
    same_training(nn.parallel.DistributedDataParallel(parametrized(how)), how)


def fsdp1(how: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    same_training(FullyShardedDataParallel(parametrized(how), use_orig_params=True, device_id=torch.device("cpu")), how)


def fsdp2(how: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = parametrized(how)
    for block in model.blocks:
        fully_shard(block)
    same_training(fully_shard(model), how)


def zero(how: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = parametrized(how)
    make = dm.optimizer(ZeroRedundancyOptimizer)
    optimizer = make(model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2)
    torch.testing.assert_close(trained(model, optimizer), trained(parametrized(how)), rtol=1e-4, atol=1e-5)


def tensor_parallel(how: str) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = parametrized(how)
    for block in model.blocks:
        parallelize_module(block, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    same_outputs(model, how)
    found = {normal: rate for normal, rate in rates(dm.AdamW(model, lr=1.0), model).items()}
    twin = parametrized(how)
    assert found == rates(dm.AdamW(twin, lr=1.0), twin)


# Changed weights


def weight_normed(how: str) -> None:
    model = parametrized(how)
    parametrizations.weight_norm(model.blocks[0].fc2)
    dm.AdamW(model)


def spectrally_normed(how: str) -> None:
    model = parametrized(how)
    parametrizations.spectral_norm(model.blocks[0].fc2)
    dm.AdamW(model)


def pruned(how: str) -> None:
    """Within one tensor the order of sizes is that without a multiplier: the same entries go, with the same rates."""
    model, wrapped = parametrized(how), parametrized("wrap")
    same_rates = rates(dm.AdamW(model, lr=1.0), model)
    for net in (model, wrapped):
        prune.l1_unstructured(net.blocks[0].fc2, "weight", amount=0.3)
    assert torch.equal(model.blocks[0].fc2.weight_mask, wrapped.blocks[0].fc2.weight_mask)
    found = rates(dm.AdamW(model, lr=1.0), model)
    assert {name.removesuffix("_orig"): rate for name, rate in found.items()} == same_rates
    torch.testing.assert_close(trained(model), trained(wrapped), rtol=1e-4, atol=1e-5)


def restored(how: str) -> None:
    """A checkpoint of the other way, as it is."""
    other = parametrized("wrap" if how == "fold" else "fold")
    parametrized(how).load_state_dict(other.state_dict())


def converted(how: str) -> None:
    other, model = parametrized("wrap" if how == "fold" else "fold"), parametrized(how)
    trained(other)
    model.load_state_dict(dm.convert_state_dict(other.state_dict(), model))
    with torch.no_grad():
        torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-5)


def replaced_head(how: str) -> None:
    """A layer outside the branches, of the base's width, has nothing to lose."""
    model = parametrized(how)
    model.head = nn.Linear(model.head.in_features, 7)
    assert rates(dm.AdamW(model, lr=1.0), model)["head.weight"] == 1.0
    trained(model)


def replaced_wide_head(how: str) -> None:
    model = Stack(4, PreNorm, 24)
    dm.parametrize(model, base=Stack(2, PreNorm, 12), example_inputs=X, how=how)
    model.head = nn.Linear(24, 7)
    dm.AdamW(model)


def tied(how: str) -> None:
    model = parametrized(how)
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    dm.AdamW(model)


def replaced_carrier(how: str) -> None:
    model = parametrized(how)
    model.blocks[0].fc2 = nn.Linear(model.blocks[0].fc2.in_features, model.blocks[0].fc2.out_features)
    dm.AdamW(model)


class LoRA(nn.Module):
    """A frozen layer with a low-rank update beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def low_rank(how: str) -> None:
    model = parametrized(how)
    model.blocks[0].fc1 = LoRA(model.blocks[0].fc1)
    dm.AdamW(p for p in model.parameters() if p.requires_grad)


def quantization_aware(how: str) -> None:
    from torch.ao import quantization

    model = parametrized(how).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    same_rates = rates(dm.AdamW(model, lr=1.0), model)
    prepared = quantization.prepare_qat(model, inplace=False)
    found = rates(dm.AdamW(prepared, lr=1.0), prepared)
    assert {name: found[name] for name in same_rates} == same_rates


ROWS: dict[str, Callable[[str], None]] = {
    "deepcopy": deepcopy,
    "pickle": pickled,
    "state_dict, weights_only": weights_only,
    "load_state_dict(assign=True)": assigned,
    "to_empty": emptied,
    "EMA (AveragedModel)": averaged,
    "torch.compile": compiled,
    "torch.export": exported,
    "torch.jit.trace": traced,
    "vmap, functional_call": vmapped,
    "autocast": autocast,
    "GradScaler": grad_scaler,
    "gradient accumulation": accumulation,
    "dm.clip_grad_norm_": clipped,
    "activation checkpointing": checkpointed,
    "freezing": frozen,
    "DDP": data_parallel,
    "FSDP1 (use_orig_params)": fsdp1,
    "FSDP2 (fully_shard)": fsdp2,
    "ZeroRedundancyOptimizer": zero,
    "tensor parallel": tensor_parallel,
    "weight_norm afterwards": weight_normed,
    "spectral_norm afterwards": spectrally_normed,
    "prune afterwards": pruned,
    "LoRA afterwards": low_rank,
    "a checkpoint of the other how": restored,
    "dm.convert_state_dict of it": converted,
    "a new head": replaced_head,
    "a new head of a wider model": replaced_wide_head,
    "tying weights": tied,
    "a new layer in a branch": replaced_carrier,
    "QAT afterwards": quantization_aware,
}


def table() -> dict[tuple[str, str], str]:
    """The documented outcome of each cell."""
    cells = {}
    for line in TABLE.read_text().partition("## Beside")[0].splitlines():
        if found := re.match(r"\| `(.+?)` \| (\w+)\b.*? \| (\w+)\b.*? \|", line):
            cells[found[1], "fold"], cells[found[1], "wrap"] = found[2], found[3]
    return cells


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("row", ROWS)
def test_the_cell_is_as_documented(group: None, row: str, how: str) -> None:
    outcome = table()[row, how]
    assert outcome in ("yes", "refused")
    if outcome == "yes":
        ROWS[row](how)
    else:
        with pytest.raises(dm.DepthMuPError):
            ROWS[row](how)


def test_every_documented_row_is_tested() -> None:
    assert {row for row, _ in table()} == set(ROWS)
