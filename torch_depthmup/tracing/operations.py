"""Kinds of autograd nodes and of torch functions: which are linear, which are norms, which add."""

from __future__ import annotations

import enum
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Kind", "Number", "Operands", "Sums", "kind_of", "kind_of_write"]


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
    FOURIER = "a Fourier transform: linear, and mixes positions without a weight"
    LINEAR = "otherwise linear in its one operand"
    HOMOGENEOUS = "not linear, but commutes with a positive factor: f(m x) = m f(x)"
    MAX_POOL = "takes largest values: not linear, but commutes with a positive factor, and no activation"
    SOFTMAX = "a softmax, which makes weights of attention scores"
    ATTENTION = "fused attention: queries, keys and values in one operation"
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
        return self.is_sum or self.is_product or self in (Kind.VIEW, Kind.LOOKUP, Kind.FOURIER, Kind.LINEAR)

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
    r"MaskedScatter|Where|Tril|Triu|Real|Imag|RepeatInterleave|Diagonal|Cumsum"
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
        r"_?(Mm|Addmm|SparseAddmm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Linear|Matmul|Trilinear|GroupedMm|ScaledMm|ScaledGroupedMm)Backward\d*",
    ),
    (Kind.CONVOLUTION, r"_?\w*Conv(olution)?\w*Backward\d*"),
    (Kind.RECURRENT, r"\w*(Rnn|Lstm|Gru)\w*Backward\d*"),
    (
        Kind.NORM,
        r"(Native|Cudnn|Miopen|Fused)?(BatchNorm|LayerNorm|GroupNorm|RmsNorm|InstanceNorm|RMSNorm)\w*Backward\d*",
    ),
    (Kind.LOOKUP, rf"(Embedding|EmbeddingBag|Index|IndexSelect|Gather){_SUFFIX}"),
    (Kind.VIEW, rf"({_VIEWS}){_SUFFIX}"),
    (Kind.FOURIER, r"Fft(R2C|C2R|C2C)Backward\d*"),
    (Kind.LINEAR, rf"({_LINEAR}){_SUFFIX}|CopySlices"),
    (Kind.HOMOGENEOUS, r"(Relu|LeakyRelu|Threshold|Abs)Backward\d*"),
    (Kind.SOFTMAX, r"_?(Safe)?Softmax(Data)?Backward\d*"),
    (Kind.ATTENTION, r"_?ScaledDotProduct\w+Backward\d*"),
    (Kind.MAX_POOL, r"(MaxPool\w*|AdaptiveMaxPool\w*|Amax|Max)Backward\d*"),
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


Operands = tuple[Tensor, Tensor]


def addition_operands(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Operands | None:
    """The two tensors that a call adds; ``None`` where it adds a number (a counter's ``n.add_(1)``) or does else."""
    if getattr(func, "__name__", "") not in ADDITIONS:
        return None
    operands = [*args[:2], *(kwargs[key] for key in ("input", "other") if key in kwargs)]
    if len(operands) < 2 or not all(isinstance(operand, Tensor) for operand in operands[:2]):
        return None
    return operands[0], operands[1]


def _matrix_sum(product: Callable) -> Callable[..., Operands]:
    def operands(input: Tensor, one: Tensor, two: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Operands:
        return beta * input, alpha * product(one, two)

    return operands


FUSED: Mapping[str, Callable[..., Operands]] = {
    "addcmul": lambda input, tensor1, tensor2, *, value=1: (input, value * tensor1 * tensor2),
    "addcdiv": lambda input, tensor1, tensor2, *, value=1: (input, value * tensor1 / tensor2),
    "addmm": _matrix_sum(torch.mm),
    "addmv": _matrix_sum(torch.mv),
    "baddbmm": _matrix_sum(torch.bmm),
    "_sparse_addmm": _matrix_sum(torch.sparse.mm),
    "lerp": lambda input, end, weight: (input, weight * (end - input)),
    "index_add": lambda input, dim, index, source, *, alpha=1: (
        input,
        torch.zeros_like(input).index_add(dim, index, source, alpha=alpha),
    ),
    "scatter_add": lambda input, dim, index, src: (input, torch.zeros_like(input).scatter_add(dim, index, src)),
}
"""Functions that add a tensor and something that they compute, by name: their two summands from their arguments."""


Number = tuple[str, int]
"""How an addition is told from all others of a forward pass: its spelling, and which of this spelling it is.

Spellings are counted apart: a router may call more or fewer of its experts, whose outputs ``index_add`` collects.
"""


class Sums:
    """Tells the calls that add two tensors, in whatever spelling, from all others, in the order of a forward pass."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.stacked: Any = (
            WeakIdKeyDictionary()
        )  # what torch.stack returned: its two tensors and where it stacked them

    def operands(self, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Callable[[], Operands] | None:
        """What computes the two summands of a call; ``None`` where it is no sum of two tensors."""
        plain = addition_operands(func, args, kwargs)
        if plain is not None:
            return lambda: plain
        name = getattr(func, "__name__", "").removesuffix("_")
        if name in FUSED:
            return lambda: FUSED[name](*args, **kwargs)
        if name in ("sum", "mean") and args and isinstance(args[0], Tensor) and args[0] in self.stacked:
            (first, second), dim = self.stacked[args[0]]
            over = kwargs.get("dim", args[1] if len(args) > 1 else None)
            over = over[0] if isinstance(over, tuple | list) and len(over) == 1 else over
            if isinstance(over, int) and over % args[0].ndim == dim and not kwargs.get("keepdim"):
                part = 0.5 if name == "mean" else 1.0
                return lambda: (first * part, second * part)

        if name == "einsum" and len(args) == 2 and isinstance(args[1], Tensor) and args[1] in self.stacked:
            pair, dim = self.stacked[args[1]]
            before, _, after = str(args[0]).replace(" ", "").partition("->")
            if after == before[:dim] + before[dim + 1 :] and len(set(before)) == len(before) == args[1].ndim:
                return lambda: pair
        return None

    def number(self, func: Callable) -> Number:
        """The number of a call that adds. Every one counts, also without gradient: it is the same in a later pass."""
        name = getattr(func, "__name__", "").removesuffix("_")
        spelling = name if name in FUSED else "+"
        self.counts[spelling] += 1
        return spelling, self.counts[spelling] - 1

    def note(self, func: Callable, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        """Remembers what a call stacked, in case that it is summed next."""
        if getattr(func, "__name__", "") == "stack" and isinstance(result, Tensor):
            tensors = tuple(args[0] if args else kwargs["tensors"])
            if len(tensors) == 2:
                dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
                self.stacked[result] = tensors, dim % result.ndim


def kind_of_write(name: str) -> Kind:
    """The kind of the node that an in-place function leaves when it writes into a view, by the function's name."""
    name = name.strip("_").removeprefix("i")
    for kind, names in _WRITES.items():
        if name in names:
            return kind
    return Kind.OTHER


_WRITES = {
    Kind.ADD: ("add",),
    Kind.SUBTRACT: ("sub", "subtract"),
    Kind.MULTIPLY: ("mul", "multiply"),
    Kind.DIVIDE: ("div", "divide", "truediv"),
    Kind.HOMOGENEOUS: ("relu", "leaky_relu", "threshold"),
    # An empty name: a function that Python does not see, as those inside of torch's own ones are.
    Kind.LINEAR: ("", "copy", "setitem", "zero", "fill", "masked_fill", "dropout", "index_put", "index_copy", "neg"),
}
