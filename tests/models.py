"""The model zoo: networks with residual branches that were counted by hand, for every test that needs a real model.

An `Entry` says how to build a model and its shallower base, what to feed it, and what is true of its branches. The
networks of torchvision, timm and transformers are built from their configuration, without pretrained weights, on small
images and short sequences. Import this after `torchvision_shim` (the test set-up does).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from blocks import (
    BottleneckNet,
    Functional,
    Gated,
    LayerScale,
    LoRABlock,
    Parallel,
    PostNorm,
    PreNorm,
    ReZero,
    Stack,
    StochasticDepth,
)
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
        outputs: ends of the names of the modules that return a branch, where that is not the carrier's module.
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


# torch, torchvision, timm, transformers


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` between a stem and a head; in evaluation it would like to take its fused path."""

    def __init__(self, depth: int, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)))


def _torch_seq2seq(depth: int) -> nn.Module:
    return nn.Transformer(16, 2, depth, depth, 32, dropout=0.0, batch_first=True)


def _resnet(kind: str) -> Callable[[Any], nn.Module]:
    def make(layers: tuple[int, ...]) -> nn.Module:
        from torchvision.models import resnet

        return resnet.ResNet(getattr(resnet, kind), list(layers), num_classes=10)

    return make


def _mobilenet(repeats: tuple[int, ...]) -> nn.Module:
    from torchvision.models import MobileNetV2

    setting = [(t, c, n, s) for (t, c, s), n in zip([(1, 8, 1), (6, 16, 2), (6, 24, 2)], repeats, strict=True)]
    return MobileNetV2(num_classes=10, inverted_residual_setting=[list(row) for row in setting])


def _timm(name: str, key: str | None = None, **options: Any) -> Callable[[Any], nn.Module]:
    """A timm model, whose option ``key`` takes the size."""

    def make(size: Any) -> nn.Module:
        import timm

        sized = {} if key is None else {key: size}
        return timm.create_model(name, pretrained=False, num_classes=10, **sized, **options)

    return make


def _efficientnet(repeats: tuple[int, ...]) -> nn.Module:
    import timm
    from timm.models._efficientnet_builder import decode_arch_def

    stages = ["ds_r{}_k3_s1_e1_c16_se0.25", "ir_r{}_k3_s2_e6_c24_se0.25", "ir_r{}_k5_s2_e6_c40_se0.25"]
    stages += ["ir_r{}_k3_s2_e6_c80_se0.25", "ir_r{}_k5_s1_e6_c112_se0.25", "ir_r{}_k5_s2_e6_c192_se0.25"]
    stages += ["ir_r{}_k3_s1_e6_c320_se0.25"]
    b0 = timm.create_model("efficientnet_b0", pretrained=False, num_classes=10)
    if repeats == (1, 2, 2, 3, 3, 4, 1):
        return b0
    rows = [[stage.format(repeat)] for stage, repeat in zip(stages, repeats, strict=True)]
    return type(b0)(decode_arch_def(rows), num_classes=10, num_features=1280, stem_size=32, act_layer="swish")


def _transformers(kind: str, layers: tuple[str, ...], model: str = "", **options: Any) -> Callable[[Any], nn.Module]:
    """A transformers model from its configuration, whose options ``layers`` take the size."""

    def make(size: int) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**dict.fromkeys(layers, size), **options)
        return getattr(transformers, model or f"{kind}Model")(config)

    return make


def _ids() -> dict[str, Any]:
    return {"input_ids": tokens(), "use_cache": False}


def _pair_of_ids() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5), "use_cache": False}


def _whisper_inputs() -> dict[str, Any]:
    return {"input_features": features(2, 8, 32)(), "decoder_input_ids": tokens(5), "use_cache": False}


def _entry(name: str, make: Any, inputs: Any, depths: dict[Any, Any], levels: set[int], carriers: str, **more: Any):
    """An entry of the zoo; the first size in ``depths`` is the model's, the second its base's."""
    sizes = list(depths)
    counts = {size: (depth,) if isinstance(depth, int) else depth for size, depth in depths.items()}
    ends = frozenset(carriers.split())
    return Entry(name, make, inputs, sizes[0], sizes[1], counts, frozenset(levels), ends, **more)


def _stack(block: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda depth: Stack(depth, block)


_VECTORS, _SEQUENCE = features(4, 8), features(2, 5, 8)
_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
_GPT2 = {"n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
_SEQ2SEQ = {"d_model": 16, "vocab_size": 50}
_SEQ2SEQ |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
_SEQ2SEQ |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}

USER_MODELS: tuple[Entry, ...] = (
    _entry("one-layer", _stack(lambda n: PreNorm(n, 1)), _VECTORS, {6: 6, 2: 2}, {1}, "fc2"),
    _entry("pre-norm", _stack(PreNorm), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    _entry("no-norm", _stack(lambda n: PreNorm(n, 2, norm=False)), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    _entry("post-norm", _stack(PostNorm), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    _entry(
        "parallel-sum",
        _stack(lambda n: Parallel(n, False)),
        _SEQUENCE,
        {4: 4, 1: 1},
        {2},
        "attn.proj down",
    ),
    _entry("parallel-chain", _stack(lambda n: Parallel(n, True)), _SEQUENCE, {4: 8, 1: 2}, {2}, "attn.proj down"),
    _entry("layer-scale", _stack(LayerScale), _VECTORS, {6: 6, 2: 2}, {2}, "gamma"),
    _entry("stochastic-depth", _stack(StochasticDepth), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    _entry("bottleneck", BottleneckNet, images(8), {4: 8, 1: 2}, {3}, "bn3", projections=2),
    _entry("gated", _stack(Gated), _VECTORS, {6: 6, 2: 2}, {2}, "down"),
    _entry("functional", lambda depth: Functional(depth, 12), _VECTORS, {6: 6, 2: 2}, {2}, "outer", wraps=False),
    _entry("rezero", _stack(ReZero), _VECTORS, {6: 6, 2: 2}, {2}, "alpha"),
    _entry("lora", _stack(LoRABlock), _VECTORS, {6: 6, 2: 2}, {3}, "fc2"),
)
"""Blocks as people write them, without any library."""

TORCH_MODELS: tuple[Entry, ...] = (
    _entry(
        "encoder-pre-norm", lambda d: TorchEncoder(d, True), _SEQUENCE, {3: 6, 1: 2}, {2}, "self_attn.out_proj linear2"
    ),
    _entry(
        "encoder-post-norm",
        lambda d: TorchEncoder(d, False),
        _SEQUENCE,
        {3: 6, 1: 2},
        {2},
        "self_attn.out_proj linear2",
    ),
    _entry(
        "seq2seq",
        _torch_seq2seq,
        lambda: (features(2, 5, 16)(), features(2, 4, 16)()),
        {3: (6, 9), 1: (2, 3)},
        {2},
        "self_attn.out_proj multihead_attn.out_proj linear2",
    ),
)

TABLE: tuple[Entry, ...] = (
    _entry(
        "resnet18",
        _resnet("BasicBlock"),
        images(32),
        {(2, 2, 2, 2): 8, (1, 1, 1, 1): 4},
        {2},
        "bn2",
        projections=3,
        requires="torchvision",
    ),
    _entry(
        "resnet50",
        _resnet("Bottleneck"),
        images(32),
        {(3, 4, 6, 3): 16, (1, 1, 1, 1): 4},
        {3},
        "bn3",
        projections=4,
        requires="torchvision",
    ),
    _entry(
        "vit_tiny_patch16_224",
        _timm("vit_tiny_patch16_224", "depth", img_size=32),
        images(32),
        {12: 24, 3: 6},
        {2},
        "attn.proj mlp.fc2",
        requires="timm",
    ),
    _entry(
        "convnext_tiny",
        _timm("convnext_tiny", "depths"),
        images(64),
        {(3, 3, 9, 3): (3, 3, 9, 3), (1, 1, 3, 1): (1, 1, 3, 1)},
        {3},
        "gamma",
        requires="timm",
    ),
    _entry(
        "resnetv2_50",
        _timm("resnetv2_50", "layers"),
        images(64),
        {(3, 4, 6, 3): 16, (1, 1, 1, 1): 4},
        {3},
        "conv3",
        projections=4,
        requires="timm",
    ),
    _entry(
        "efficientnet_b0",
        _efficientnet,
        images(64),
        {(1, 2, 2, 3, 3, 4, 1): (1, 1, 2, 2, 3), (1, 2, 2, 2, 2, 2, 1): (1, 1, 1, 1, 1)},
        {5},
        "bn3",
        requires="timm",
    ),
    _entry(
        "gpt2",
        _transformers("GPT2", ("n_layer",), **_GPT2),
        _ids,
        {3: 6, 1: 2},
        {2},
        "c_proj",
        requires="transformers",
    ),
    _entry(
        "llama",
        _transformers("Llama", ("num_hidden_layers",), num_key_value_heads=1, **_SMALL),
        _ids,
        {3: 6, 1: 2},
        {2},
        "o_proj down_proj",
        requires="transformers",
    ),
    _entry(
        "bert",
        _transformers("Bert", ("num_hidden_layers",), max_position_embeddings=16, **_SMALL),
        lambda: {"input_ids": tokens()},
        {3: 6, 1: 2},
        {2},
        "output.dense",
        requires="transformers",
    ),
)
"""The models whose counts were known before this project began."""

MORE: tuple[Entry, ...] = (
    _entry(
        "mobilenet_v2",
        _mobilenet,
        images(32),
        {(1, 3, 4): (2, 3), (1, 2, 2): (1, 1)},
        {3},
        "conv.3",
        requires="torchvision",
    ),
    _entry(
        "swin",
        _timm("swin_tiny_patch4_window7_224", "depths", img_size=32, window_size=4, embed_dim=8, num_heads=(1, 2)),
        images(32),
        {(2, 4): (4, 8), (1, 1): (2, 2)},
        {2},
        "attn.proj mlp.fc2",
        requires="timm",
    ),
    _entry(
        "seresnet18",
        _timm("seresnet18", "layers"),
        images(32),
        {(2, 2, 2, 2): 8, (1, 1, 1, 1): 4},
        {4},
        "",
        projections=3,
        requires="timm",
        linear=False,  # the gate sees what it multiplies
        outputs="se",
    ),
    _entry(
        "t5",
        _transformers("T5", ("num_layers",), d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=50, dropout_rate=0.0),
        _pair_of_ids,
        {3: (6, 9), 1: (2, 3)},
        {2},
        "SelfAttention.o EncDecAttention.o DenseReluDense.wo",
        requires="transformers",
    ),
    _entry(
        "bart",
        _transformers("Bart", ("encoder_layers", "decoder_layers"), max_position_embeddings=16, **_SEQ2SEQ),
        _pair_of_ids,
        {2: (4, 6), 1: (2, 3)},
        {2},
        "self_attn.out_proj encoder_attn.out_proj fc2",
        requires="transformers",
    ),
    _entry(
        "whisper",
        _transformers(
            "Whisper",
            ("encoder_layers", "decoder_layers"),
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            **_SEQ2SEQ,
        ),
        _whisper_inputs,
        {2: (4, 6), 1: (2, 3)},
        {2},
        "self_attn.out_proj encoder_attn.out_proj fc2",
        requires="transformers",
    ),
    _entry(
        "vit",
        _transformers(
            "ViT",
            ("num_hidden_layers",),
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        images(16),
        {3: 6, 1: 2},
        {2},
        "attention.o_proj mlp.fc2",
        requires="transformers",
    ),
    _entry(
        "gpt2-lm",
        _transformers("GPT2", ("n_layer",), "GPT2LMHeadModel", **_GPT2),
        _ids,
        {3: 6, 1: 2},
        {2},
        "c_proj",
        requires="transformers",
    ),
    _entry(
        "gptj",
        _transformers("GPTJ", ("n_layer",), rotary_dim=4, **_GPT2),
        _ids,
        {3: 3, 1: 1},
        {2},
        "attn.out_proj mlp.fc_out",
        requires="transformers",
    ),
    _entry(
        "neox",
        _transformers("GPTNeoX", ("num_hidden_layers",), max_position_embeddings=16, **_SMALL),
        _ids,
        {3: 3, 1: 1},
        {2},
        "attention.dense mlp.dense_4h_to_h",
        requires="transformers",
    ),
    _entry(
        "mixtral",
        _transformers(
            "Mixtral",
            ("num_hidden_layers",),
            num_key_value_heads=1,
            num_local_experts=2,
            num_experts_per_tok=2,
            **_SMALL,
        ),
        _ids,
        {3: 6, 1: 2},
        {2},
        "o_proj down_proj",
        requires="transformers",
        dtype=torch.float32,
        meta_dtype=torch.bfloat16,
    ),
)

ZOO: tuple[Entry, ...] = USER_MODELS + TORCH_MODELS + TABLE + MORE


def entry(name: str) -> Entry:
    """The entry of that name."""
    return next(candidate for candidate in ZOO if candidate.name == name)
