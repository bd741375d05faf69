"""Image, sound and set models of torchvision, timm and transformers, tiny, with their branches as counted.

Sizes are numbers of layers, or of blocks per stage. Blocks of a residual stage that starts with a projection belong to
one stream with the stage before it; a stage that starts with a layer of its own begins a stream.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from entries import Entry, counted, features, from_timm, from_transformers, images, tokens
from torch import nn

Depths = tuple[int, ...]
torchvision, timm, transformers = (partial(counted, requires=name) for name in ("torchvision", "timm", "transformers"))

TWO = {3: 6, 1: 2}
TRANSFORMER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VIT = {"image_size": 16, "patch_size": 8, **TRANSFORMER}
FOUR_STAGES: dict[Any, Any] = {(2, 2, 2, 2): 8, (1, 1, 1, 1): 4}  # one stream, with projections between the stages
BY_STAGE: dict[Any, Any] = {(2, 2, 2, 2): (4, 4, 4, 4), (1, 1, 1, 1): (2, 2, 2, 2)}  # two additions a block
TWO_STAGES: dict[Any, Any] = {(2, 4): (4, 8), (1, 1): (2, 2)}


def _resnet(**options: Any) -> Callable[[Depths], nn.Module]:
    def make(layers: Depths) -> nn.Module:
        from torchvision.models import resnet

        return resnet.ResNet(resnet.Bottleneck, list(layers), num_classes=10, **options)

    return make


def _vit(layers: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, layers, 2, 16, 32, num_classes=10)


def _swin(version: int) -> Callable[[Depths], nn.Module]:
    def make(depths: Depths) -> nn.Module:
        from torchvision.models import swin_transformer as swin

        second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        return swin.SwinTransformer(
            [4, 4], 8, list(depths), [1, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=10,
            **(second if version == 2 else {}),
        )  # fmt: skip

    return make


def _regnet(squeeze: float | None) -> Callable[[int], nn.Module]:
    def make(depth: int) -> nn.Module:
        from torchvision.models.regnet import BlockParams, RegNet

        shape = BlockParams([depth, depth], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=squeeze)
        return RegNet(shape, num_classes=10)

    return make


def _convnext(depths: Depths) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, depths[0]), CNBlockConfig(16, None, depths[1])], num_classes=10)


def _efficientnet_v2(repeats: Depths) -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    stages = [FusedMBConvConfig(4, 3, 1, 8, 8, repeats[0]), MBConvConfig(4, 3, 2, 8, 16, repeats[1])]
    return EfficientNet(stages, dropout=0.0, num_classes=10, last_channel=32)


def _of_timm(module: str, name: str, key: str, **options: Any) -> Callable[[Any], nn.Module]:
    """A class of timm itself, where the registered names fix the sizes."""

    def make(size: Any) -> nn.Module:
        return getattr(importlib.import_module(f"timm.models.{module}"), name)(num_classes=10, **{key: size}, **options)

    return make


def _res2net(layers: Depths) -> nn.Module:
    import timm
    from timm.models.res2net import Bottle2neck

    return timm.models.ResNet(Bottle2neck, list(layers), num_classes=10, base_width=4, block_args={"scale": 4})


def _clip(layers: int) -> nn.Module:
    import transformers

    text = {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2, **TRANSFORMER}
    config = transformers.CLIPConfig(
        text_config={"num_hidden_layers": layers, **text},
        vision_config={"num_hidden_layers": layers, **VIT},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def _convnext_v2(depths: Depths) -> nn.Module:
    stages = {"depths": list(depths), "hidden_sizes": [8, 16], "num_stages": 2}
    return from_transformers("ConvNextV2", (), **stages)(depths)


def _segformer(depth: int) -> nn.Module:
    stages: dict[str, Any] = {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
    stages |= {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return from_transformers("Segformer", (), depths=[depth] * 2, num_encoder_blocks=2, **stages)(depth)


def _perceiver(layers: int) -> nn.Module:
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 1}
    shape = {"num_latents": 4, "d_latents": 16, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": layers}
    return from_transformers("Perceiver", (), **shape, **heads)(layers)


CONVOLUTIONAL: tuple[Entry, ...] = (
    torchvision(
        "resnext", _resnet(groups=4, width_per_group=4), images(32), FOUR_STAGES, {3}, "bn3", projections=4
    ),
    torchvision("wide-resnet", _resnet(width_per_group=16), images(32), FOUR_STAGES, {3}, "bn3", projections=4),
    torchvision("regnet-x", _regnet(None), images(32), {3: 6, 1: 2}, {3}, "f.c.1", projections=2),
    # a, b, two layers of the squeeze, c.
    torchvision("regnet-y", _regnet(0.25), images(32), {3: 6, 1: 2}, {5}, "f.c.1", projections=2),
    torchvision(
        "convnext-torchvision", _convnext, images(32), {(2, 4): (2, 4), (1, 1): (1, 1)}, {3}, "layer_scale"
    ),
    # Two classes of blocks; the first block of a stage of another width has no skip.
    torchvision(
        "efficientnet-v2", _efficientnet_v2, images(32), {(3, 4): (3, 3), (2, 2): (2, 1)}, {2, 5}, "block.1.1 block.3.1"
    ),
    # Every block but the first of a stage is a cascade of three convolutions between two: the base needs two blocks.
    timm(
        "res2net",
        _res2net,
        images(64),
        {(4, 4, 4, 4): 16, (2, 2, 2, 2): 8},
        {3, 5},
        "bn3",
        projections=4,
    ),
    # Weights are standardised: a gain of its own follows, which is not a parameter's first power to our eyes.
    timm(
        "nfnet", from_timm("nf_resnet50", "depths"), images(64), FOUR_STAGES, {3}, "",
        projections=4, linear=False, outputs="conv3",
    ),
    transformers(
        "convnext-v2", _convnext_v2, images(32), {(2, 4): (2, 4), (1, 1): (1, 1)}, {3}, "pwconv2"
    ),
)  # fmt: skip
"""Convolutional networks."""

MIXERS: tuple[Entry, ...] = (
    timm(
        "mixer",
        _of_timm("mlp_mixer", "MlpMixer", "num_blocks", img_size=32, patch_size=8, embed_dim=16),
        images(32),
        TWO,
        {2},
        "mlp_tokens.fc2 mlp_channels.fc2",
    ),
    # x + (pool(norm(x)) - norm(x)): the norm's gain is all that the branch has.
    timm("poolformer", _of_timm("metaformer", "MetaFormer", "depths", dims=(8, 16, 24, 32)), images(64), BY_STAGE,
         {0, 2}, "norm1 mlp.fc2"),
    timm(
        "focalnet", _of_timm("focalnet", "FocalNet", "depths", embed_dim=16), images(64), BY_STAGE, {2, 5},
        "modulation.proj mlp.fc2",
    ),
)  # fmt: skip
"""Networks that mix positions by other means than attention."""

TRANSFORMERS: tuple[Entry, ...] = (
    torchvision("vit-torchvision", _vit, images(32), TWO, {2}, "self_attention.out_proj mlp.3"),
    torchvision("swin-torchvision", _swin(1), images(32), TWO_STAGES, {2}, "attn.proj mlp.3"),
    # A norm with a gain comes last.
    torchvision("swin-v2", _swin(2), images(32), TWO_STAGES, {2}, "norm1 norm2"),
    # Two more layers, whose class token alone attends: two additions each. Attention heads are mixed before and after.
    timm(
        "cait",
        from_timm("cait_xxs24_224", "depth", img_size=64, embed_dim=16, num_heads=2, init_values=0.1),
        images(64),
        {3: (6, 4), 1: (2, 4)},
        {2, 4},
        "gamma_1 gamma_2",
    ),
    timm(
        "deit3",
        from_timm("deit3_small_patch16_224", "depth", img_size=32, embed_dim=16, num_heads=2),
        images(32),
        TWO,
        {2},
        "ls1.gamma ls2.gamma",
    ),
    timm(
        "eva02",
        from_timm("eva02_tiny_patch14_224", "depth", img_size=28, embed_dim=16, num_heads=2),
        images(28),
        TWO,
        {2},
        "attn.proj mlp.fc2",
    ),
    # Once a stage, after its first block, a depthwise convolution is added: the positions. Keys may be pooled by one.
    timm(
        "twins",
        from_timm("twins_pcpvt_small", "depths", img_size=64),
        images(64),
        {(2, 2, 2, 2): (5, 5, 5, 5), (1, 1, 1, 1): (3, 3, 3, 3)},
        {1, 2, 3},
        "attn.proj mlp.fc2 proj.0",
    ),
    # A block attends over space, then over channels; before each attention and each feed-forward layer a depthwise
    # convolution is added: eight additions.
    timm(
        "davit",
        from_timm("davit_tiny", "depths", embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)),
        images(64),
        {(2, 2, 2, 2): (16, 16, 16, 16), (1, 1, 1, 1): (8, 8, 8, 8)},
        {1, 2},
        "cpe1.proj cpe2.proj attn.proj mlp.fc2",
    ),
    transformers("deit", from_transformers("DeiT", **VIT), images(16), TWO, {2}, "attention.o_proj mlp.fc2"),
    transformers("beit", from_transformers("Beit", **VIT), images(16), TWO, {2}, "lambda_1 lambda_2"),
    transformers(
        "dinov2",
        from_transformers("Dinov2", **{key: value for key, value in VIT.items() if key != "intermediate_size"}),
        images(16),
        TWO,
        {2},
        "layer_scale1.lambda1 layer_scale2.lambda1",
    ),
    transformers(
        "clip",
        _clip,
        lambda: {"input_ids": tokens(), "pixel_values": images(16)()},
        {3: (6, 6), 1: (2, 2)},
        {2},
        "out_proj fc2",
    ),
    # The pooling head ends in x + mlp(norm(x)), a stream of one.
    transformers(
        "siglip",
        from_transformers("SiglipVision", **VIT),
        images(16),
        {3: (6, 1), 1: (2, 1)},
        {2},
        "out_proj fc2",
    ),
    # Two stages; keys and values of the first are pooled by a convolution. The feed-forward layer holds another.
    transformers("segformer", _segformer, images(32), {3: (6, 6), 1: (2, 2)}, {2, 3}, "attention.o_proj mlp.fc2"),
    # Cross-attention to the inputs and its feed-forward layer, then the layers; all on the learned latents.
    transformers("perceiver", _perceiver, features(2, 6, 8), {3: 8, 1: 4}, {2}, "output.dense mlp.dense2"),
    # Positions are an activated convolution of the features, added once.
    transformers(
        "wav2vec2",
        from_transformers(
            "Wav2Vec2",
            conv_dim=(8, 8),
            conv_kernel=(3, 3),
            conv_stride=(2, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
            apply_spec_augment=False,
            **TRANSFORMER,
        ),
        features(2, 64),
        {3: 7, 1: 3},
        {1, 2},
        "out_proj output_dense",
        linear=False,
        outputs="pos_conv_embed",
    ),
)
"""Transformers of images, sound and sets."""

VISION = CONVOLUTIONAL + MIXERS + TRANSFORMERS
