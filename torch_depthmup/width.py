"""The bridge to ``mup``: which dimensions are widths, and what width changes at initialization.

A model with base shapes (``mup.set_base_shapes``) keeps them. Otherwise a narrower base model gives them: its
parameters are matched by structure, so that the base may be shallower too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import mup
from mup.infshape import InfDim, InfShape
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torch_depthmup.errors import PlanError
from torch_depthmup.graph import normalise_name
from torch_depthmup.rules import Width

__all__ = ["from_base_shapes", "initial_scales", "match", "readout_multipliers", "to_infshape"]


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
    the last block of the base in its place.

    Raises:
        PlanError: a parameter has no counterpart, or one of another number of dimensions.
    """
    shapes = {normalise_name(name): tuple(p.shape) for name, p in base.named_parameters()}
    widths, differs = {}, False
    for name, parameter in model.named_parameters():
        counterpart = _counterpart(normalise_name(name), shapes)
        if counterpart is None or len(shapes[counterpart]) != parameter.ndim:
            raise PlanError(
                f"{name} {tuple(parameter.shape)} has no counterpart in the base"
                + (f" ({counterpart} is {shapes[counterpart]})" if counterpart else "")
                + ". The base must be of the same family: build both with the same code, shallower and narrower"
            )
        pairs = list(zip(parameter.shape, shapes[counterpart], strict=True))
        infinite = [i for i, (dim, base_dim) in enumerate(pairs) if dim != base_dim]
        differs = differs or bool(infinite)
        bases = tuple(base_dim if i in infinite else None for i, (_, base_dim) in enumerate(pairs))
        widths[name] = Width(tuple(parameter.shape), bases, infinite[-1] if infinite else None)
    return widths if differs else None


def _counterpart(name: str, shapes: Mapping[str, object]) -> str | None:
    if name in shapes:
        return name
    # Same path but for one number: the last such block, since the first of a stage may have another shape.
    siblings = []
    for number in re.finditer(r"\d+", name):
        before, after = name[: number.start()], name[number.end() :]
        for other in shapes:
            middle = other[len(before) : len(other) - len(after)]
            if other.startswith(before) and other.endswith(after) and middle.isdigit():
                siblings.append((int(middle), other))
        if siblings:
            return max(siblings)[1]
    return None


def to_infshape(width: Width) -> InfShape:
    """The parameter's dimensions as ``mup`` keeps them on ``parameter.infshape``."""
    return InfShape(InfDim(base, dim) for base, dim in zip(width.base, width.dims, strict=True))


def readout_multipliers(model: nn.Module, widths: Mapping[str, Width]) -> dict[str, float]:
    """Multiplier 1 / width of every plain ``nn.Linear`` from a width to a fixed number of outputs.

    ``mup.MuReadout`` divides its input by the width multiplier; folded into the weight of an ordinary linear layer the
    same multiplier leaves the module type alone.

    Raises:
        PlanError: the weight is shared with another module (a tied embedding), so nothing can be folded into it.
    """
    found = {}
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        weight = f"{name}.weight".lstrip(".")
        if not isinstance(module, nn.Linear) or isinstance(module, mup.MuReadout) or weight not in widths:
            continue
        if widths[weight].base[0] is None and widths[weight].base[1] is not None:
            shared = users[id(module.weight)]
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
