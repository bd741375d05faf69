"""Builds the user's own model with its hidden matrices as `ImplicitWeight`, and all else as the factory has it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from torch_depthmup.diagnostics.nfd.gaussian import Coupling, GaussianMatrix, Noise
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.simulate import check_memory
from torch_depthmup.diagnostics.nfd.trained import TrainedMatrix
from torch_depthmup.diagnostics.nfd.unformed import Making, Unformed
from torch_depthmup.diagnostics.shared.training import own_random_state
from torch_depthmup.errors import DepthMuPError

__all__ = ["built", "hidden_matrices", "implicit_model"]

LONG = 10**6  # entries of a vector that is not worth making where only shapes are asked for
_COMPUTED = (
    "{}, entry by entry, in each forward pass (a parametrization such as orthogonal or weight_norm, or a mask), and "
    "entries are never formed here. Leave that out of the factory"
)
SAME_LAW = 0.05  # relative difference of standard deviations that the error of reading them off explains
CENTRED = 1e-2  # mean of the entries relative to their standard deviation that is still zero


def hidden_matrices(make_model: Callable[[int], nn.Module], width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters whose first two dimensions are widths: those that change when the width is doubled.

    The weights of convolutions with groups, transposed or over three dimensions are not among them: they are formed.

    Args:
        make_model: a factory width -> model.
        width: where the shapes are read.

    Raises:
        DepthMuPError: the factory fails at this width or at twice it, no parameter has two widths, or other dimensions
            than the first two are widths.
    """
    shapes, formed, computed = _shapes(make_model, width)
    doubled, *_ = _shapes(make_model, 2 * width)
    if list(shapes) != list(doubled):
        raise DepthMuPError(f"make_model gives other parameters at width {width} than at width {2 * width}")
    hidden: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        widths = [i for i, (a, b) in enumerate(zip(shape, doubled[name], strict=True)) if a != b]
        if len(widths) >= 2 and name not in formed:
            if widths != [0, 1] or len(shape) > 4:
                raise DepthMuPError(
                    f"{name} of shape {shape} has {len(shape)} dimensions, of which {widths} are widths. Only matrices "
                    "and convolutions over one or two dimensions can be left unformed here: experts side by side are "
                    "not covered"
                )
            if name.startswith(tuple(computed)):
                raise DepthMuPError(_COMPUTED.format(f"{name} is what torch computes a weight from"))
            hidden[name] = shape
    if not hidden:
        raise DepthMuPError(
            f"no parameter has two dimensions that change from width {width} to width {2 * width}. Let the factory's "
            "argument set the size of the layers"
        )
    explicit = sum(math.prod(shape) for name, shape in shapes.items() if name not in hidden)
    advice = "Take less width: embeddings, readouts and convolutions with groups are formed"
    check_memory(explicit * 4, torch.device("cpu"), advice)
    return hidden


def _shapes(
    make_model: Callable[[int], nn.Module], width: int
) -> tuple[dict[str, tuple[int, ...]], set[str], set[str]]:
    """Shapes of all parameters, which of them belong to convolutions that are formed, modules that compute weights."""
    with own_random_state(), Making(lambda shape: len(shape) >= 2 or math.prod(shape) > LONG):
        try:
            model = make_model(width)
        except Exception as error:  # whatever the user's factory raises
            frames = traceback.extract_tb(error.__traceback__)
            if any(Path(frame.filename).match("nn/utils/parametri*.py") for frame in frames):
                what = "make_model registers a parametrization, by which torch computes a weight"
                raise DepthMuPError(_COMPUTED.format(what)) from error
            raise DepthMuPError(f"make_model({width}) fails without values: {error}") from error
    formed = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and (module.groups > 1 or module.transposed or isinstance(module, nn.Conv3d))
    }
    computed = {f"{name}." if name else "" for name, module in model.named_modules() if _computes(module)}
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, formed, computed


def _computes(module: nn.Module) -> bool:
    """Whether torch makes a weight of it from other tensors: a parametrization, a norm or a mask."""
    hooks = module._forward_pre_hooks.values()
    return is_parametrized(module) or any(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks)


def implicit_model(
    make_model: Callable[[int], nn.Module],
    width: int,
    *,
    seed: int = 0,
    coupling: Coupling = "reused",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The user's own model at a width at which its hidden matrices could not be formed: they are `ImplicitWeight`.

    Everything else (embeddings, biases, gains, the readout, buffers) has the values that the factory gives it. Hidden
    matrices have normal entries of the standard deviation that the factory's initialization has; what another shape of
    the entries' distribution changes falls like 1 / width.

    Args:
        make_model: a factory width -> model.
        width: its argument.
        seed: of the factory's random numbers, and of the hidden matrices'.
        coupling: as for `nfd.simulate`.
        device: of the model; ``None`` is the CPU.
        dtype: of the model, float32 or float64.

    Returns:
        A module that is called, trained by SGD and differentiated like any other.

    Raises:
        DepthMuPError: the factory does not fit, or hidden matrices are not initialised by independent entries around 0.

    >>> make = lambda n: nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, n), nn.Linear(n, 1))
    >>> model = implicit_model(make, 10**6)
    >>> model[2].weight
    ImplicitWeight('2.weight', (1000000, 1000000))
    >>> model(torch.ones(2, 3)).shape
    torch.Size([2, 1])
    """
    hidden = hidden_matrices(make_model, width)
    return built(make_model, width, hidden, seed=seed, coupling=coupling, device=device, dtype=dtype)


def built(
    make_model: Callable[[int], nn.Module],
    width: int,
    hidden: dict[str, tuple[int, ...]],
    *,
    seed: int,
    coupling: Coupling,
    device: torch.device | str | None,
    dtype: torch.dtype,
    like: nn.Module | None = None,
) -> nn.Module:
    """The same, where it is known already which matrices are hidden, and what shapes they have.

    Beside another seed's model, the standard deviations are that one's, and are checked and not measured.
    """
    shapes: set[tuple[int, ...]] = set(hidden.values())
    with own_random_state():
        torch.manual_seed(seed)
        with Making(lambda shape: shape in shapes, many=like is None):
            model = make_model(width)
    named = {} if like is None else dict(like.named_parameters())
    known = {n: p.matrix.start.std for n, p in named.items() if isinstance(p, ImplicitWeight)}
    parameters = dict(model.named_parameters())
    noise = Noise([_another_stream(seed)], device=device, dtype=dtype)
    made: dict[int, nn.Parameter] = {}
    _refuse_copies({name: parameters[name] for name in hidden})
    for name in hidden:
        std = _std(name, parameters[name], known.get(name))
        rows, *rest = hidden[name]
        start = GaussianMatrix(rows, math.prod(rest), noise, std=std, coupling=coupling)
        weight = ImplicitWeight(TrainedMatrix.at_start(start), name, kernel=tuple(rest[1:]))
        made[id(parameters[name])] = nn.Parameter(weight, requires_grad=parameters[name].requires_grad)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made:
                module._parameters[key] = made[id(parameter)]
    _refuse_unformed(model)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(parameter, ImplicitWeight):
                parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return model


def _another_stream(seed: int) -> int:
    """A seed for other numbers than those the factory drew: the same ones would tie hidden matrices to embeddings."""
    return int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))


def _std(name: str, parameter: Tensor, known: float | None) -> float:
    """The standard deviation of a matrix's entries."""
    law = parameter.law.sample if isinstance(parameter, Unformed) else "values that were made in another way"
    if isinstance(law, str):
        raise DepthMuPError(
            f"{name}: its initialization is not one of independent entries, as far as can be seen: it holds {law}. "
            "Initialise it by torch.nn.init.normal_ or uniform_ in the factory"
        )
    mean, std = float(law.mean()), float(law.std(unbiased=False))
    if known is not None:
        if abs(std - known) > SAME_LAW * known:
            raise DepthMuPError(f"{name}: its initial entries have standard deviation {std:.3g} with one seed and "
                                f"{known:.3g} with another")  # fmt: skip
        return known
    if abs(mean) > CENTRED * std and mean != 0:
        raise DepthMuPError(f"{name}: its entries have mean {mean:.3g} at initialization, not 0")
    return std


def _refuse_copies(parameters: dict[str, nn.Parameter]) -> None:
    """Two matrices whose entries were drawn together, as in layers that `copy.deepcopy` made of one."""
    seen: dict[tuple[float, ...], str] = {}
    for name, parameter in parameters.items():
        law = parameter.law.sample if isinstance(parameter, Unformed) else None
        if not isinstance(law, Tensor) or float(law.std()) == 0:
            continue
        key = tuple((law[:8] / law.std()).mul(1e6).round().tolist())
        if key in seen:
            raise DepthMuPError(
                f"{name} starts with the same entries as {seen[key]}, as copies of one layer do. Initialise each "
                "of them in the factory"
            )
        seen[key] = name


def _refuse_unformed(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, Unformed):
            raise DepthMuPError(
                f"{name} of shape {tuple(tensor.shape)} is no hidden matrix and has the shape of one at this width, so "
                "it cannot be told apart. Take another width, or give it another shape"
            )
