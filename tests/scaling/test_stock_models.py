"""Stock models, wider and deeper than their base: what each kind of parameter does to the loss goes as the rule says.

The first-order fall of the loss, gradient times step, has no part that goes as 1 / sqrt(width), as the update of
the function on a batch has: a wrong multiplier is a slope of 1/2 or 1, and a right one is flat from width 32 on.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from blocks import Picture
from torch import Tensor, nn
from torch.nn import functional as F

import torch_depthmup as dm
from torch_depthmup.running import without_numbers

HEAD = 16
TOKENS = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(10, (32,), generator=torch.Generator().manual_seed(1))


def language_model(kind: str, depth: int, width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=64,
            n_positions=16,
            n_embd=width,
            n_layer=depth,
            n_head=width // HEAD,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    else:
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // HEAD,
            num_key_value_heads=width // HEAD // (2 if kind == "Qwen3" else 1),
            head_dim=HEAD,
            use_cache=False,
        )
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config)


def vit(depth: int, width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD,
        image_size=8,
        patch_size=2,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


class PostNormEncoder(nn.Module):
    def __init__(self, depth: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, width // HEAD, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


MODELS: dict[str, tuple[Callable[[int, int], nn.Module], Tensor]] = {
    "GPT-2": (lambda depth, width: language_model("GPT2", depth, width), TOKENS),
    "Llama": (lambda depth, width: language_model("Llama", depth, width), TOKENS),
    "Qwen3": (lambda depth, width: language_model("Qwen3", depth, width), TOKENS),
    "ViT": (vit, IMAGES),
    "post-norm encoder": (PostNormEncoder, TOKENS),
    "ResNet with a conv head": (Picture, IMAGES),
}


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    logits = getattr(output, "logits", output)
    if inputs is TOKENS:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    return F.cross_entropy(logits, LABELS)


def falls(
    name: str, rule: str, depth: int, width: int, base: tuple[int, int], seed: int
) -> dict[tuple[str, ...], float]:
    """By how much the steps on each kind of parameter lower the loss, to first order, per unit of learning rate."""
    make, inputs = MODELS[name]
    torch.manual_seed(seed)
    model = make(depth, width).double()
    small = make(*base).double()
    examples = inputs.double() if inputs.is_floating_point() else inputs
    plan = dm.parametrize(model, base=small, example_inputs=examples[:4], rule=rule)
    optimizer = dm.AdamW(model.parameters(), lr=1e-6, eps=1e-20, weight_decay=0.0)
    found: dict[tuple[str, ...], float] = {}
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs if inputs is TOKENS else examples).backward()
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        optimizer.step()
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                fall = -float((parameter.grad * (parameter.detach() - before[key])).sum())
                entry = plan[key]
                group = entry.role, entry.width.kind if entry.width else "fixed", without_numbers(key)
                found[group] = found.get(group, 0.0) + 1e6 * fall
    return found


def slopes(name: str, rule: str, sizes: list[tuple[int, int]], seeds: int, by: slice) -> dict[tuple[str, ...], float]:
    """The slope in depth, or in width where that changes, of the mean over seeds, for groups of parameters."""
    axis = 1 if sizes[0][0] == sizes[-1][0] else 0
    at = torch.tensor([float(size[axis]) for size in sizes]).log()
    at = at - at.mean()
    measured = [[falls(name, rule, *size, sizes[0], seed) for seed in range(seeds)] for size in sizes]
    groups = {(group[0], group[2]): group for group in measured[-1][0]}  # at the base's width nothing has a width
    found = {}
    for group in {group[by] for group in groups.values()}:
        members = [key for key, whole in groups.items() if whole[by] == group]
        sums = [
            sum(fall for one in runs for key, fall in one.items() if (key[0], key[2]) in members) for runs in measured
        ]
        if max(sums) > 1e-9:  # a bias before a batch norm does nothing
            found[group] = float(at @ torch.tensor(sums).log() / (at @ at))
    return found


def is_flat(found: dict[tuple[str, ...], float]) -> bool:
    return all(abs(slope) <= 0.1 for slope in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_what_wider_parameters_do_to_the_loss_does_not_depend_on_width(name: str) -> None:
    found = slopes(name, "mup", [(2, 32), (2, 64), (2, 128)], 3, slice(2))
    assert is_flat({group: slope for group, slope in found.items() if group[1] != "fixed"}), found
    assert {("outside", "vector"), ("inner", "hidden"), ("outer", "hidden")} <= set(found)


@pytest.mark.parametrize("rule, inner", [("depth-mup-corrected", 0.5), ("complete-p", 0.0)])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "ResNet with a conv head"])
def test_what_deeper_parameters_do_to_the_loss_goes_as_the_rule_says(name: str, rule: str, inner: float) -> None:
    """Under the correction the inner sides of all branches add up to the root of depth: its price.

    The convolutional network is 0.1 off at these depths, and 0.07 up to depth 16: it is in the longer test below.
    """
    found = slopes(name, rule, [(2, 32), (4, 32), (8, 32)], 4, slice(1))
    assert found.pop(("inner",)) == pytest.approx(inner, abs=0.1)
    assert is_flat(found) and ("outer",) in found, found


SHARED_BY_HEADS = ("q_norm", "k_norm")
"""Gains that all heads share: at initialization what they do differs in sign from head to head and averages out."""


@pytest.mark.evidence
@pytest.mark.parametrize("rule", ["mup", "depth-mup-corrected", "complete-p"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_parameter_is_flat_in_width(name: str, rule: str) -> None:
    """``pytest -m evidence tests/scaling/test_stock_models.py``: four minutes on one core."""
    found = slopes(name, rule, [(2, 64), (2, 128), (2, 256)], 6, slice(3))
    assert is_flat({group: slope for group, slope in found.items() if not any(n in group[2] for n in SHARED_BY_HEADS)})


@pytest.mark.evidence
@pytest.mark.parametrize("rule, inner", [("depth-mup", 0.0), ("depth-mup-corrected", 0.5), ("complete-p", 0.0)])
@pytest.mark.parametrize("name", MODELS)
def test_every_rule_over_more_depths(name: str, rule: str, inner: float) -> None:
    found = slopes(name, rule, [(2, 32), (4, 32), (8, 32), (16, 32)], 8, slice(1))
    assert found.pop(("inner",)) == pytest.approx(inner, abs=0.1)
    assert is_flat(found), found
