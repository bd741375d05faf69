"""Kinds of autograd nodes and of torch functions: which are linear, which are norms, which add."""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Kind", "addition_operands", "kind_of"]


class Kind(enum.Enum):
    """What an autograd node does, as far as the finder cares. Every node's name is classified once, by `kind_of`."""

    LEAF = "a parameter or an input"
    ADD = "adds"
    SUBTRACT = "subtracts"
    MULTIPLY = "multiplies"
    DIVIDE = "divides"
    MATRIX_PRODUCT = "a matrix product"
    CONVOLUTION = "a convolution"
    RECURRENT = "a fused recurrent layer"
    CUSTOM = "an autograd Function of the user's"
    NORM = "a fused normalisation layer, whose gain and bias enter linearly"
    VIEW = "rearranges or copies one tensor"
    LOOKUP = "picks entries of a tensor by number"
    LINEAR = "otherwise linear in its one operand"
    MAX_POOL = "takes largest values: not linear, but commutes with a positive factor, and no activation"
    HOMOGENEOUS = "not linear, but commutes with a positive factor: f(m x) = m f(x)"
    CHECKPOINT = "re-entrant gradient checkpointing, which hides what it runs"
    OTHER = "anything else, taken for nonlinear"

    @property
    def is_sum(self) -> bool:
        """Whether it adds or subtracts."""
        return self in (Kind.ADD, Kind.SUBTRACT)

    @property
    def is_product(self) -> bool:
        """Whether it multiplies or divides entry by entry: linear in one operand, nonlinear in two."""
        return self in (Kind.MULTIPLY, Kind.DIVIDE)

    @property
    def is_linear(self) -> bool:
        """Whether it is linear in its data operand, given that there is one (a product of two has two)."""
        return self.is_sum or self.is_product or self in (Kind.VIEW, Kind.LOOKUP, Kind.LINEAR)

    @property
    def keeps_positive_factors(self) -> bool:
        """Whether a positive multiple of the data operand gives the same multiple of the value."""
        return self.is_linear or self in (Kind.MAX_POOL, Kind.HOMOGENEOUS)

    @property
    def takes_one_factor_of_data(self) -> bool:
        """Whether it multiplies data with a weight in one fused operation that is linear in both."""
        return self in (Kind.MATRIX_PRODUCT, Kind.CONVOLUTION)

    @property
    def can_hold_weights(self) -> bool:
        """Whether it is a weight operation when a parameter of two or more dimensions is among its operands."""
        return self.takes_one_factor_of_data or self in (Kind.RECURRENT, Kind.CUSTOM)


_VIEWS = (
    "View|UnsafeView|ReshapeAlias|AsStrided|T|Transpose|Permute|Expand|Squeeze|Unsqueeze|Slice|Select|Split|UnsafeSplit|"
    "Unbind|Clone|ToCopy|Alias|Movedim|Narrow|Unflatten|Repeat|Chunk"
)
_LINEAR = (
    r"ViewAsReal|ViewAsComplex|SliceScatter|SelectScatter|IndexPut|IndexAdd|IndexCopy|Scatter|ScatterAdd|Cat|Stack|"
    r"Copy|Contiguous|ConstantPadNd|ReflectionPad\dD|ReplicationPad\dD|Roll|Flip|Tile|Unfold|Im2Col|Col2Im|PixelShuffle|"
    r"PixelUnshuffle|Avg_?Pool\dD|_?AdaptiveAvgPool\dD|Mean|Sum|Upsample\w*|NativeDropout|FusedDropout|Neg|MaskedFill|"
    r"MaskedScatter|Where|Tril|Triu|Real|Imag|RepeatInterleave|Diagonal|Cumsum|FftR2C|FftC2R|FftC2C"
)
_SUFFIX = r"(Dim|Int|WithSizes|\d)*Backward(Autograd\w*)?\d*"

_NAMES: tuple[tuple[Kind, str], ...] = (
    (Kind.LEAF, r"AccumulateGrad"),
    (Kind.CHECKPOINT, r"CheckpointFunctionBackward"),
    (Kind.ADD, rf"Add{_SUFFIX}"),
    (Kind.SUBTRACT, rf"R?[Ss]ub{_SUFFIX}"),
    (Kind.MULTIPLY, rf"Mul{_SUFFIX}"),
    (Kind.DIVIDE, rf"Div{_SUFFIX}"),
    (
        Kind.MATRIX_PRODUCT,
        r"_?(Mm|Addmm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Linear|Matmul|GroupedMm|ScaledMm|ScaledGroupedMm)Backward\d*",
    ),
    (Kind.CONVOLUTION, r"_?\w*Conv(olution)?\w*Backward\d*"),
    (Kind.RECURRENT, r"\w*(Rnn|Lstm|Gru)\w*Backward\d*"),
    (
        Kind.NORM,
        r"(Native|Cudnn|Miopen|Fused)?(BatchNorm|LayerNorm|GroupNorm|RmsNorm|InstanceNorm|RMSNorm)\w*Backward\d*",
    ),
    (Kind.LOOKUP, rf"(Embedding|EmbeddingBag|Index|IndexSelect|Gather){_SUFFIX}"),
    (Kind.VIEW, rf"({_VIEWS}){_SUFFIX}"),
    (Kind.LINEAR, rf"({_LINEAR}){_SUFFIX}|CopySlices"),
    (Kind.MAX_POOL, r"(MaxPool\w*|AdaptiveMaxPool\w*|Amax|Max)Backward\d*"),
    (Kind.HOMOGENEOUS, r"(Relu|LeakyRelu|Threshold|Abs)Backward\d*"),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _NAMES)


@functools.cache
def kind_of(name: str, custom: bool = False) -> Kind:
    """The kind of an autograd node.

    Args:
        name: the class name of the node, such as ``"AddmmBackward0"``.
        custom: whether the node belongs to a ``torch.autograd.Function`` written in Python.
    """
    found = next((kind for kind, pattern in _PATTERNS if pattern.fullmatch(name)), Kind.OTHER)
    return Kind.CUSTOM if custom and found is not Kind.CHECKPOINT else found


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
