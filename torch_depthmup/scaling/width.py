"""Which dimensions of a parameter are widths, and what its operation does with them; the bridge to ``mup``.

A model with base shapes (``mup.set_base_shapes``) keeps them. Otherwise a narrower base model gives them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import mup
from mup.infshape import InfDim, InfShape
from torch import nn

from torch_depthmup.errors import PlanError
from torch_depthmup.rules import Width
from torch_depthmup.running import normalise_name
from torch_depthmup.scaling.matching import Counterpart, are_as_wide, counterparts
from torch_depthmup.tracing.branches import Trace
from torch_depthmup.tracing.operations import Kind
from torch_depthmup.tracing.parts import Ranges, ranges_of
from torch_depthmup.tracing.uses import Use

__all__ = ["clear_shapes", "from_base_shapes", "match", "mup_readouts", "set_shapes", "shaped"]

Shape = tuple[int, ...]


def from_base_shapes(model: nn.Module) -> dict[str, Width] | None:
    """The widths that ``mup.set_base_shapes`` left on a model's parameters; ``None`` where it was never called.

    Raises:
        PlanError: some parameters carry base shapes and others do not.
    """
    found, missing = {}, []
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "infshape", None)
        if shape is None:
            missing.append(name)
        else:
            # mup divides by the last width of a hidden weight, and tells readouts by their module.
            summed = shape.main_idx if shape.ninf() > 1 else None
            found[name] = Width(tuple(parameter.shape), tuple(dim.base_dim for dim in shape), summed)
    if found and missing:
        raise PlanError(
            f"{missing[0]} (and {len(missing) - 1} more) has no mup base shape, {next(iter(found))} has one. mup's "
            "infshape attributes are lost on deepcopy, to_empty and load_state_dict(assign=True): call "
            "mup.set_base_shapes(model, base, rescale_params=False) again before dm.parametrize"
        )
    return found or None


def match(model: nn.Module, base: nn.Module, found: Trace, base_found: Trace) -> dict[str, Width] | None:
    """Widths from a base model of the same family, of any depth; ``None`` where no dimension differs.

    Args:
        model: the model.
        base: the base.
        found: one forward pass of the model, which shows what its operations do with the widths.
        base_found: one forward pass of the base.

    Raises:
        PlanError: a parameter has no counterpart, or one that is wider, or one of a ratio that occurs nowhere else; a
            parameter with a width is used by an operation that is not known.
    """
    shapes = {normalise_name(name): tuple(p.shape) for name, p in base.named_parameters()}
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if are_as_wide(ours, shapes):
        return None
    others = counterparts(ours, shapes)
    same = [(name, o) for name, o in others.items() if o and o.is_exact and o.name == normalise_name(name)]
    ratios = {dim / b for name, o in same for dim, b in zip(ours[name], shapes[o.name], strict=False)}
    base_uses = {normalise_name(name): uses for name, uses in base_found.uses.items()}
    widths = {}
    for name, dims in ours.items():
        base_dims = _base_dims(name, dims, others[name], shapes)
        other = others[name]
        assert other is not None
        uses = found.uses.get(name, ()), base_uses.get(other.name, ())
        wide = [
            i
            for i, (dim, base_dim) in enumerate(zip(dims, base_dims, strict=True))
            if dim != base_dim and not _counts_blocks(dim, base_dim, len(uses[0]), len(uses[1]))
        ]
        if any(dims[i] / base_dims[i] not in ratios for i in wide):
            raise PlanError(
                f"{name} {dims} would be measured against {other.name} {base_dims} of the base, a block of "
                "another shape. Give the base at least one more block in this stage"
            )
        summed = _summed(name, (dims, base_dims), wide, uses) if wide else None
        bases = tuple(b if i in wide else None for i, b in enumerate(base_dims))
        plain = None if summed is None or len(wide) > 1 else _unnormalised(dims, summed, uses[0])
        widths[name] = Width(dims, bases, summed, plain is not None, plain or ())
    return widths


def _unnormalised(dims: Shape, summed: int, uses: Sequence[Use]) -> Ranges | None:
    """The rows of a weight whose values no norm follows; ``None`` where it follows no row, or that cannot be told."""
    operations = [use for use in uses if use.is_weight_operation]
    known = [use.unnormalised.rows for use in operations if use.unnormalised.rows is not None]
    if not any(known) and len(known) == len(operations):
        return ()
    if len(known) < len(operations) or len(dims) != 2 and operations[0].kind is not Kind.CONVOLUTION:
        return None
    found = ranges_of(row for ranges in known for start, end in ranges for row in range(start, end))
    return found if sum(end - start for start, end in found) < dims[1 - summed] else None


def _counts_blocks(dim: int, base_dim: int, uses: int, base_uses: int) -> bool:
    """Whether a dimension is as long as the network is deep: each of its entries is used as often as in the base."""
    return uses != base_uses and uses % dim == base_uses % base_dim == 0 and uses * base_dim == base_uses * dim


def _base_dims(name: str, dims: Shape, other: Counterpart | None, shapes: Mapping[str, Shape]) -> Shape:
    found = shapes.get(other.name) if other else None
    if found is None or len(found) != len(dims) or any(d < b for d, b in zip(dims, found, strict=True)):
        raise PlanError(
            f"{name} {dims} has no counterpart in the base"
            + (f" ({other.name} is {found})" if other and found is not None else "")
            + ". The base must be of the same family, and not wider: build both with the same code"
        )
    return found


def _summed(
    name: str, dims: tuple[Shape, Shape], wide: Sequence[int], uses: tuple[Sequence[Use], Sequence[Use]]
) -> int | None:
    """The width that the parameter's weight operations sum over: the data has it, and their value does not.

    Where the sizes do not tell, as in a square weight, it is torch's own order: (outputs, inputs, ...).
    """
    score = dict.fromkeys(wide, 0)
    operations = [(sizes, use) for sizes, group in zip(dims, uses, strict=True) for use in group]
    known = [(sizes, use) for sizes, use in operations if use.is_weight_operation]
    if not known:
        if len(wide) > 1 and any(use.kind is Kind.OTHER for _, use in operations):
            raise PlanError(
                f"{name} {dims[0]} has {len(wide)} widths, and it cannot be seen over which of them its operation sums "
                "(nn.Bilinear?). Write the operation as a matrix product, or keep the base as wide as the model here"
            )
        return 1 if len(wide) > 1 and not operations else None  # not reached: torch's own order
    for sizes, use in known:
        taken, given = _channels(use, len(sizes)), _channels(use, len(sizes), given=True)
        for index in wide:
            score[index] += taken.count(sizes[index]) - given.count(sizes[index])
    if sum(size > 0 for size in score.values()) > 1 and all(use.operands > 1 for _, use in known):
        raise PlanError(
            f"{name} {dims[0]} sums over two widths at once (nn.Bilinear of two wide inputs), for which mup has no "
            "rule. Project one of the two to a fixed size first, or keep the base as wide as the model here"
        )
    best = max(wide, key=lambda index: score[index])
    if score[best] > 0:
        return best
    # Where only what is computed from it is used, without its width, it is what others multiply: a learned query.
    is_weight = any(use.is_direct for _, use in known)
    return 1 if 1 in wide and (len(wide) > 1 or score[1] == 0 and is_weight) else None


def _channels(use: Use, ndim: int, *, given: bool = False) -> Shape:
    """The sizes that tell widths from others: of a convolution, whose stride changes pictures, the channels only."""
    shape = use.given if given else use.taken
    return shape[1 - ndim : 2 - ndim or None] if use.kind is Kind.CONVOLUTION and len(shape) >= ndim - 1 else shape


def mup_readouts(model: nn.Module) -> set[str]:
    """The weights of ``mup.MuReadout`` and ``mup.MuSharedReadout``, which divide by the width in their forward pass."""
    # By identity: a shared one's first name is that of the embedding.
    own = {id(module._parameters.get("weight")) for module in model.modules() if isinstance(module, mup.MuReadout)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def set_shapes(model: nn.Module, widths: Mapping[str, Width]) -> None:
    """Leaves the widths on the parameters in ``mup``'s vocabulary, as ``parameter.infshape``."""
    for name, parameter in model.named_parameters():
        width = widths[normalise_name(name)]
        dims = zip(width.base, width.dims, strict=True)
        setattr(parameter, "infshape", InfShape(InfDim(base, dim) for base, dim in dims))  # noqa: B010


@contextlib.contextmanager
def shaped(model: nn.Module) -> Iterator[None]:
    """A model as its own base for as long as it is run: ``mup.MuReadout`` asks for base shapes. Present ones stay."""
    if from_base_shapes(model) is not None:
        yield
        return
    own = {normalise_name(name): Width(tuple(p.shape), (None,) * p.ndim) for name, p in model.named_parameters()}
    set_shapes(model, own)
    try:
        yield
    finally:
        clear_shapes(model)


def clear_shapes(model: nn.Module) -> None:
    """Takes ``infshape`` off every parameter."""
    for parameter in model.parameters():
        if hasattr(parameter, "infshape"):
            delattr(parameter, "infshape")
