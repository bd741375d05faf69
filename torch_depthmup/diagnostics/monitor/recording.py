"""Watches feature learning while a network trains: what moved, what arrived from below, what each layer learned itself.

The measuring pass is in `probe.py`, the words in `report.py`, files in `writers.py`.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.monitor.features import (
    FUNCTION,
    Feature,
    Function,
    Layer,
    StreamAfter,
    by_kind,
    from_kinds,
)
from torch_depthmup.diagnostics.monitor.probe import Probe, Product, Sights, signed_sum
from torch_depthmup.diagnostics.monitor.report import Report, Start, report
from torch_depthmup.diagnostics.shared.extras import frame
from torch_depthmup.errors import MeasurementError, PlanError
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.scaling.registry import plan_of
from torch_depthmup.tracing.branches import Branch, Pattern, roles

__all__ = ["COLUMNS", "FeatureMonitor", "NUMBERS"]

COLUMNS = (
    "step",
    "kind",
    "stream",
    "branch",
    "position",
    "additions",
    "layer",
    "role",
    "size",
    "update",
    "change",
    "own",
    "initial",
    "below",
    "own_share",
    "added",
    "gradient_alignment",
    "gradient",
    "weight",
    "weight_update",
    "weight_gradient",
    "folded",
)
"""Columns of the tidy frame, described at `FeatureMonitor`."""

NUMBERS = COLUMNS[COLUMNS.index("size") : COLUMNS.index("folded")]
Row = dict[str, Any]
FORMAT = 2


class FeatureMonitor:
    """Evaluates a probe batch now and then, and stores sizes of features, updates and gradients per branch and layer.

    The initial network is the one given here: construct the monitor before the first training step (and after
    `parametrize`). Recording leaves mode, buffers, random states, gradients, hooks and autocast as they were. The probe
    runs in evaluation mode without the caller's autocast, with the batch's own statistics in batch norms; a compiled
    model is run eagerly.

    Sizes are root mean squares over all entries. Each record appends rows of three kinds to `rows`:

    - ``"function"``: the main output. ``size``, ``update`` since initialization, ``change`` since the last record.
    - ``"stream"``: the sum h after a residual addition. Besides these ``added`` (the branch's value), ``gradient`` (of
      the objective, at h) and ``gradient_alignment``: the mean over the first dimension of the cosine of h and its
      gradient.
    - ``"layer"``: a weight operation's W h without bias, with W0 and h0 at initialization. ``own`` is (W - W0) h,
      ``initial`` is W0 h, ``below`` is W0 (h - h0); as vectors ``update = own + below``, and ``own_share`` is the share
      of ``own`` in ``update``: their inner product over ``update``'s square, NaN where nothing changed.
      ``gradient_alignment`` is the cosine of W0 h and the gradient, which independence of forward and backward noise
      takes to be zero.
      ``weight`` and ``weight_update`` are Frobenius norms of W and W - W0, ``weight_gradient`` that of the parameter's
      ``.grad``, NaN without.
      ``folded`` is the branch multiplier that the weight contains. An expert that gets other samples than at first has
      NaN where features are compared, and no row where it gets none.

    Memory: one copy of the watched weights, two of the watched features (`memory` says how many bytes).

    Args:
        model: a residual network, parametrized or not.
        probe: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device. A few samples do.
        every: `record` measures at steps divisible by this.
        layers: name patterns of weights to watch, or of modules that hold them, such as ``"*.fc1.weight"`` or
            ``"blocks.0.*"``; ``None`` watches all weight operations. Residual streams are always watched.
        device: where the reference weights and features are kept; ``None`` is beside the model.
        objective: model output -> scalar whose gradients are measured; the default is `probe.signed_sum`.
        writers: callables that get the new rows (a list of dicts) at each record; see `writers.py`.
        include: as in `find_branches`.
        exclude: as in `find_branches`.
        branches: as in `find_branches`.

    Raises:
        MeasurementError: the model has no branches, the probe is on another device or gives values that are not finite,
            ``every`` is not a positive integer, or a pattern in ``layers`` matches no weight operation.
        TracingError: the branches cannot be read off the forward pass.

    Source: arXiv 2512.21075 (own updates, forward-backward independence); arXiv 2203.03466, appendix D (coordinates).
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        *,
        every: int = 1,
        layers: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        objective: Callable[[Any], Tensor] = signed_sum,
        writers: Iterable[Callable[[list[Row]], Any]] = (),
        include: Sequence[Pattern] | Pattern | None = None,
        exclude: Sequence[Pattern] | Pattern | None = None,
        branches: Sequence[Pattern] | Pattern | None = None,
    ):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise MeasurementError(f"every must be a positive integer, the number of steps between records: {every!r}")
        self.every, self.writers, self.rows = every, list(writers), list[Row]()
        self.device = None if device is None else torch.device(device)
        self._probe: Probe | None = Probe(model, probe, objective, include=include, exclude=exclude, branches=branches)
        self.branches: tuple[Branch, ...] = self._probe.found.branches
        self._roles = roles(self.branches)
        self.plan: Plan | None = _plan(self._probe.model)
        self._patterns = [layers] if isinstance(layers, str) else layers
        self._weights: dict[str, Tensor] = {}
        self._first: dict[Feature, Tensor] = {}
        self._last: dict[Feature, Tensor] = {}
        self._keep_reference()
        self.start = self._sizes()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the watched weight operations, in forward order."""
        return tuple(self._weights)

    @property
    def memory(self) -> int:
        """Bytes held between records: reference weights, reference features and last features."""
        held = [*self._weights.values(), *self._first.values(), *self._last.values()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())

    def record(self, step: int) -> bool:
        """Measures, if ``step`` is divisible by ``every``. Returns whether it did.

        Raises:
            MeasurementError: the monitor is closed, or the network no longer runs the operations it ran at first.
        """
        if self._probe is None:
            raise MeasurementError("this monitor is closed. Make a new FeatureMonitor to go on")
        if step % self.every:
            return False
        rows = _Recording(self, self._probe).rows(step)
        self.rows += rows
        for write in self.writers:
            write(rows)
        return True

    def frame(self) -> Any:
        """All rows as a tidy pandas data frame with the columns `COLUMNS`."""
        return frame(self.rows, COLUMNS)

    def report(self, base: Any = None, family: str = "adam") -> Report:
        """The last record beside what the theory predicts, with findings in plain language.

        Args:
            base: the monitor of the run at the base depth; without it collapse and repair are judged by the rule alone.
            family: the optimizer's family, ``"sgd"`` or an Adam-like one, whose predicted exponents are shown.

        Returns:
            A `report.Report`: ``print`` it, or read its ``findings``, ``stages`` and ``streams``.

        Raises:
            MeasurementError: nothing was recorded yet.
        """
        base_rows = getattr(base, "rows", base)
        return report(self.rows, self.start, plan=self.plan, base=base_rows, family=family, memory=self.memory)

    def close(self) -> None:
        """Lets go of the model and of all reference tensors, and closes the writers. Rows stay readable."""
        self._probe = None
        for kept in (self._weights, self._first, self._last):
            kept.clear()
        for writer in self.writers:
            if callable(close := getattr(writer, "close", None)):
                close()
        self.writers = []

    def __enter__(self) -> FeatureMonitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Reference weights, features and rows, for going on in another process. ``torch.save`` takes it."""
        return {
            "format": FORMAT,
            "weights": dict(self._weights),
            "first": by_kind(self._first),
            "last": by_kind(self._last),
            "rows": [dict(row) for row in self.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken: the reference is the network of that run's beginning.

        Raises:
            MeasurementError: the state is of other layers or of another probe batch.
        """
        if state.get("format") != FORMAT:
            raise MeasurementError(f"this monitor state has format {state.get('format')!r}, expected {FORMAT}")
        kept: list[tuple[dict[Any, Tensor], dict[Any, Tensor]]] = [
            (self._weights, state["weights"]),
            (self._first, from_kinds(state["first"])),
            (self._last, from_kinds(state["last"])),
        ]
        for own, given in kept:
            wrong = [k for k in own.keys() | given.keys() if k not in own or k not in given]
            wrong += [k for k in own.keys() & given.keys() if own[k].shape != given[k].shape]
            if wrong:
                raise MeasurementError(
                    f"{min(map(self._label, wrong))}: the state is of another model, probe batch or choice of layers. "
                    "Make the monitor as in the run that wrote it"
                )
        for own, given in kept:
            own.update({key: value.to(own[key], copy=True) for key, value in given.items()})
        self.rows = [dict(row) for row in state["rows"]]
        self.start = self._sizes()

    def _sizes(self) -> Start:
        streams = {
            (branch.stream, branch.position): float(_rms(self._first[StreamAfter(i)]))
            for i, branch in enumerate(self.branches)
        }
        return Start(float(_rms(self._first[FUNCTION])), streams)

    def _keep_reference(self) -> None:
        assert self._probe is not None
        seen: list[str] = []
        copies: dict[tuple[Any, ...], Tensor] = {}

        def product(it: Product) -> bool:
            seen.append(it.name)
            if self._watched(it.name):
                view = (it.weight.data_ptr(), it.weight.shape, it.weight.stride())
                if view not in copies:
                    copies[view] = self._kept(it.weight)
                self._weights[it.name] = copies[view]
                self._first[Layer(it.name)] = self._kept(it.value)
            return self._watched(it.name)

        def stream(branch: int, value: Tensor, added: Tensor) -> None:
            self._first[StreamAfter(branch)] = self._kept(value)

        self._check_patterns()
        sights = self._probe.run(product, stream)
        self._first[FUNCTION] = self._kept(sights.output)
        missing = [branch.name for i, branch in enumerate(self.branches) if StreamAfter(i) not in self._first]
        if missing:
            raise MeasurementError(
                f"{missing[0]}: the branch was not there in a second pass on the same inputs. A network that changes "
                "from call to call cannot be watched; switch that off in evaluation mode"
            )
        for feature in [*map(Layer, seen), *map(StreamAfter, range(len(self.branches))), FUNCTION]:
            if feature in self._first and not self._first[feature].isfinite().all():
                raise MeasurementError(
                    f"{self._label(feature)}: not finite on the probe before any training step. Check the probe batch "
                    "and the initialization (rule 'mup' lets deep networks without normalisation overflow)"
                )
        for pattern in self._patterns or ():
            if not any(_fits(name, pattern) for name in self._weights):
                close = difflib.get_close_matches(pattern, seen, 3, 0.3)
                raise MeasurementError(
                    f"layers={pattern!r} matches no weight operation. "
                    + (f"Did you mean {' or '.join(map(repr, close))}?" if close else f"There are {', '.join(seen)}")
                )
        self._last = dict(self._first)

    def _check_patterns(self) -> None:
        for pattern in self._patterns or ():
            if not isinstance(pattern, str):
                raise MeasurementError(f"layers takes name patterns such as '*.fc1.weight', not {pattern!r}")

    def _watched(self, name: str) -> bool:
        return self._patterns is None or any(_fits(name, pattern) for pattern in self._patterns)

    def _kept(self, value: Tensor) -> Tensor:
        copy = value.detach().clone()  # what a view shares would change with training
        return copy if self.device is None else copy.to(self.device)

    def _label(self, key: Feature | str) -> str:
        match key:
            case StreamAfter(branch):
                return self.branches[branch].name
            case Layer(name):
                return name
            case Function():
                return "the model's output"
        return key  # a weight is known by its name


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern means a weight or a module around it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _plan(model: nn.Module) -> Plan | None:
    try:
        return plan_of(model)
    except PlanError:
        return None


class _Recording:
    """One record: numbers stay on the device until all are there."""

    def __init__(self, monitor: FeatureMonitor, probe: Probe):
        self.monitor, self.probe = monitor, probe
        self.parameters = dict(probe.model.named_parameters())  # anew: loading a state may replace them
        self.entries: list[tuple[Row, dict[str, Tensor]]] = []
        self.numbers: dict[Feature, dict[str, Tensor]] = {}
        self.initial: dict[Feature, Tensor] = {}  # W0 h of layers, h of streams, until the gradients are there
        self.now: dict[Feature, Tensor] = {}

    def rows(self, step: int) -> list[Row]:
        sights = self.probe.run(self._product, self._stream)
        monitor = self.monitor
        missing = [branch.name for i, branch in enumerate(monitor.branches) if StreamAfter(i) not in self.numbers]
        if missing:
            raise MeasurementError(
                f"{missing[0]}: it was there when the monitor was made and is not any more. A network that changes "
                "from call to call cannot be watched"
            )
        self._gradients(sights)
        self._update(FUNCTION, sights.output)
        self.entries.insert(0, (self._row(FUNCTION), self.numbers[FUNCTION]))
        monitor._last |= {k: v if monitor.device is None else v.to(monitor.device) for k, v in self.now.items()}
        flat = [value for _, numbers in self.entries for value in numbers.values()]
        wide = max((value.dtype for value in flat), key=lambda dtype: dtype.itemsize)  # some devices lack float64
        values = iter(torch.stack([v.to(flat[0].device, wide) for v in flat]).tolist())
        rows = []
        for row, numbers in self.entries:
            measured = {name: next(values) for name in numbers}
            rows.append({"step": step, **row, **{n: measured.get(n, math.nan) for n in NUMBERS}})
        return [{column: row[column] for column in COLUMNS} for row in rows]

    def _row(self, feature: Feature) -> Row:
        monitor = self.monitor
        row: Row = {"stream": -1, "branch": "", "position": -1, "additions": 0, "layer": "", "role": "outside"}
        row |= {"kind": "function", "folded": 1.0}
        index: int | None = None
        match feature:
            case StreamAfter(branch):
                index, row["kind"] = branch, "stream"
            case Layer(name):
                row |= {"kind": "layer", "layer": name}
                parameter = name.partition("#")[0]
                if parameter in monitor._roles:
                    index, row["role"] = monitor._roles[parameter]
                if monitor.plan is not None:
                    row["folded"] = monitor.plan[parameter].folded
        if index is not None:
            held = monitor.branches[index]
            row |= {"stream": held.stream, "branch": held.name, "position": held.position, "additions": held.additions}
        return row

    def _update(self, key: Feature, value: Tensor) -> Tensor:
        """Notes size, update and change of a feature; returns its update since initialization."""
        if value.shape != self.monitor._first[key].shape:
            raise MeasurementError(
                f"{self.monitor._label(key)}: it had another shape when the monitor was made. A network that changes "
                "from call to call cannot be watched"
            )
        update = value - self.monitor._first[key].to(value.device)
        change = value - self.monitor._last[key].to(value.device)
        self.numbers[key] = {"size": _rms(value), "update": _rms(update), "change": _rms(change)}
        self.now[key] = value.clone()  # what comes after may write over it
        return update

    def _stream(self, branch: int, value: Tensor, added: Tensor) -> None:
        key = StreamAfter(branch)
        self._update(key, value)
        self.numbers[key]["added"] = _rms(added)
        self.initial[key] = self.now[key]
        self.entries.append((self._row(key), self.numbers[key]))

    def _product(self, it: Product) -> bool:
        monitor = self.monitor
        if it.name not in monitor._weights:
            return False
        key = Layer(it.name)
        difference = it.weight - monitor._weights[it.name].to(it.weight.device)
        own = it.times(difference)
        initial = it.value - own
        if it.value.shape == monitor._first[key].shape:
            update = self._update(key, it.value)
        else:  # an expert that got other samples: what it learned itself is known, how its features moved is not
            self.numbers[key] = {"size": _rms(it.value)}
            update = torch.full_like(it.value, math.nan)
        numbers = self.numbers[key]
        numbers["own"], numbers["initial"], numbers["below"] = _rms(own), _rms(initial), _rms(update - own)
        wide = update.flatten().to(_wide(update))
        numbers["own_share"] = torch.dot(own.flatten().to(wide.dtype), wide) / torch.dot(wide, wide)
        numbers["weight"], numbers["weight_update"] = _norm(it.weight), _norm(difference)
        parameter = self.parameters.get(it.name.partition("#")[0])
        if parameter is not None and parameter.grad is not None:
            numbers["weight_gradient"] = _norm(parameter.grad)
        self.initial[key] = initial
        self.entries.append((self._row(key), numbers))
        return True

    def _gradients(self, sights: Sights) -> None:
        with torch.no_grad():
            gradients: dict[Feature, Tensor | None] = {Layer(n): g for n, g in sights.products.items()}
            gradients |= {StreamAfter(branch): g for branch, g in sights.streams.items()}
            for key, gradient in gradients.items():
                if gradient is not None:
                    self.numbers[key]["gradient"] = _rms(gradient)
                    self.numbers[key]["gradient_alignment"] = _cosine(self.initial[key], gradient)


def _wide(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _norm(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value, dtype=_wide(value))


def _rms(value: Tensor) -> Tensor:
    """The root of the mean square of all entries."""
    return _norm(value) / max(1, value.numel()) ** 0.5


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """The mean over the first dimension of the cosine between two tensors; 0 where one of them is zero."""
    a, b = a.to(_wide(a)).flatten(1), b.to(_wide(b)).flatten(1)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    products = (a * b).sum(1)
    return torch.where(norms > 0, products / norms, torch.zeros_like(norms)).mean()
