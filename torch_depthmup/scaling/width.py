"""The bridge to ``mup``: which dimensions are widths, and what width changes at initialization.

A model with base shapes (``mup.set_base_shapes``) keeps them. Otherwise a narrower base model gives them: its
parameters are matched by structure, so that the base may be shallower too.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping

import mup
from mup.infshape import InfDim, InfShape
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torch_depthmup.errors import PlanError
from torch_depthmup.rules import Width
from torch_depthmup.running import normalise_name, without_numbers

ENOUGH = 64  # entries, for a standard deviation that means something

__all__ = ["from_base_shapes", "initial_scales", "clear_shapes", "match", "readout_multipliers", "set_shapes", "shaped"]


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
            found[name] = Width(tuple(parameter.shape), tuple(dim.base_dim for dim in shape), shape.main_idx)
    if found and missing:
        raise PlanError(
            f"{missing[0]} (and {len(missing) - 1} more) has no mup base shape, {next(iter(found))} has one. mup's "
            "infshape attributes are lost on deepcopy, to_empty and load_state_dict(assign=True): call "
            "mup.set_base_shapes(model, base, rescale_params=False) again before dm.parametrize"
        )
    return found or None


def match(model: nn.Module, base: nn.Module) -> dict[str, Width] | None:
    """Widths from a base model of the same family, of any depth; ``None`` where no dimension differs.

    A parameter is matched with the base's parameter of the same name, or, in a block that the base does not have, with
    the last block of the same structure in its place.

    Raises:
        PlanError: a parameter has no counterpart, or one that is wider, or whose ratio occurs nowhere else; or hidden
            weights do not start smaller in the wider model.
    """
    shapes = {normalise_name(name): tuple(p.shape) for name, p in base.named_parameters()}
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if _as_wide(ours, shapes):
        return None
    structure = _Structure([normalise_name(name) for name in ours]), _Structure(list(shapes))
    found = {name: _counterpart(normalise_name(name), *structure) for name in ours}
    counterparts = {name: counterpart for name, (counterpart, _) in found.items()}
    same = [name for name, (counterpart, alike) in found.items() if alike and counterpart == normalise_name(name)]
    ratios = {dim / b for name in same for dim, b in zip(ours[name], shapes[counterparts[name] or ""], strict=False)}
    widths = {}
    for name, dims in ours.items():
        base_dims = shapes.get(counterparts[name] or "")
        if base_dims is None or len(base_dims) != len(dims) or any(d < b for d, b in zip(dims, base_dims, strict=True)):
            raise PlanError(
                f"{name} {dims} has no counterpart in the base"
                + (f" ({counterparts[name]} is {base_dims})" if base_dims is not None else "")
                + ". The base must be of the same family, and not wider: build both with the same code"
            )
        infinite = [i for i, (dim, base_dim) in enumerate(zip(dims, base_dims, strict=True)) if dim != base_dim]
        if any(dims[i] / base_dims[i] not in ratios for i in infinite):
            raise PlanError(
                f"{name} {dims} would be measured against {counterparts[name]} {base_dims} of the base, a block of "
                "another shape. Give the base at least one more block in this stage"
            )
        bases = tuple(b if i in infinite else None for i, b in enumerate(base_dims))
        widths[name] = Width(dims, bases, infinite[-1] if infinite else None)
    _refuse_fixed_initialization(model, base, widths, counterparts)
    return widths


def _refuse_fixed_initialization(
    model: nn.Module, base: nn.Module, widths: Mapping[str, Width], counterparts: Mapping[str, str | None]
) -> None:
    """Hidden matrices must start with entries of size 1/sqrt(width); some libraries start all of them at 0.02."""
    theirs = {normalise_name(name): p.detach() for name, p in base.named_parameters()}
    for name, parameter in model.named_parameters():
        width, other = widths[name], theirs[counterparts[name] or ""]
        if width.infinite != 2 or parameter.is_meta or other.is_meta or other.numel() < ENOUGH:
            continue
        ours, base_size = (float(tensor.detach().float().std()) for tensor in (parameter, other))
        wanted = width.multiplier**-0.5
        if ours > 0 and base_size > 0 and ours / base_size > math.sqrt(wanted):  # nearer to 1 than to what it should be
            raise PlanError(
                f"{name}: its initial standard deviation is {ours:.3g}, the base's is {base_size:.3g}, and at "
                f"{width.multiplier:g} times the width it should be {wanted:.3g} times as large. Initialise hidden "
                "weights by fan-in (PyTorch's default, or mup.init), or pass a base of the same width"
            )


def _as_wide(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every kind of parameter comes in some shape in both: blocks of one stage, beside those of another."""
    kinds: list[dict[str, set[tuple[int, ...]]]] = [{}, {}]
    for known, shapes in zip(kinds, (ours, theirs), strict=True):
        for name, shape in shapes.items():
            known.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", normalise_name(name)), set()).add(shape)
    return all(kinds[0][kind] & kinds[1][kind] for kind in kinds[0].keys() & kinds[1].keys())


class _Structure:
    """Parameter names by what stands before a number: which numbers there are, and what follows each of them."""

    def __init__(self, names: list[str]):
        self.after: dict[str, dict[int, set[str]]] = {}
        for name in names:
            for number in re.finditer(r"\d+", name):
                followers = self.after.setdefault(name[: number.start()], {})
                followers.setdefault(int(number.group()), set()).add(without_numbers(name[number.end() :]))


def _counterpart(name: str, ours: _Structure, theirs: _Structure) -> tuple[str | None, bool]:
    """The base's name for a parameter: number by number, by what follows it.

    Where as many numbers have the same structure behind them in both, they are matched in order (the layers around the
    blocks of a ``Sequential``, whose numbers the depth shifts); else it is the same number, or the last that is alike.
    Also whether every number had the same structure behind it.
    """
    here = there = ""
    alike = True
    for text, number in re.findall(r"(\D*)(\d*)", name):
        here, there = here + text, there + text
        if number:
            mine, offered = ours.after[here], theirs.after.get(there, {})
            wanted = mine[int(number)]
            same = sorted(i for i, followers in offered.items() if followers == wanted)
            alike_here = sorted(i for i, followers in mine.items() if followers == wanted)
            # A first block may have a shortcut more than the later ones.
            larger = [i for i, followers in offered.items() if followers > wanted]
            if not same and not larger:
                return None, False
            alike = alike and bool(same)
            match = int(number) if int(number) in same else max(same or larger)
            if len(same) == len(alike_here):
                match = same[alike_here.index(int(number))]
            here, there = here + number, there + str(match)
    return there, alike


def set_shapes(model: nn.Module, widths: Mapping[str, Width]) -> None:
    """Leaves the widths on the parameters in ``mup``'s vocabulary, as ``parameter.infshape``."""
    for name, parameter in model.named_parameters():
        dims = zip(widths[name].base, widths[name].dims, strict=True)
        setattr(parameter, "infshape", InfShape(InfDim(base, dim) for base, dim in dims))  # noqa: B010


@contextlib.contextmanager
def shaped(model: nn.Module) -> Iterator[None]:
    """A model as its own base for as long as it is run: ``mup.MuReadout`` asks for base shapes. Present ones stay."""
    if from_base_shapes(model) is not None:
        yield
        return
    own = {name: Width(tuple(p.shape), (None,) * p.ndim, None) for name, p in model.named_parameters()}
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


def readout_multipliers(model: nn.Module, widths: Mapping[str, Width]) -> dict[str, float]:
    """Multiplier 1 / width of every plain ``nn.Linear`` from a width to a fixed number of outputs.

    ``mup.MuReadout`` divides its input by the width multiplier; folded into the weight of an ordinary linear layer the
    same multiplier leaves the module type alone.

    Raises:
        PlanError: the weight is shared with another module (a tied embedding), so nothing can be folded into it.
    """
    found = {}
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for module in model.modules():
        if not isinstance(module, nn.Linear) or isinstance(module, mup.MuReadout):
            continue
        shared = users.get(id(module.weight), [])
        weight = next((name for name in shared if name in widths), None)
        if weight and widths[weight].base[0] is None and widths[weight].base[1] is not None:
            if len(shared) > 1:
                raise PlanError(
                    f"{weight} reads out of a width and is shared by {', '.join(shared)}, so width's multiplier cannot "
                    "be folded into it. Use mup.MuSharedReadout, or a base of the same width"
                )
            found[weight] = 1 / widths[weight].ratio(1)
    return found


def initial_scales(model: nn.Module, widths: Mapping[str, Width]) -> dict[str, float]:
    """Factors on freshly initialized parameters that take PyTorch's default scaling to that of muP.

    As ``mup.set_base_shapes(rescale_params=True)``: biases of linear and convolution layers, and weights of readouts,
    keep their size as the width grows.

    Source: mup 1.0.0, ``rescale_linear_bias`` and ``MuReadout._rescale_parameters``.
    """
    scales = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            weight, bias = f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".")
            if weight not in widths:
                continue
            width = widths[weight]
            if bias in widths:
                scales[bias] = math.sqrt(width.ratio(1))
            if isinstance(module, nn.Linear) and width.base[0] is None and width.base[1] is not None:
                scales[weight] = math.sqrt(width.ratio(1))
    return {name: scale for name, scale in scales.items() if scale != 1.0}
