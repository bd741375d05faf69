"""What is known of a network of the zoo, and how to build and feed one from a library's configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A network, and what is true of its residual branches.

    Args:
        name: unique in the zoo.
        make: builds the model from a size: layers, or layers per stage.
        inputs: example inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        size: the model's size.
        base: the size of a shallower model of the same family.
        depths: number of residual additions of each stream, in forward order, by size.
        levels: which numbers of weight levels occur.
        carriers: ends of the names of the carriers, without ``.weight`` and ``.bias``; empty where a branch has none.
        projections: how many of the skips are projections.
        requires: the package it comes from; ``None`` for torch itself.
        linear: whether every branch is linear in its carrier, so that a multiplier can be folded into it.
        wraps: whether every branch is what some module returns, so that a multiplier can be hung on it.
        dtype: the most exact dtype that the library's operations take.
        meta_dtype: the dtype that they take on ``meta``.
        outputs: ends of the names of the modules that return the branches without a carrier, in their order.
    """

    name: str
    make: Callable[[Any], nn.Module]
    inputs: Callable[[], Any]
    size: Any
    base: Any
    depths: dict[Any, tuple[int, ...]]
    levels: frozenset[int]
    carriers: frozenset[str]
    projections: int = 0
    requires: str | None = None
    linear: bool = True
    wraps: bool = True
    dtype: torch.dtype = torch.float64
    meta_dtype: torch.dtype = torch.float32
    outputs: str = ""

    @property
    def available(self) -> bool:
        """Whether the package it comes from is installed."""
        return self.requires is None or importlib.util.find_spec(self.requires) is not None

    def build(self, size: Any = None) -> nn.Module:
        """The model, or the one of another size."""
        return self.make(self.size if size is None else size)

    def build_on_meta(self) -> nn.Module:
        """The model without storage; moved there where the library cannot be built on ``meta``."""
        try:
            with torch.device("meta"):
                model = self.build()
        except (RuntimeError, NotImplementedError):
            model = self.build().to("meta")
        return model.to(self.meta_dtype)

    def meta_inputs(self) -> Any:
        """The example inputs without storage."""
        return _to_meta(self.inputs())


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    return tuple(map(_to_meta, value)) if isinstance(value, tuple) else value


def images(size: int, batch: int = 2) -> Callable[[], Tensor]:
    """Example inputs: images of that size."""
    return lambda: torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def features(*shape: int) -> Callable[[], Tensor]:
    """Example inputs: one tensor of that shape."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(length: int = 7, vocabulary: int = 50) -> Tensor:
    """Token numbers, of shape [2, length]."""
    return torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))


def counted(name: str, make: Any, inputs: Any, depths: dict[Any, Any], levels: set[int], carriers: str, **more: Any):
    """An entry of the zoo; the first size in ``depths`` is the model's, the second its base's."""
    sizes = list(depths)
    counts = {size: (depth,) if isinstance(depth, int) else depth for size, depth in depths.items()}
    ends = frozenset(carriers.split())
    return Entry(name, make, inputs, sizes[0], sizes[1], counts, frozenset(levels), ends, **more)


def from_timm(name: str, key: str | None = None, **options: Any) -> Callable[[Any], nn.Module]:
    """A timm model, whose option ``key`` takes the size."""

    def make(size: Any) -> nn.Module:
        import timm

        sized = {} if key is None else {key: size}
        return timm.create_model(name, pretrained=False, num_classes=10, **sized, **options)

    return make


def from_transformers(
    kind: str, layers: tuple[str, ...] = ("num_hidden_layers",), model: str = "", **options: Any
) -> Callable[[Any], nn.Module]:
    """A transformers model from its configuration, whose options ``layers`` take the size."""

    def make(size: int) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**dict.fromkeys(layers, size), **options)
        return getattr(transformers, model or f"{kind}Model")(config)

    return make


def ids() -> dict[str, Any]:
    return {"input_ids": tokens(), "use_cache": False}


def pairs_of_ids() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5), "use_cache": False}


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
GPT2 = {"n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
SEQ2SEQ = {"d_model": 16, "vocab_size": 50}
SEQ2SEQ |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
SEQ2SEQ |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
