"""Muon and Adam in one optimizer: each group is scaled by its own family, however the class tells them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import PreNorm, Stack
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.errors import OptimizerError
from torch_depthmup.rules import MUON_SHAPES

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(how: str = "fold", rule: str = "depth-mup-corrected") -> Stack:
    """4 times the depth and 3 times the width of its base."""
    torch.manual_seed(0)
    net = Stack(8, PreNorm, width=36).double()
    dm.parametrize(net, base=Stack(2, PreNorm, width=12).double(), example_inputs=X, how=how, rule=rule)
    return net


def parts(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The hidden matrices and the rest."""
    matrices = [p for name, p in net.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    return matrices, [p for p in net.parameters() if all(p is not q for q in matrices)]


def orthogonal(gradient: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    return u @ v * max(1, len(gradient) / len(gradient.T)) ** 0.5


class Mixed(torch.optim.Optimizer):
    """Adam without momentum, and Muon without, by a flag that every group must have."""

    def __init__(self, groups: list[dict[str, Any]]):
        assert all("use_muon" in group for group in groups)
        groups = [{"lr": 0.02 if g["use_muon"] else 0.001, "weight_decay": 0.0, **g} for g in groups]
        super().__init__([g if g["use_muon"] else {"eps": 1e-3, **g} for g in groups], {})

    def is_muon(self, group: dict[str, Any], parameter: Tensor) -> bool:
        return group["use_muon"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = orthogonal(p.grad) if self.is_muon(group, p) else p.grad / (p.grad.abs() + group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


class ByMethod(Mixed):
    """The group says what trains it, by a word, and the class has a learning rate for each."""

    def __init__(self, params: Any, lr: float = 0.02, adam_lr: float = 0.001, weight_decay: float = 0.0):
        groups = list(params)
        for group in groups:
            group.setdefault("lr", adam_lr if group.get("method") == "adam" else lr)
        torch.optim.Optimizer.__init__(
            self, groups, {"weight_decay": weight_decay, "eps": 1e-3, "method": "orthogonal"}
        )

    def is_muon(self, group: dict[str, Any], parameter: Tensor) -> bool:
        return group["method"] == "orthogonal"


class ByShape(Mixed):
    """Matrices by Muon and vectors by Adam, unless the group wants Adam for all."""

    def __init__(self, params: Any, lr: float = 0.02, weight_decay: float = 0.0, fallback: bool = False):
        defaults = {"lr": lr, "weight_decay": weight_decay, "fallback": fallback, "eps": 1e-3}
        torch.optim.Optimizer.__init__(self, params, defaults)

    def is_muon(self, group: dict[str, Any], parameter: Tensor) -> bool:
        return parameter.ndim == 2 and not group["fallback"]


class ByKeyword(Mixed):
    """Two lists of parameters, and nothing of it in the groups."""

    def __init__(self, lr: float = 0.02, muon_params: Any = None, adamw_params: Any = None):
        self.matrices = {id(p) for p in muon_params}
        defaults = {"lr": lr, "weight_decay": 0.0, "eps": 1e-3}
        torch.optim.Optimizer.__init__(self, [*muon_params, *adamw_params], defaults)

    def is_muon(self, group: dict[str, Any], parameter: Tensor) -> bool:
        return id(parameter) in self.matrices


SPELLINGS = {
    "a flag": (Mixed, {"use_muon": True}, {"use_muon": False}),
    "a word": (ByMethod, {}, {"method": "adam"}),
    "a fallback": (ByShape, {}, {"fallback": True}),
    "said by the user too": (Mixed, {"use_muon": True, "family": "muon"}, {"use_muon": False, "family": "adamw"}),
}


def grouped(net: nn.Module, spelling: str) -> list[dict[str, Any]]:
    (matrices, rest), (_, muon, adam) = parts(net), SPELLINGS[spelling]
    return [{"params": rest, "weight_decay": 0.1, **adam}, {"params": matrices, "weight_decay": 0.1, **muon}]


def check_multipliers(optimizer: torch.optim.Optimizer, net: nn.Module, *, adjust_lr: str | None = None) -> None:
    plan, names = dm.plan_of(net), {id(p): name for name, p in net.named_parameters()}
    matrices = {id(p) for p in parts(net)[0]}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            family = "muon" if id(parameter) in matrices else "adamw"
            wanted = plan.multipliers(names[id(parameter)], family, adjust_lr=adjust_lr)
            assert group["lr_multiplier"] == pytest.approx(wanted.lr), names[id(parameter)]
            assert group["weight_decay_multiplier"] == pytest.approx(wanted.weight_decay)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_group_is_scaled_by_the_family_of_its_steps(spelling: str) -> None:
    net = network()
    check_multipliers(dm.optimizer(SPELLINGS[spelling][0])(grouped(net, spelling)), net)


@pytest.mark.parametrize("spelling", ["a flag", "a word", "a fallback"])
def test_so_is_an_optimizer_that_exists(spelling: str) -> None:
    net = network()
    check_multipliers(dm.rescale(SPELLINGS[spelling][0](grouped(net, spelling)), net), net)


@pytest.mark.parametrize("spelling", ["a flag", "a word", "a fallback"])
def test_fold_and_wrap_train_alike(spelling: str) -> None:
    trained = []
    for how in ("fold", "wrap"):
        net = network(how)
        optimizer = dm.optimizer(SPELLINGS[spelling][0])(grouped(net, spelling))
        for _ in range(5):
            net.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
        trained.append(net(X))
    torch.testing.assert_close(*trained, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("options", "adjust"), [({}, "original"), ({"use_adjusted_lr": True}, "match_rms_adamw")])
def test_a_librarys_muon_with_adam_groups(options: dict[str, Any], adjust: str) -> None:
    cls = pytest.importorskip("pytorch_optimizer").Muon
    net = network()
    check_multipliers(dm.optimizer(cls)(grouped(net, "a flag"), **options), net, adjust_lr=adjust)


REFUSED = [
    (lambda net: dm.optimizer(ByShape)(net), "Muon takes matrices.*Give Muon the hidden matrices, and the rest to"),
    (lambda net: dm.optimizer(Mixed)([{"params": list(net.parameters()), "use_muon": True}]), "Muon takes matrices"),
    (lambda net: dm.optimizer(Mixed, family="adamw")(grouped(net, "a flag")), "steps on matrices are orthogonal"),
    (lambda net: dm.optimizer(torch.optim.AdamW, family="muon")(parts(net)[0]), "steps on matrices are not orthogonal"),
    (
        lambda net: dm.optimizer(ByKeyword)(muon_params=parts(net)[0], adamw_params=parts(net)[1]),
        "come first.*make it without dm.optimizer, and dm.rescale",
    ),
    (
        lambda net: dm.rescale(ByKeyword(muon_params=parts(net)[0], adamw_params=parts(net)[1]), net),
        "does not run on a toy.*two rules in one group cannot be scaled: make two, dm.Muon and dm.AdamW",
    ),
    (
        lambda net: dm.rescale(ByKeyword(muon_params=parts(net)[0], adamw_params=[]), net, family="muon"),
        "muon has no width rule for steps that follow a matrix's shape in a way that is not known",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=lambda value: value[:24] if isinstance(value, str) else "")
def test_what_cannot_be_told_apart_is_refused(make, message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        make(network())


def test_two_optimizers_over_one_plan_are_what_refusals_advise() -> None:
    net = network()
    matrices, rest = parts(net)
    check_multipliers(dm.Muon(matrices), net)
    check_multipliers(dm.AdamW(rest), net)


class Lookup(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(width, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens))))


TOKENS = torch.arange(11)
CLASSES = torch.randint(7, (11,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["embed", "hidden", "head"])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_a_step_of_muon_moves_every_layer_alike_at_any_width(name: str, adjust: str) -> None:
    """Embeddings and readouts too, should they be given to it."""
    moved = []
    for width in (64, 512):
        torch.manual_seed(0)
        net = Lookup(width)
        dm.parametrize(net, base=Lookup(32), example_inputs=TOKENS, rule="mup")
        layer = net.get_submodule(name)
        values: list[Tensor] = []
        layer.register_forward_hook(lambda _, __, output, values=values: values.append(output.detach()))
        F.cross_entropy(net(TOKENS), CLASSES).backward()
        dm.Muon([layer.weight], lr=1e-3, adjust_lr_fn=adjust, weight_decay=0.0).step()
        net(TOKENS)
        moved.append((values[1] - values[0]).square().mean().sqrt())
    assert 0.75 < moved[1] / moved[0] < 1.33


@pytest.mark.parametrize("name", [*MUON_SHAPES, "columns"])
def test_how_steps_follow_a_matrixs_shape_is_measured(name: str) -> None:
    given = MUON_SHAPES.get(name, lambda rows, columns: columns)

    class Muon(Mixed):
        def __init__(self, params: Any, lr: float = 0.02, weight_decay: float = 0.0):
            torch.optim.Optimizer.__init__(self, params, {"lr": lr, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * given(*p.shape) * (u @ v))

    net = network()
    if name in MUON_SHAPES:
        check_multipliers(dm.optimizer(Muon)(parts(net)[0]), net, adjust_lr=name)
    else:
        with pytest.raises(OptimizerError, match="muon has no width rule"):
            dm.optimizer(Muon)(parts(net)[0])
