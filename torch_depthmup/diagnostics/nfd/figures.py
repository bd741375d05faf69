"""Figures of Neural Feature Dynamics: a prediction alone, and beside what was measured."""

from __future__ import annotations

from typing import Any

from torch_depthmup.diagnostics.nfd.comparison import Comparison
from torch_depthmup.diagnostics.nfd.result import NFDResult
from torch_depthmup.diagnostics.shared.extras import needs

__all__ = ["comparison_figure", "simulation_figure"]

SAMPLES = 6  # whose outputs are drawn at most
MARKS = 16  # layers at which a measurement is marked at most


def simulation_figure(result: NFDResult) -> Any:
    """Losses and outputs over steps, and sizes over layer time at the last step, with standard errors over seeds.

    Args:
        result: of `nfd.simulate` or `comparison.measure`.

    Returns:
        A matplotlib figure of three panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = needs("matplotlib.figure").Figure(figsize=(11, 3.4), layout="constrained")
    losses, outputs, sizes = figure.subplots(1, 3)
    steps = range(result.losses.shape[1])
    losses.errorbar(steps, result.mean("losses"), result.error("losses"))
    losses.set(title="loss", xlabel="step", ylim=(0, None))
    for sample in range(min(SAMPLES, result.outputs.shape[2])):
        outputs.errorbar(steps, result.mean("outputs")[:, sample, 0], result.error("outputs")[:, sample, 0])
    outputs.set(title="outputs", xlabel="step")
    for name in ("stream_update", "inner_update", "inner_own", "outer_own"):
        mean, error = result.mean(name)[-1], result.error(name)[-1]
        sizes.errorbar(result.layer_times(name), mean, error, label=name.replace("_", " "))
    sizes.set(title=f"feature updates after {len(steps) - 1} steps", xlabel="layer time t", ylim=(0, None))
    sizes.legend(fontsize="small", frameon=False)
    return figure


def comparison_figure(comparison: Comparison) -> Any:
    """Outputs over steps, and the sizes of own updates over layer time at the last step, predicted and measured.

    Args:
        comparison: of `comparison.compare`.

    Returns:
        A matplotlib figure of four panels: lines are predicted, marks measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = needs("matplotlib.figure").Figure(figsize=(11, 3.4), layout="constrained")
    left, *others = figure.subplots(1, 4)
    predicted, measured = comparison.predicted, comparison.measured
    steps = range(predicted.outputs.shape[1])
    for result, style, what in ((predicted, "-", "prediction"), (measured, "o", "network")):
        for sample in range(min(SAMPLES, result.outputs.shape[2])):
            mean, error = result.mean("outputs")[:, sample, 0], result.error("outputs")[:, sample, 0]
            label = f"{what}, n = {result.width}" if sample == 0 else None
            left.errorbar(steps, mean, error, fmt=style, color=f"C{sample}", markersize=4, label=label)
        for axis, name in zip(others, ("stream_update", "inner_own", "outer_own"), strict=True):
            mean, error, times = result.mean(name)[-1], result.error(name)[-1], result.layer_times(name)
            every = max(1, len(mean) // MARKS) if result is measured else 1
            axis.errorbar(times[::every], mean[::every], error[::every], fmt=style, markersize=4, color="C0")
            axis.set(title=f"{name.replace('_', ' ')} after {len(steps) - 1} steps", xlabel="layer time t")
    for axis in others:
        axis.set_ylim(bottom=0)
    left.set(title="outputs", xlabel="step")
    left.legend(fontsize="small", frameon=False)
    return figure
