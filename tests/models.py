"""The model zoo: networks with residual branches that were counted by hand, for every test that needs a real model.

An `Entry` says how to build a model and its shallower base, what to feed it, and what is true of its branches. The
networks of torchvision, timm and transformers are built from their configuration, without pretrained weights, on small
images and short sequences. Import this after `torchvision_shim` (the test set-up does).
"""

from __future__ import annotations

from collections.abc import Callable
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
from entries import (
    GPT2,
    SEQ2SEQ,
    SMALL,
    Entry,
    counted,
    features,
    from_timm,
    from_transformers,
    ids,
    images,
    pairs_of_ids,
    tokens,
)
from models_language import LANGUAGE
from models_vision import VISION
from torch import Tensor, nn

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


def _whisper_inputs() -> dict[str, Any]:
    return {"input_features": features(2, 8, 32)(), "decoder_input_ids": tokens(5), "use_cache": False}


def _stack(block: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda depth: Stack(depth, block)


_VECTORS, _SEQUENCE = features(4, 8), features(2, 5, 8)
USER_MODELS: tuple[Entry, ...] = (
    counted("one-layer", _stack(lambda n: PreNorm(n, 1)), _VECTORS, {6: 6, 2: 2}, {1}, "fc2"),
    counted("pre-norm", _stack(PreNorm), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    counted("no-norm", _stack(lambda n: PreNorm(n, 2, norm=False)), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    counted("post-norm", _stack(PostNorm), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    counted(
        "parallel-sum",
        _stack(lambda n: Parallel(n, False)),
        _SEQUENCE,
        {4: 4, 1: 1},
        {2},
        "attn.proj down",
    ),
    counted("parallel-chain", _stack(lambda n: Parallel(n, True)), _SEQUENCE, {4: 8, 1: 2}, {2}, "attn.proj down"),
    counted("layer-scale", _stack(LayerScale), _VECTORS, {6: 6, 2: 2}, {2}, "gamma"),
    counted("stochastic-depth", _stack(StochasticDepth), _VECTORS, {6: 6, 2: 2}, {2}, "fc2"),
    counted("bottleneck", BottleneckNet, images(8), {4: 8, 1: 2}, {3}, "bn3", projections=2),
    counted("gated", _stack(Gated), _VECTORS, {6: 6, 2: 2}, {2}, "down"),
    counted("functional", lambda depth: Functional(depth, 12), _VECTORS, {6: 6, 2: 2}, {2}, "outer", wraps=False),
    counted("rezero", _stack(ReZero), _VECTORS, {6: 6, 2: 2}, {2}, "alpha"),
    counted("lora", _stack(LoRABlock), _VECTORS, {6: 6, 2: 2}, {3}, "fc2"),
)
"""Blocks as people write them, without any library."""

TORCH_MODELS: tuple[Entry, ...] = (
    counted(
        "encoder-pre-norm", lambda d: TorchEncoder(d, True), _SEQUENCE, {3: 6, 1: 2}, {2}, "self_attn.out_proj linear2"
    ),
    counted(
        "encoder-post-norm",
        lambda d: TorchEncoder(d, False),
        _SEQUENCE,
        {3: 6, 1: 2},
        {2},
        "self_attn.out_proj linear2",
    ),
    counted(
        "seq2seq",
        _torch_seq2seq,
        lambda: (features(2, 5, 16)(), features(2, 4, 16)()),
        {3: (6, 9), 1: (2, 3)},
        {2},
        "self_attn.out_proj multihead_attn.out_proj linear2",
    ),
)

TABLE: tuple[Entry, ...] = (
    counted(
        "resnet18",
        _resnet("BasicBlock"),
        images(32),
        {(2, 2, 2, 2): 8, (1, 1, 1, 1): 4},
        {2},
        "bn2",
        projections=3,
        requires="torchvision",
    ),
    counted(
        "resnet50",
        _resnet("Bottleneck"),
        images(32),
        {(3, 4, 6, 3): 16, (1, 1, 1, 1): 4},
        {3},
        "bn3",
        projections=4,
        requires="torchvision",
    ),
    counted(
        "vit_tiny_patch16_224",
        from_timm("vit_tiny_patch16_224", "depth", img_size=32),
        images(32),
        {12: 24, 3: 6},
        {2},
        "attn.proj mlp.fc2",
        requires="timm",
    ),
    counted(
        "convnext_tiny",
        from_timm("convnext_tiny", "depths"),
        images(64),
        {(3, 3, 9, 3): (3, 3, 9, 3), (1, 1, 3, 1): (1, 1, 3, 1)},
        {3},
        "gamma",
        requires="timm",
    ),
    counted(
        "resnetv2_50",
        from_timm("resnetv2_50", "layers"),
        images(64),
        {(3, 4, 6, 3): 16, (1, 1, 1, 1): 4},
        {3},
        "conv3",
        projections=4,
        requires="timm",
    ),
    counted(
        "efficientnet_b0",
        _efficientnet,
        images(64),
        {(1, 2, 2, 3, 3, 4, 1): (1, 1, 2, 2, 3), (1, 2, 2, 2, 2, 2, 1): (1, 1, 1, 1, 1)},
        {5},
        "bn3",
        requires="timm",
    ),
    counted(
        "gpt2",
        from_transformers("GPT2", ("n_layer",), **GPT2),
        ids,
        {3: 6, 1: 2},
        {2},
        "c_proj",
        requires="transformers",
    ),
    counted(
        "llama",
        from_transformers("Llama", ("num_hidden_layers",), num_key_value_heads=1, **SMALL),
        ids,
        {3: 6, 1: 2},
        {2},
        "o_proj down_proj",
        requires="transformers",
    ),
    counted(
        "bert",
        from_transformers("Bert", ("num_hidden_layers",), max_position_embeddings=16, **SMALL),
        lambda: {"input_ids": tokens()},
        {3: 6, 1: 2},
        {2},
        "output.dense",
        requires="transformers",
    ),
)
"""The models whose counts were known before this project began."""

MORE: tuple[Entry, ...] = (
    counted(
        "mobilenet_v2",
        _mobilenet,
        images(32),
        {(1, 3, 4): (2, 3), (1, 2, 2): (1, 1)},
        {3},
        "conv.3",
        requires="torchvision",
    ),
    counted(
        "swin",
        from_timm("swin_tiny_patch4_window7_224", "depths", img_size=32, window_size=4, embed_dim=8, num_heads=(1, 2)),
        images(32),
        {(2, 4): (4, 8), (1, 1): (2, 2)},
        {2},
        "attn.proj mlp.fc2",
        requires="timm",
    ),
    counted(
        "seresnet18",
        from_timm("seresnet18", "layers"),
        images(32),
        {(2, 2, 2, 2): 8, (1, 1, 1, 1): 4},
        {4},
        "",
        projections=3,
        requires="timm",
        linear=False,  # the gate sees what it multiplies
        outputs="se",
    ),
    counted(
        "t5",
        from_transformers(
            "T5", ("num_layers",), d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=50, dropout_rate=0.0
        ),
        pairs_of_ids,
        {3: (6, 9), 1: (2, 3)},
        {2},
        "SelfAttention.o EncDecAttention.o DenseReluDense.wo",
        requires="transformers",
    ),
    counted(
        "bart",
        from_transformers("Bart", ("encoder_layers", "decoder_layers"), max_position_embeddings=16, **SEQ2SEQ),
        pairs_of_ids,
        {2: (4, 6), 1: (2, 3)},
        {2},
        "self_attn.out_proj encoder_attn.out_proj fc2",
        requires="transformers",
    ),
    counted(
        "whisper",
        from_transformers(
            "Whisper",
            ("encoder_layers", "decoder_layers"),
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            **SEQ2SEQ,
        ),
        _whisper_inputs,
        {2: (4, 6), 1: (2, 3)},
        {2},
        "self_attn.out_proj encoder_attn.out_proj fc2",
        requires="transformers",
    ),
    counted(
        "vit",
        from_transformers(
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
    counted(
        "gpt2-lm",
        from_transformers("GPT2", ("n_layer",), "GPT2LMHeadModel", **GPT2),
        ids,
        {3: 6, 1: 2},
        {2},
        "c_proj",
        requires="transformers",
    ),
    counted(
        "gptj",
        from_transformers("GPTJ", ("n_layer",), rotary_dim=4, **GPT2),
        ids,
        {3: 3, 1: 1},
        {2},
        "attn.out_proj mlp.fc_out",
        requires="transformers",
    ),
    counted(
        "neox",
        from_transformers("GPTNeoX", ("num_hidden_layers",), max_position_embeddings=16, **SMALL),
        ids,
        {3: 3, 1: 1},
        {2},
        "attention.dense mlp.dense_4h_to_h",
        requires="transformers",
    ),
    counted(
        "mixtral",
        from_transformers(
            "Mixtral",
            ("num_hidden_layers",),
            num_key_value_heads=1,
            num_local_experts=2,
            num_experts_per_tok=2,
            **SMALL,
        ),
        ids,
        {3: 6, 1: 2},
        {2},
        "o_proj down_proj",
        requires="transformers",
        dtype=torch.float32,
        meta_dtype=torch.bfloat16,
    ),
)

ZOO: tuple[Entry, ...] = USER_MODELS + TORCH_MODELS + TABLE + MORE
"""Those on which everything is tested."""

FIELD: tuple[Entry, ...] = LANGUAGE + VISION
"""Many more, on which finding and scaling are."""


def entry(name: str) -> Entry:
    """The entry of that name."""
    return next(candidate for candidate in ZOO + FIELD if candidate.name == name)
