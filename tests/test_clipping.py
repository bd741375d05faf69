"""Fold and wrap clip alike with dm's clipping; torch's own is noticed under fold."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from optimizers import backward, difference, parametrized
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

import torch_depthmup as dm

CLIPS = {
    "norm": (dm.clip_grad_norm_, nn.utils.clip_grad_norm_, (0.05,)),
    "norm of order inf": (dm.clip_grad_norm_, nn.utils.clip_grad_norm_, (0.02, float("inf"))),
    "norm of order 1": (dm.clip_grad_norm_, nn.utils.clip_grad_norm_, (0.3, 1.0)),
    "value": (dm.clip_grad_value_, nn.utils.clip_grad_value_, (0.01,)),
}


def trained(how: str, clip, arguments: tuple) -> nn.Module:
    net = parametrized(how, torch.float64)
    optimizer = dm.SGD(net, lr=0.5)
    for _ in range(6):
        backward(net)
        clip(net.parameters(), *arguments)
        optimizer.step()
    return net


@pytest.mark.filterwarnings("ignore:the gradients")
@pytest.mark.parametrize("name", sorted(CLIPS))
def test_fold_and_wrap_train_alike_with_our_clipping_and_not_with_torchs(name: str) -> None:
    ours, torchs, arguments = CLIPS[name]
    assert difference(trained("fold", ours, arguments), trained("wrap", torchs, arguments)) < 1e-10
    if name != "norm of order inf":  # where the largest gradient is not a folded weight's, there is no difference
        assert difference(trained("fold", torchs, arguments), trained("wrap", torchs, arguments)) > 1e-4


def test_without_a_plan_the_norm_and_the_gradients_are_torchs() -> None:
    torch.manual_seed(0)
    nets = [nn.Linear(8, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        backward(net)
    assert torch.equal(dm.clip_grad_norm_(nets[0], 0.1), nn.utils.clip_grad_norm_(nets[1].parameters(), 0.1))
    assert torch.equal(nets[0].weight.grad, nets[1].weight.grad)
    assert dm.clip_grad_norm_([], 1.0) == 0


def test_a_norm_that_is_not_finite_is_an_error_where_that_is_asked_for() -> None:
    net = parametrized()
    backward(net)
    net.stem.weight.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        dm.clip_grad_norm_(net, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("name", ["norm", "value"])
@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_clipping_without_the_multipliers_is_noticed_under_fold_only(name: str, how: str) -> None:
    ours, torchs, arguments = CLIPS[name]
    for clip, wanted in ((torchs, how == "fold"), (ours, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained(how, clip, arguments)
        assert [f"dm.clip_grad_{name}_" in str(w.message) for w in caught] == [True] * wanted


def test_gradients_that_do_not_change_are_not_taken_for_clipped_ones() -> None:
    net = parametrized()
    optimizer = dm.SGD(net, lr=1e-9)
    backward(net)
    for _ in range(5):
        optimizer.step()  # warnings are errors


@pytest.mark.parametrize(
    "sizes",
    [[1.0, 2.0, 3.0, math.inf], [1.0, 2.0, 3.0, 4e30], [math.inf, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, math.nan]],
    ids=["infinite", "overflowing", "infinite first", "not a number"],
)
def test_training_that_diverges_is_not_taken_for_clipping(sizes: list[float]) -> None:
    net = parametrized()
    optimizer = dm.SGD(net, lr=1e-9)
    for size in sizes:
        backward(net)
        for parameter in net.parameters():
            parameter.grad.fill_(size)
            parameter.grad.view(-1)[0] = 0.9 * size
        optimizer.step()  # warnings are errors


def _one_call(params, bound: float, step: int) -> None:
    nn.utils.clip_grad_norm_(params, bound)


def _by_hand(params, bound: float, step: int) -> None:
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    for p in params:
        p.grad.mul_(min(1.0, bound / float(norm)))


def _layer_by_layer(params, bound: float, step: int) -> None:
    for p in params:
        nn.utils.clip_grad_norm_(p, bound / 10)


def _entries(params, bound: float, step: int) -> None:
    for p in params:
        p.grad.clamp_(-bound / 100, bound / 100)


def _now_and_then(params, bound: float, step: int) -> None:
    for p in params:
        p.grad.mul_(10.0 if step % 3 == 0 else bound / 100)
    nn.utils.clip_grad_norm_(params, bound)


def _after_the_first_steps(params, bound: float, step: int) -> None:
    if step > 12:
        nn.utils.clip_grad_norm_(params, bound)


SPELLED = [_one_call, _by_hand, _layer_by_layer, _entries, _now_and_then, _after_the_first_steps]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("clip", SPELLED)
def test_clipping_is_noticed_however_it_is_written_and_over_several_optimizers(clip, split: bool) -> None:
    net = parametrized()
    parts = (net.blocks, nn.ModuleList([net.stem, net.head])) if split else (net,)
    optimizers = [dm.AdamW(part.parameters(), lr=1e-3) for part in parts]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            backward(net)
            clip(list(net.parameters()), 1e-3, step)
            for optimizer in optimizers:
                optimizer.step()
    assert caught and all("something clips them" in str(w.message) for w in caught)


def test_weights_that_are_all_folded_may_be_clipped_by_ours() -> None:
    net = parametrized()
    carriers = [parameter for block in net.blocks for parameter in block.fc2.parameters()]
    optimizer = dm.SGD(carriers, lr=1e-3)
    for _ in range(5):
        backward(net)
        dm.clip_grad_norm_(carriers, 1e-3)
        optimizer.step()  # warnings are errors


def norm_of_shards(rank: int, store: str, wanted: float, gradient: torch.Tensor) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = parametrized("fold", torch.float64)
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    backward(net)
    norm = dm.clip_grad_norm_(net.parameters(), 0.05)
    assert abs(float(norm) - wanted) < 1e-10 * wanted
    torch.testing.assert_close(net.blocks[0].fc2.weight.grad.full_tensor(), gradient)
    distributed.destroy_process_group()


def test_sharded_gradients_are_clipped_by_the_norm_over_all_processes(tmp_path: Path) -> None:
    net = parametrized("fold", torch.float64)
    backward(net)
    wanted = float(dm.clip_grad_norm_(net, 0.05))
    arguments = (str(tmp_path / "store"), wanted, net.blocks[0].fc2.weight.grad)
    multiprocessing.start_processes(norm_of_shards, arguments, nprocs=2, start_method="fork")


@pytest.mark.parametrize("lr", [1e3, 1e8, 1e30])
def test_a_network_that_diverges_is_told_of_neither_clipping_nor_writes(lr: float) -> None:
    net = parametrized("fold", torch.float32)
    optimizer = dm.SGD(net, lr=lr)
    for _ in range(12):
        backward(net)
        optimizer.step()
    assert not all(bool(p.isfinite().all()) for p in net.parameters())
