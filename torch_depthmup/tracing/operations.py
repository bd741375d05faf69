"""Kinds of autograd nodes and of torch functions: which are linear, which are norms, which add."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["HOMOGENEOUS", "LINEAR", "NORM", "addition_operands"]

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


ADDITIONS = frozenset(
    f"{mark}{name}{mark}" if mark else name
    for mark, names in {
        "": ("add", "add_", "sub", "sub_", "subtract", "subtract_"),
        "__": ("add", "radd", "iadd", "sub", "rsub", "isub"),
    }.items()
    for name in names
)
"""Names of the torch functions and tensor methods that add two tensors."""


def addition_operands(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two tensors that a call adds; ``None`` where it adds a number (a counter's ``n.add_(1)``) or does else."""
    if getattr(func, "__name__", "") not in ADDITIONS:
        return None
    operands = [*args[:2], *(kwargs[key] for key in ("input", "other") if key in kwargs)]
    if len(operands) < 2 or not all(isinstance(operand, Tensor) for operand in operands[:2]):
        return None
    return operands[0], operands[1]
