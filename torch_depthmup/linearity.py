"""Which autograd nodes are linear in the data that passes through them."""

from __future__ import annotations

import re

__all__ = ["HOMOGENEOUS", "LINEAR", "NORM"]

LINEAR = re.compile(
    r"^(View|UnsafeView|ViewAsReal|ViewAsComplex|ReshapeAlias|AsStrided|T|Transpose|Permute|Movedim|Expand|Squeeze|"
    r"Unsqueeze|Slice|SliceScatter|Select|SelectScatter|Index|IndexSelect|IndexPut|IndexAdd|IndexCopy|Gather|Scatter|"
    r"ScatterAdd|Cat|Stack|Split|SplitWithSizes|UnsafeSplit|Chunk|Unbind|Clone|ToCopy|Alias|CopySlices|Copy|Contiguous|"
    r"ConstantPadNd|ReflectionPad\dD|ReplicationPad\dD|Roll|Flip|Repeat|Tile|Narrow|Unflatten|Unfold|Im2Col|Col2Im|"
    r"PixelShuffle|PixelUnshuffle|Avg_?Pool\dD|AdaptiveAvgPool\dD|_?AdaptiveAvgPool\dD|Mean|Sum|Upsample\w*|"
    r"NativeDropout|FusedDropout|Neg|Add|Sub|Rsub|Mul|Div|MaskedFill|MaskedScatter|Where|Tril|Triu|Real|Imag|"
    r"RepeatInterleave|Diagonal|Cumsum|FftR2C|FftC2R|FftC2C)(Dim|Int|WithSizes|\d)*Backward(Autograd\w*)?\d*$"
    r"|^CopySlices$"
)
"""Kinds that are linear in their data operand, given that there is one (a product of two has two)."""

HOMOGENEOUS = re.compile(r"^(Relu|LeakyRelu|Threshold|MaxPool\w*|AdaptiveMaxPool\w*|Abs|Amax|Max)Backward\d*$")
"""Kinds that are not linear but commute with a positive factor: f(m x) = m f(x)."""

NORM = re.compile(
    r"^(Native|Cudnn|Miopen|Fused)?(BatchNorm|LayerNorm|GroupNorm|RmsNorm|InstanceNorm|RMSNorm)\w*Backward\d*$"
)
"""Fused normalisation layers, whose gain and bias enter linearly."""
