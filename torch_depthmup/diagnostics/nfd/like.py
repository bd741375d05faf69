"""Predicting a user's own network: its constants are read off the model by measuring, and simulated.

The simulation is exact in law at finite width, so the prediction is made at the model's own width, whatever its
parametrization. What is read is checked against the model's own values; what does not fit is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.nfd.activations import ACTIVATIONS
from torch_depthmup.diagnostics.nfd.result import NFDResult
from torch_depthmup.diagnostics.nfd.setting import Loss, Scales, Setting
from torch_depthmup.diagnostics.nfd.simulate import simulate
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.rules import RULES, get_family, predicted_slopes
from torch_depthmup.scaling.registry import plan_of
from torch_depthmup.tracing.branches import Trace, roles, trace
from torch_depthmup.tracing.replay import Meter, run_metered

__all__ = ["simulate_like"]

ALIKE = 1e-3  # relative residual up to which a reading of the model is taken to be right


def simulate_like(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    loss: Loss = "mse",
    seeds: int | Sequence[int] = 4,
    **options: Any,
) -> NFDResult:
    """Predicts the training of an MLP-like residual network at its own width: the law over its random initialization.

    The model must be a linear stem, blocks ``h + c W phi(h)`` or ``h + c V phi(W h)`` of one shape, and a linear
    readout, all without biases and norms, freshly initialized and untrained; the optimizer plain SGD, with momentum or
    without.
    Depth, width, activation, constants, standard deviations and learning rates are read off both.

    Args:
        model: parametrized or not.
        inputs: (samples, d).
        targets: as for `nfd.simulate`.
        optimizer: over the model's parameters; what it does not hold stays frozen.
        steps: SGD steps on all samples.
        loss: ``"mse"`` is the mean over samples of half the squared error.
        seeds: of the simulation.
        options: as for `nfd.simulate`: ``coupling``, ``held_out``, ``dtype``, ...

    Raises:
        DepthMuPError: the model or the optimizer lies outside the theory; the message says which part, and gives the
            exponents that the rule predicts instead.

    Source: `nfd.simulate`, with the constants of the model.
    """
    rule = _rule(model)
    found = trace(model, inputs)
    if not found.branches:
        _refuse("it has no residual branches", rule)
    if len({branch.stream for branch in found.branches}) > 1:
        _refuse("it has more than one residual stream", rule)
    layers = _layers(model, found, rule)
    reading = _read(model, inputs, found, layers, rule)
    rates, momentum = _rates(optimizer, model, layers, rule)
    width = reading.width
    scales = Scales(
        input_gain=reading.input_gain,
        inner_gain=reading.inner_gain,
        outer_gain=reading.outer_gain,
        readout_gain=reading.readout_gain,
        input_rate=rates["stem"] * reading.input_constant**2 * inputs.shape[1] / width,
        inner_rate=rates["inner"],
        outer_rate=rates["outer"],
        readout_rate=rates["readout"] * reading.readout_constant**2 * width,
    )
    setting = Setting(
        depth=len(found.branches), steps=steps, lr=max(rates.values()), activation=reading.activation,
        block_layers=2 if layers.inner else 1, rule="mup", loss=loss, horizon=reading.branch_constant**2,
        momentum=momentum, train_readout=rates["readout"] > 0, train_input=rates["stem"] > 0, scales=scales,
    )  # fmt: skip
    return simulate(setting, inputs, targets, width=width, seeds=seeds, **options)


def _rule(model: nn.Module) -> str:
    try:
        return plan_of(model).rule.name
    except DepthMuPError:
        return "mup"


def _refuse(what: str, rule: str) -> NoReturn:
    text = ""
    if rule in RULES:
        slopes = predicted_slopes(RULES[rule], get_family("sgd"))
        text = f" What {rule!r} predicts as exponents in depth holds all the same: " + ", ".join(
            f"{name} {slope:+g}" for name, slope in slopes.items()
        )
    raise DepthMuPError(f"the network lies outside what can be simulated: {what}.{text}")


@dataclass(frozen=True)
class _Layers:
    """Names of the weights by their place."""

    stem: str
    readout: str
    inner: tuple[str, ...]
    outer: tuple[str, ...]


def _layers(model: nn.Module, found: Trace, rule: str) -> _Layers:
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            kind = "a convolution" if parameter.ndim > 2 else "a bias, or the gain of a norm"
            _refuse(f"{name} of shape {tuple(parameter.shape)} is {kind}", rule)
    for branch in found.branches:
        if branch.skip != "identity" or branch.levels not in (1, 2) or len(branch.outer) != 1:
            _refuse(f"branch {branch.name} has {branch.levels} levels and an {branch.skip} skip", rule)
        if len(branch.inner) != branch.levels - 1:
            _refuse(f"branch {branch.name} has {len(branch.inner)} inner matrices: a gate, or attention", rule)
    outside = [name for name, _ in model.named_parameters() if name not in roles(found.branches)]
    if len(outside) != 2:
        _refuse(f"outside the blocks there should be a stem and a readout, and there are {outside}", rule)
    inner = tuple(name for branch in found.branches for name in branch.inner)
    if inner and len(inner) != len(found.branches):
        _refuse("some blocks have one layer and some two", rule)
    return _Layers(outside[0], outside[1], inner, tuple(branch.outer[0] for branch in found.branches))


@dataclass(frozen=True)
class _Reading:
    """Constants in the forward pass, and gains relative to the canonical network."""

    activation: str
    width: int
    branch_constant: float
    input_constant: float
    readout_constant: float
    input_gain: float
    inner_gain: float
    outer_gain: float
    readout_gain: float


def _read(model: nn.Module, inputs: Tensor, found: Trace, layers: _Layers, rule: str) -> _Reading:
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def look(branch: int, value: Tensor, skip: Tensor) -> None:
        seen[branch] = value.clone(), skip.clone()

    run_metered(model, inputs, Meter(found, look))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    width = seen[0][1].shape[-1]
    for name in (*layers.inner, *layers.outer):
        if weights[name].shape != (width, width):
            _refuse(f"{name} has shape {tuple(weights[name].shape)}, and the stream is {width} wide", rule)
    activation, constants = _activation(seen, weights, layers, rule)
    stem, stem_residual = _factor(seen[0][1], inputs @ weights[layers.stem].T)
    last = seen[len(seen) - 1]
    with torch.no_grad():
        readout, readout_residual = _factor(model(inputs), (last[0] + last[1]) @ weights[layers.readout].T)
    for name, residual in ((layers.stem, stem_residual), (layers.readout, readout_residual)):
        if residual > ALIKE:
            _refuse(f"{name} is not all there is between the blocks and the network's end", rule)
    if max(constants) - min(constants) > ALIKE * max(constants) or min(constants) <= 0:
        _refuse(f"the branches have different constants, from {min(constants):.3g} to {max(constants):.3g}", rule)

    def size(names: tuple[str, ...]) -> float:
        return float(torch.stack([weights[name].float().std() for name in names]).mean()) if names else 0.0

    root = math.sqrt(width)
    return _Reading(
        activation=activation,
        width=width,
        branch_constant=sum(constants) / len(constants),
        input_constant=stem,
        readout_constant=readout,
        input_gain=stem * size((layers.stem,)) * math.sqrt(inputs.shape[1]),
        inner_gain=size(layers.inner) * root,
        outer_gain=size(layers.outer) * root,
        readout_gain=readout * size((layers.readout,)) * width,
    )


def _activation(
    seen: dict[int, tuple[Tensor, Tensor]], weights: dict[str, Tensor], layers: _Layers, rule: str
) -> tuple[str, list[float]]:
    """The activation under which every branch is c V phi(W h), and its c."""
    for name, phi in ACTIVATIONS.items():
        factors = []
        for i, (value, skip) in seen.items():
            taken = skip @ weights[layers.inner[i]].T if layers.inner else skip
            factors.append(_factor(value, phi(taken) @ weights[layers.outer[i]].T))
        if all(residual < ALIKE for _, residual in factors):
            return name, [factor for factor, _ in factors]
    _refuse(f"no branch is V phi(W h) with phi one of {', '.join(ACTIVATIONS)}", rule)


def _factor(value: Tensor, reference: Tensor) -> tuple[float, float]:
    """c of the least-squares fit value = c * reference, and the residual relative to the value."""
    factor = float((value * reference).sum() / reference.square().sum())
    return factor, float((value - factor * reference).norm() / value.norm())


def _rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, layers: _Layers, rule: str
) -> tuple[dict[str, float], float]:
    if type(optimizer) is not torch.optim.SGD:
        _refuse(f"it is trained by {type(optimizer).__name__}, and the theory is one of SGD", rule)
    lr: dict[int, float] = {}
    for group in optimizer.param_groups:
        if group["weight_decay"] or group["nesterov"] or group["dampening"] or group["maximize"]:
            _refuse("its SGD has weight decay, nesterov, dampening or maximize", rule)
        lr.update({id(p): float(group["lr"]) for p in group["params"] if p.requires_grad})
    momenta = {float(group["momentum"]) for group in optimizer.param_groups}
    if len(momenta) > 1:
        _refuse(f"its groups have different momenta, {sorted(momenta)}", rule)
    parameters = dict(model.named_parameters())
    rates = {}
    places = {"stem": (layers.stem,), "inner": layers.inner, "outer": layers.outer, "readout": (layers.readout,)}
    for place, names in places.items():
        found = {lr.get(id(parameters[name]), 0.0) for name in names}
        if len(found) > 1:
            _refuse(f"its {place} matrices have different learning rates, {sorted(found)}", rule)
        rates[place] = found.pop() if found else 0.0
    return rates, momenta.pop()
