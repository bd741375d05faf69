"""Coordinate check: trains briefly over a grid of depths and widths, and holds log-log slopes against the rule's.

The slopes are taken in `slopes.py`; what a broken one probably means stands in `mistakes.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_depthmup import rules
from torch_depthmup.diagnostics.coordinates import mistakes
from torch_depthmup.diagnostics.coordinates.slopes import AXES, QUANTITIES, Point, Slope, Verdict, fit, slope
from torch_depthmup.diagnostics.monitor.recording import COLUMNS, FeatureMonitor
from torch_depthmup.diagnostics.shared.arguments import checked_samples, positive_integer, positive_integers, seeds_of
from torch_depthmup.diagnostics.shared.extras import frame
from torch_depthmup.diagnostics.shared.progress import bar
from torch_depthmup.diagnostics.shared.training import OPTIMIZERS, default_loss, own_random_state, take, trainable
from torch_depthmup.errors import DepthMuPError, MeasurementError, ignores_depth, ignores_width
from torch_depthmup.rules import Family, Rule, get_family, get_rule
from torch_depthmup.running import call, without_numbers
from torch_depthmup.scaling.apply import parametrize
from torch_depthmup.tables import columns
from torch_depthmup.tracing.branches import SIDES, Branch

if TYPE_CHECKING:
    import pandas

__all__ = ["CoordinateCheck", "EXAMPLES", "coordinate_check"]

EXAMPLES = 4  # samples that branches are found with
PROBE = 32  # samples of the first batch that are looked at


@dataclass(frozen=True)
class CoordinateCheck:
    """What `coordinate_check` found. ``print`` it; `frame` is tidy; `plots.coordinate_figure` draws it.

    Args:
        rule: the rule that was checked.
        family: the optimizer's family.
        slopes: one for each quantity that the model has and each axis with at least two values.
        mistakes: what is wrong, in words; empty where all holds.
        rows: the monitor's rows with ``width``, ``relative_depth`` and ``seed``; step 0 is before training.
    """

    rule: Rule
    family: Family
    slopes: tuple[Slope, ...]
    mistakes: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] = field(repr=False)

    def frame(self) -> pandas.DataFrame:
        """The rows as a tidy pandas data frame.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.rows, ("width", "depth", "relative_depth", "seed", *COLUMNS))

    @cached_property
    def _sizes(self) -> AllSizes:
        return _all_sizes(self.rows)

    def sizes(self, quantity: str, kind: str = "") -> dict[Point, float]:
        """A quantity by (depth, width, seed), as its slopes are taken of it.

        Args:
            quantity: a key of `QUANTITIES`.
            kind: of branches, as `Slope.kind`; ``""`` is all of them.
        """
        return dict(self._sizes[quantity, kind])

    @property
    def advice(self) -> str:
        """How many seeds would tell what these cannot, or what ``"network"`` means; ``""`` where all is said."""
        if self.verdict == "holds" and any(slope.verdict == "network" for slope in self.slopes):
            return "network: multipliers and learning rates hold in every branch; the whole moves otherwise by itself"
        open_ = [slope for slope in self.slopes if slope.verdict == "cannot tell"]
        if not open_:
            return ""
        needed = max(slope.needed for slope in open_)
        if not needed:
            return "cannot tell from one seed: write seeds=3, which adds seeds until it can"
        return f"cannot tell with {open_[0].seeds} seeds: about {needed} would, or more depths, or more steps"

    @property
    def verdict(self) -> Verdict:
        """``"broken"`` if any slope is, ``"holds"`` if all do."""
        verdicts = {slope.verdict for slope in self.slopes}
        return "broken" if "broken" in verdicts else "holds" if verdicts <= {"holds", "network"} else "cannot tell"

    def __str__(self) -> str:
        header = ("quantity", "axis", "slope", "95 % interval", "rule", "verdict")
        rows = [
            (
                s.words,
                (s.axis, f"{s.measured:+.2f}", f"{s.low:+.2f}..{s.high:+.2f}", s.prediction, s.verdict),
            )
            for s in self.slopes
        ]
        lines = [
            f"coordinate check of {self.rule.name} with {self.family.name}: {self.verdict}",
            *columns(header, rows),
        ]
        return "\n".join([*lines, *(f"wrong: {mistake}" for mistake in self.mistakes), *filter(None, [self.advice])])


def coordinate_check(
    make_model: Callable[..., nn.Module],
    data: Any,
    *,
    depths: Sequence[int],
    widths: Sequence[int] | None = None,
    base_depth: int | None = None,
    rule: str | Rule = "depth-mup-corrected",
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adam",
    lr: float = 1e-3,
    family: str | Family | None = None,
    steps: int = 3,
    seeds: int | Sequence[int] = 3,
    most_seeds: int = 12,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    prepare: Callable[[nn.Module, nn.Module], Any] | None = None,
    tolerance: float = 0.15,
    progress: bool = False,
) -> CoordinateCheck:
    """Trains briefly at each depth (and width), and holds the slopes of what moved against the rule's exponents.

    Args:
        make_model: ``depth -> model``, or ``(depth, width) -> model`` with ``widths``; called under a fixed seed.
        data: ``(inputs, targets)``, or a list of such batches, which are cycled through.
        depths: at least two values; what they count is the factory's affair, as long as streams grow in proportion.
        widths: values of the width, each trained at each depth; slopes in width are checked where there are two.
        base_depth: what to call the factory with for the base; the default is the smallest of ``depths``. The narrowest
            width is the base's.
        rule: the rule that should hold.
        optimizer: ``"sgd"``, ``"adam"``, ``"adamw"``, or a function of the model that makes one.
        lr: learning rate at the base for a named optimizer. The theory speaks of small ones.
        family: the family of ``optimizer`` where that is a function.
        steps: training steps before the updates are measured.
        seeds: how many, or which. Their scatter gives the confidence intervals.
        most_seeds: where ``seeds`` is a number above 1 and so many cannot tell, they are doubled up to this many.
        loss: ``(output, targets) -> scalar``; the default is cross-entropy for integer targets, else mean squares.
        prepare: ``(model, base) -> anything``: one's own code for the rule in place of `parametrize`.
        tolerance: how far from the rule's exponent a slope still counts as holding.
        progress: whether a terminal shows a bar with the time left (needs rich).

    Returns:
        The slopes, verdicts and mistakes.

    Raises:
        MeasurementError: a factory that ignores depth or width, values that are not finite, or nothing that learns.
        DepthMuPError: fewer than two depths or other wrong arguments, and as raised by `parametrize`.

    Source: the coordinate check of arXiv 2203.03466, appendix D.1, in depth; exponents from `rules.predicted_slopes`.

    >>> import torch, torch_depthmup as dm
    >>> def make(depth):
    ...     blocks = [dm.Residual(torch.nn.Linear(16, 16)) for _ in range(depth)]
    ...     return torch.nn.Sequential(torch.nn.Linear(4, 16), *blocks, torch.nn.Linear(16, 2))
    >>> data = torch.randn(8, 4), torch.randint(2, (8,))
    >>> found = coordinate_check(make, data, depths=[2, 4, 8], rule="depth-mup", seeds=2, most_seeds=2)
    >>> [slope.quantity for slope in found.slopes][:2], found.slopes[0].predicted
    (['branch', 'outer'], -0.5)
    """
    rule, kind = get_rule(rule), _family(optimizer, family)
    batches = _batches(data)
    points, which = _grid(depths, widths, steps), seeds_of(seeds)
    budget = most_seeds if isinstance(seeds, Integral) and len(which) > 1 else len(which)
    make_optimizer = optimizer if callable(optimizer) else _named(optimizer, lr)
    prepare = prepare or _parametrize(rule, take(batches[0][0], slice(EXAMPLES)), widths is not None)
    rows: list[dict[str, Any]] = []
    found: dict[int, int] = {}
    with own_random_state(), bar("checking", len(points) * len(which), show=progress) as advance:
        _check_width(make_model, points)
        base = _made(make_model, base_depth or points[0][0], points[0][1], seed=0)
        done = 0
        while True:
            for seed, (depth, width) in itertools.product(which[done:], points):
                model = _made(make_model, depth, width, seed)
                prepare(model, base)
                monitor = FeatureMonitor(model, take(batches[0][0], slice(PROBE)))
                _check_depth(found, depth, len(monitor.branches))
                _check_learns(model, monitor.branches)
                _train(model, make_optimizer(model), batches, steps, loss, monitor)
                rows += [_row(row, depth, width, seed) for row in monitor.rows]
                monitor.close()
                advance()
            sizes = _all_sizes(rows)
            slopes = _of_the_network(tuple(_slopes(sizes, rule, kind, tolerance)))
            wrong = mistakes.named(slopes, rule, kind, _gradient_slope(sizes[GRADIENT, ""]))
            check = CoordinateCheck(rule, kind, slopes, tuple(wrong), tuple(rows))
            done = len(which)
            if check.verdict != "cannot tell" or done >= budget:
                return check
            which = list(range(min(2 * done, budget)))


# Training on the grid


def _family(optimizer: Any, family: str | Family | None) -> Family:
    if family is not None:
        return get_family(family)
    if callable(optimizer):
        raise MeasurementError("optimizer is a function: say which rule holds for it, family='sgd' or family='adam'")
    if optimizer not in OPTIMIZERS:
        known = ", ".join(map(repr, OPTIMIZERS))
        raise MeasurementError(
            f"optimizer={optimizer!r} is not known. Write one of {known}, or a function of the model"
        )
    return get_family(optimizer)


def _named(optimizer: str, lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: OPTIMIZERS[optimizer](model, lr=lr)


def _parametrize(rule: Rule, example_inputs: Any, over_widths: bool) -> Callable[[nn.Module, nn.Module], Any]:
    if rule.scales_depth or over_widths:
        return lambda model, base: parametrize(model, base=base, rule=rule, example_inputs=example_inputs)
    return lambda model, base: parametrize(model, rule=rule)


def _batches(data: Any) -> list[tuple[Any, Tensor]]:
    pairs = data if isinstance(data, list) else [data]
    if not pairs:
        raise DepthMuPError("data must be (inputs, targets), or a list of such batches: the list is empty")
    return [checked_samples(pair) for pair in pairs]


def _grid(depths: Sequence[int], widths: Sequence[int] | None, steps: int) -> list[tuple[int, int | None]]:
    """Every depth at every width, the smallest first."""
    positive_integer("steps", steps)
    narrow_first: list[int | None] = [None] if widths is None else [*positive_integers("widths", widths)]
    return list(itertools.product(positive_integers("depths", depths, 2), narrow_first))


def _made(make_model: Callable[..., nn.Module], depth: int, width: int | None, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model(depth) if width is None else make_model(depth, width)
    if not isinstance(model, nn.Module):
        raise MeasurementError(f"the factory returned {type(model).__name__} at depth {depth}, not an nn.Module")
    return model


def _check_depth(found: dict[int, int], depth: int, branches: int) -> None:
    found[depth] = branches
    for other, count in found.items():
        if other != depth and count == branches:
            raise MeasurementError(ignores_depth(branches, other, depth))


def _check_learns(model: nn.Module, branches: Sequence[Branch]) -> None:
    """That on each side of each kind of branches some matrix moves: one that is frozen has no update, and no slope."""
    matrices = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return  # what trains says so
    sides: dict[tuple[str, str], list[str]] = {}
    for branch in branches:
        for side in SIDES:
            sides.setdefault((side, without_numbers(branch.name)), []).extend(getattr(branch, side))
    for (place, kind), names in sides.items():
        frozen = [name for name in names if name in matrices]
        if frozen and not any(matrices[name] for name in frozen):
            raise MeasurementError(
                f"all {place} matrices of the branches {kind} are frozen (requires_grad=False), {frozen[0]} for one, "
                "so that their update has no slope. Unfreeze them in the factory, with model.requires_grad_(True)"
            )


def _check_width(make_model: Callable[..., nn.Module], grid: list[tuple[int, int | None]]) -> None:
    shallow, narrow, wider = grid[0][0], grid[0][1], grid[1][1]
    if narrow is None or wider is None or narrow == wider:
        return
    models = [_made(make_model, shallow, width, seed=0) for width in (narrow, wider)]
    if len({tuple(parameter.shape for parameter in model.parameters()) for model in models}) == 1:
        raise MeasurementError(ignores_width(narrow, wider))


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Any, Tensor]],
    steps: int,
    loss: Callable[[Any, Tensor], Tensor] | None,
    monitor: FeatureMonitor,
) -> None:
    model.train()
    monitor.record(0)
    for step in range(steps):
        inputs, targets = batches[step % len(batches)]
        optimizer.zero_grad()
        value = trainable((loss or default_loss)(call(model, inputs), targets), model)
        if not value.isfinite():
            depth = max(branch.additions for branch in monitor.branches)
            raise MeasurementError(
                f"the loss is {value.item()} in step {step + 1} of the network with {depth} residual additions. Use a "
                "smaller lr, or a rule that scales depth"
            )
        value.backward()
        optimizer.step()
    monitor.record(steps)


def _row(row: dict[str, Any], depth: int, width: int | None, seed: int) -> dict[str, Any]:
    relative = (row["position"] + 1) / row["additions"] if row["additions"] else math.nan
    return {"width": width, "depth": depth, "relative_depth": relative, "seed": seed, **row}


# Slopes

GRADIENT = "gradient"  # in the residual stream at initialization, which the rules take to be the same at every depth


AllSizes = dict[tuple[str, str], dict[Point, float]]
"""By quantity and kind of branches (``""`` is all of them), and by network; without what a network does not have."""


def _all_sizes(rows: Iterable[dict[str, Any]]) -> AllSizes:
    groups: dict[Point, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["depth"], row["width"], row["seed"]), []).append(row)
    found: AllSizes = {}
    for point, group in groups.items():
        for quantity, size in _sizes(group).items():
            found.setdefault((quantity, ""), {})[point] = size
        for kind, members in _kinds(group).items():
            for quantity, size in _sizes(members).items():
                found.setdefault((quantity, kind), {})[point] = size
    return found


def _kinds(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each kind of branches, attention and feed-forward, say; nothing where there is one kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["branch"]:
            kinds.setdefault(without_numbers(row["branch"]), []).append(row)
    return kinds if len(kinds) > 1 else {}


def _sizes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The quantities of one network: root mean squares over its layers, or the ends of its streams."""
    last = max(row["step"] for row in rows)
    begun = [row for row in rows if row["step"] == 0 and row["kind"] == "stream"]
    end = [row for row in rows if row["step"] == last]
    layers = {role: [r["own"] / r["folded"] for r in end if r["role"] == role] for role in ("inner", "outer")}
    values = {
        "branch": [r["added"] for r in begun],
        **layers,
        "stream": [r["update"] for r in end if r["kind"] == "stream" and r["position"] == r["additions"] - 1],
        "function": [r["update"] for r in end if r["kind"] == "function"],
        GRADIENT: [r["gradient"] for r in begun],
    }
    return {name: math.sqrt(sum(v * v for v in given) / len(given)) for name, given in values.items() if given}


def _slopes(sizes: AllSizes, rule: Rule, family: Family, tolerance: float) -> Iterator[Slope]:
    """In depth what the rule says; in width, where it scales width, nothing that training does depends on it."""
    inner = ("inner", "") in sizes
    predicted = {"branch": -rule.alpha, **rules.predicted_slopes(rule, family, inner_layers=inner)}
    kinds = sorted({kind for _, kind in sizes} - {""}) or [""]
    for quantity in QUANTITIES:
        for kind in kinds if quantity in ("branch", "inner", "outer") else [""]:
            given = sizes.get((quantity, kind), {})
            for place, axis in enumerate(AXES):
                checked = axis == "depth" or (rule.width and quantity != "branch")
                if checked and len({point[place] for point in given}) > 1:
                    exponent = predicted[quantity] if axis == "depth" else 0.0
                    yield slope(axis, quantity, given, exponent, tolerance, kind)


def _of_the_network(slopes: tuple[Slope, ...]) -> tuple[Slope, ...]:
    """What the rule sets holds in every branch: then it is the network that lets the whole move otherwise.

    A rule sets the branches' multiplier and learning rates. The exponent of the whole follows from them where gradients
    do not depend on depth, which is not so in every network (post-norm; no depth scaling at all). So as long as the
    branches cannot be told, neither can the whole.
    """
    of_branches = {s.verdict for s in slopes if s.quantity in ("branch", "inner", "outer")}
    if "broken" in of_branches:
        return slopes
    verdict: Verdict = "network" if of_branches <= {"holds"} else "cannot tell"
    return tuple(replace(s, verdict=verdict) if s.verdict == "broken" and s.axis == "depth" else s for s in slopes)


def _gradient_slope(sizes: dict[Point, float]) -> float:
    """In depth; nan where gradients vanish or overflow, which says nothing about a rule."""
    if not all(0 < size < math.inf for size in sizes.values()):
        return math.nan
    return fit("depth", sizes)[0]
