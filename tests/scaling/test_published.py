"""``"complete-p"`` for AdamW beside a GPT that is written by hand, with the groups of arXiv 2505.01618, table 1, and
beside the paper's own code where there is a checkout of it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from oracles import completep_groups
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm

VOCABULARY, LENGTH, HEAD = 11, 6, 4
TOKENS = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6}


class Block(nn.Module):
    def __init__(self, width: int, residual: float):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (t.view(batch, length, -1, HEAD).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(*heads, is_causal=True, scale=1 / HEAD)
        x = x + self.residual * self.c_proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.residual * self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    """With multipliers in the forward pass, 1 each as users write it; embedding and readout are tied."""

    def __init__(self, layers: int, width: int, *, residual: float = 1.0, output: float = 1.0, std: float = 0.02):
        super().__init__()
        torch.manual_seed(layers)
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.h = nn.ModuleList(Block(width, residual) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        self.output = output
        for name, parameter in self.double().named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std if ".c_" in name or ".mlp_" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x)) * self.output


def trajectory(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, clip: float | None) -> list[float]:
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def pair(how: str) -> tuple[nn.Module, nn.Module, dm.Plan]:
    """A GPT of 4 times the depth and 3 times the width of its base: written by hand, and parametrized."""
    explicit = Gpt(8, 24, residual=1 / 4, output=1 / 3, std=0.02 * 3**-0.5)
    model = Gpt(8, 24)
    plan = dm.parametrize(model, base=Gpt(2, 8), example_inputs=TOKENS, rule="complete-p", how=how)
    return explicit, model, plan


@pytest.mark.parametrize("how", ["fold", "wrap"])
def test_every_group_is_as_published(how: str) -> None:
    explicit, model, plan = pair(how)
    carriers = {name for branch in plan.branches for name in branch.carrier} if how == "fold" else set()
    for name, (lr, weight_decay, eps) in completep_groups(explicit, width=3, depth=4).items():
        ours, m = plan.multipliers(name, "adamw"), 1 / 4 if name in carriers else 1.0
        assert (ours.lr, ours.weight_decay, ours.eps) == pytest.approx((lr * m, weight_decay / m, eps / m)), name


@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_as_published(clip: float | None) -> None:
    for how in ("fold", "wrap") if clip is None else ("wrap",):
        explicit, model, _ = pair(how)
        groups = [
            {"params": [dict(explicit.named_parameters())[name]], "lr": OPTIONS["lr"] * lr,
             "weight_decay": OPTIONS["weight_decay"] * decay, "eps": OPTIONS["eps"] * eps}
            for name, (lr, decay, eps) in completep_groups(explicit, width=3, depth=4).items()
        ]  # fmt: skip
        wanted = trajectory(explicit, torch.optim.AdamW(groups, betas=OPTIONS["betas"]), clip)
        found = trajectory(model, dm.AdamW(model.parameters(), **OPTIONS), clip)
        assert found == pytest.approx(wanted, rel=1e-9)
        assert wanted[-1] < 0.5 * wanted[0]


# The paper's own code

CODE = os.environ.get("NANOGPT_MUP", "")
GET = (
    "set NANOGPT_MUP to a checkout of the paper's code: "
    "git clone -b completep https://github.com/EleutherAI/nanoGPT-mup"
)
SHAPES = {"more heads": (6, 2), "larger heads": (2, 2)}  # of the wide network and of its base
OUTSIDE = ("transformer.wte.", "transformer.wpe.", "transformer.ln_f.")


@pytest.fixture(scope="module")
def code() -> ModuleType:
    if not CODE:
        pytest.skip(GET)
    spec = importlib.util.spec_from_file_location("nanogpt_mup_model", os.path.join(CODE, "model.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def published(code: ModuleType, layers: int, width: int, heads: int, **multipliers: Any) -> nn.Module:
    """Their GPT, 1/d attention included; without multipliers it is what a base is."""
    torch.manual_seed(0)
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "block_size": LENGTH, "vocab_size": VOCABULARY}
    return code.GPT(code.GPTConfig(**shape, mup_enabled=True, **multipliers))


def beside_theirs(code: ModuleType, shape: str, how: str, alpha: float = 1.0) -> tuple[nn.Module, nn.Module, set[str]]:
    """Their GPT with their multipliers, the same one parametrized, and what carries a folded multiplier."""
    heads, base_heads = SHAPES[shape]
    width = {"mup_width_multiplier": 3.0}
    theirs = published(
        code, 8, 24, heads, **width, depth_alpha_enabled=True, depth_multiplier=4.0, depth_alpha_exp=alpha
    )
    ours = published(code, 8, 24, heads)
    rule = dm.Rule("published", alpha=alpha, eps_width=-1.0)
    plan = dm.parametrize(
        ours, base=published(code, 2, 8, base_heads), example_inputs=TOKENS, how=how,
        rule="complete-p" if alpha == 1 else rule,
    )  # fmt: skip
    return theirs, ours, {name for b in plan.branches for name in b.carrier if how == "fold"}


def their_optimizer(model: Any) -> torch.optim.AdamW:
    optimizer = model.configure_optimizers(
        OPTIONS["weight_decay"], OPTIONS["lr"], OPTIONS["betas"], OPTIONS["eps"], "cpu"
    )
    for group in optimizer.param_groups:  # as their training loop does
        group["lr"] *= group["lr_scale"]
    return optimizer


def our_optimizer(model: nn.Module) -> torch.optim.AdamW:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    return dm.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **OPTIONS)


def written(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float, float]]:
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    return {n: tuple(group[id(p)][k] for k in ("lr", "weight_decay", "eps")) for n, p in model.named_parameters()}


@pytest.mark.evidence
@pytest.mark.parametrize("how", ["fold", "wrap"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_groups_initialization_and_forward_are_those_of_their_code(code, float64, shape: str, how: str, alpha) -> None:
    theirs, ours, carriers = beside_theirs(code, shape, how, alpha)
    m = 4.0**-alpha
    wanted, found = written(theirs, their_optimizer(theirs)), written(ours, our_optimizer(ours))
    for name, (lr, decay, eps) in wanted.items():
        outside = name.startswith(OUTSIDE)
        # Where their code is not the paper's table: one eps for all groups, that of the blocks. And at alpha = 1/2
        # their decay follows the width alone, ours keeps lr * decay in depth too.
        eps = eps / m if outside else eps
        decay = decay if outside else decay * 4 ** (1 - alpha)
        folded = m if name in carriers else 1.0
        assert found[name] == pytest.approx((lr * folded, decay / folded, eps / folded), rel=1e-12), name
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name) * (m if name in carriers else 1.0))
    torch.testing.assert_close(ours(TOKENS, TOKENS)[0], theirs(TOKENS, TOKENS)[0])
    torch.testing.assert_close(3 * ours(TOKENS)[0], theirs(TOKENS)[0])  # theirs lack 1 / width where nothing is trained


@pytest.mark.evidence
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_that_of_their_code(code, float64, shape: str, clip: float | None) -> None:
    for how in ("fold", "wrap") if clip is None else ("wrap",):
        theirs, ours, _ = beside_theirs(code, shape, how)
        optimizer = their_optimizer(theirs)
        for name, group in (
            (n, g) for g in optimizer.param_groups for n, p in theirs.named_parameters() if p is g["params"][0]
        ):
            if name.startswith(OUTSIDE):
                group["eps"] *= 4.0  # the paper's
        wanted, found = (
            trajectory(lambda tokens, net=net: net(tokens, tokens)[0], own, clip)
            for net, own in ((theirs, optimizer), (ours, our_optimizer(ours)))
        )
        assert found == pytest.approx(wanted, rel=1e-9)
        assert wanted[-1] < 0.7 * wanted[0]
