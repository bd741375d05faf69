"""Watches feature learning while a network trains: what moved, what arrived from below, what each layer learned itself.

The measuring pass is in `probe.py`, the words in `report.py`, files in `writers.py`.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_depthmup.diagnostics.monitor.probe import Key, Kind, Probe, Product, Sights, signed_sum
from torch_depthmup.diagnostics.monitor.report import Report, base_rows, report
from torch_depthmup.diagnostics.shared.arguments import positive_integer
from torch_depthmup.diagnostics.shared.content import content_digest
from torch_depthmup.diagnostics.shared.extras import frame
from torch_depthmup.errors import MeasurementError, PlanError
from torch_depthmup.rules import get_family
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.scaling.registry import plan_of
from torch_depthmup.tracing.branches import Branch, Pattern, roles

if TYPE_CHECKING:
    import pandas

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
    "start",
    "size",
    "update",
    "change",
    "own",
    "initial",
    "below",
    "own_share",
    "spread",
    "added",
    "gradient_alignment",
    "gradient",
    "weight",
    "weight_update",
    "weight_gradient",
    "folded",
)
"""Columns of the tidy frame, described at `FeatureMonitor`."""

NUMBERS = COLUMNS[COLUMNS.index("start") : COLUMNS.index("folded")]
Row = dict[str, Any]
FORMAT = 2
FUNCTION = Key(Kind.FUNCTION)


class FeatureMonitor:
    """Evaluates a probe batch now and then, and stores sizes of features, updates and gradients per branch and layer.

    The initial network is the one given here: construct the monitor before the first training step (and after
    `parametrize`). Recording leaves mode, buffers, random states, gradients, hooks and autocast as they were. The probe
    runs in evaluation mode without the caller's autocast, with the batch's own statistics in batch norms; a compiled
    model is run eagerly.

    Sizes are root mean squares over all entries; ``start`` is a feature's size at initialization. Each
    record appends rows of three kinds to `rows`:

    - ``"function"``: the main output. ``size``, ``update`` since initialization, ``change`` since the last record.
    - ``"stream"``: the sum h after a residual addition. Besides these ``spread`` (the share of the size that differs
      between samples), ``added`` (the branch's value), ``gradient`` (of the objective, at h) and
      ``gradient_alignment``: the mean over the first dimension of the cosine of h and its gradient.
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

    >>> import torch, torch_depthmup as dm
    >>> model = torch.nn.Sequential(*[dm.Residual(torch.nn.Linear(8, 8)) for _ in range(4)])
    >>> monitor = FeatureMonitor(model, probe=torch.ones(2, 8), every=10)
    >>> monitor.record(0), monitor.record(1), monitor.record(10)
    (True, False, True)
    >>> monitor.layers[0], len(monitor.rows)  # the function, four streams and four layers, twice
    ('0.branch.weight', 18)
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
        self.every = positive_integer("every", every)
        self.writers, self.rows = list(writers), list[Row]()
        self.device = None if device is None else torch.device(device)
        self._probe: Probe | None = Probe(model, probe, objective, include=include, exclude=exclude, branches=branches)
        self._digest = content_digest(probe)
        self.branches: tuple[Branch, ...] = self._probe.found.branches
        self._roles = roles(self.branches)
        self.plan: Plan | None = _plan(self._probe.model)
        self._patterns = [layers] if isinstance(layers, str) else layers
        self._weights: dict[Key, Tensor] = {}
        self._first: dict[Key, Tensor] = {}
        self._last: dict[Key, Tensor] = {}
        self._keep_reference()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the watched weight operations, in forward order."""
        return tuple(map(str, self._weights))

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

    def frame(self) -> pandas.DataFrame:
        """All rows as a tidy pandas data frame with the columns `COLUMNS`."""
        return frame(self.rows, COLUMNS)

    def report(self, base: Any = None, family: str = "adam", prediction: Any = None) -> Report:
        """The last record beside what the theory predicts, with findings in plain language.

        Args:
            base: the monitor of the run at the base depth, or its data frame; without it nothing is said about what
                depth does to the layers' learning, except what the rule predicts.
            family: the optimizer's family, ``"sgd"`` or an Adam-like one, whose predicted exponents are shown.
            prediction: from `nfd.predict(..., probe=...)` of the same network at its width, on the same probe: what
                each layer learned beside what it should have, with a verdict.

        Returns:
            A `report.Report`: ``print`` it, or read its ``findings``, ``stages`` and ``streams``.

        Raises:
            MeasurementError: nothing was recorded yet, or the prediction is of other steps or layers, or not watched.
        """
        predicted = None if prediction is None else prediction.rows
        return report(self.rows, self.plan, base_rows(base), get_family(family), predicted)

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
            "probe": self._digest,
            "weights": _plain(self._weights),
            "first": _plain(self._first),
            "last": _plain(self._last),
            "rows": [dict(row) for row in self.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken: the reference is the network of that run's beginning.

        Raises:
            MeasurementError: the state is of other layers or of another probe batch.
        """
        if state.get("format") != FORMAT:
            raise MeasurementError(f"this monitor state has format {state.get('format')!r}, expected {FORMAT}")
        given = {name: _keyed(state[name]) for name in ("weights", "first", "last")}
        kept = {"weights": self._weights, "first": self._first, "last": self._last}
        for name, own in kept.items():
            wrong = [k for k in own.keys() | given[name].keys() if k not in own or k not in given[name]]
            wrong += [k for k in own.keys() & given[name].keys() if own[k].shape != given[name][k].shape]
            if wrong:
                raise MeasurementError(
                    f"{min(map(self._label, wrong))}: the state is of another model, probe batch or choice of layers. "
                    "Make the monitor as in the run that wrote it"
                )
        if state["probe"] != self._digest:
            raise MeasurementError(
                "the state was recorded on another probe batch, whose features cannot be compared with those of this "
                "one. Make the monitor with the probe of the run that wrote it"
            )
        for name, own in kept.items():
            own.update({k: value.to(own[k], copy=True) for k, value in given[name].items()})
        self.rows = [dict(row) for row in state["rows"]]

    def _keep_reference(self) -> None:
        assert self._probe is not None
        seen: list[Key] = []
        copies: dict[tuple[Any, ...], Tensor] = {}

        def product(it: Product) -> bool:
            seen.append(it.key)
            if self._watched(it.key):
                view = (it.weight.data_ptr(), it.weight.shape, it.weight.stride())
                if view not in copies:
                    copies[view] = self._kept(it.weight)
                self._weights[it.key] = copies[view]
                self._first[it.key] = self._kept(it.value)
            return self._watched(it.key)

        def stream(branch: int, value: Tensor, added: Tensor) -> None:
            self._first[_stream(branch)] = self._kept(value)

        self._check_patterns()
        sights = self._probe.run(product, stream)
        self._first[FUNCTION] = self._kept(sights.output)
        missing = [branch.name for i, branch in enumerate(self.branches) if _stream(i) not in self._first]
        if missing:
            raise MeasurementError(
                f"{missing[0]}: the branch was not there in a second pass on the same inputs. A network that changes "
                "from call to call cannot be watched; switch that off in evaluation mode"
            )
        for key in [*seen, *map(_stream, range(len(self.branches))), FUNCTION]:
            if key in self._first and not self._first[key].isfinite().all():
                raise MeasurementError(
                    f"{self._label(key)}: not finite on the probe before any training step. Check the probe batch and "
                    "the initialization (rule 'mup' lets deep networks without normalisation overflow)"
                )
        for pattern in self._patterns or ():
            if not any(_fits(str(key), pattern) for key in self._weights):
                names = list(map(str, seen))
                close = difflib.get_close_matches(pattern, names, 3, 0.3)
                raise MeasurementError(
                    f"layers={pattern!r} matches no weight operation. "
                    + (f"Did you mean {' or '.join(map(repr, close))}?" if close else f"There are {', '.join(names)}")
                )
        self._last = dict(self._first)

    def _check_patterns(self) -> None:
        for pattern in self._patterns or ():
            if not isinstance(pattern, str):
                raise MeasurementError(f"layers takes name patterns such as '*.fc1.weight', not {pattern!r}")

    def _watched(self, key: Key) -> bool:
        return self._patterns is None or any(_fits(str(key), pattern) for pattern in self._patterns)

    def _kept(self, value: Tensor) -> Tensor:
        copy = value.detach().clone()  # what a view shares would change with training
        return copy if self.device is None else copy.to(self.device)

    def _label(self, key: Key) -> str:
        if key.kind is Kind.FUNCTION:
            return "the model's output"
        return self.branches[key.number].name if key.kind is Kind.STREAM else str(key)


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern means a weight or a module around it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _stream(branch: int) -> Key:
    return Key(Kind.STREAM, number=branch)


def _plain(kept: dict[Key, Tensor]) -> dict[tuple[str, str, int], Tensor]:
    """With keys that ``torch.load(weights_only=True)`` reads."""
    return {(key.kind.value, key.name, key.number): value for key, value in kept.items()}


def _keyed(plain: dict[tuple[str, str, int], Tensor]) -> dict[Key, Tensor]:
    return {Key(Kind(kind), name, number): value for (kind, name, number), value in plain.items()}


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
        self.numbers: dict[Key, dict[str, Tensor]] = {}
        self.initial: dict[Key, Tensor] = {}  # W0 h of layers, h of streams, until the gradients are there
        self.now: dict[Key, Tensor] = {}

    def rows(self, step: int) -> list[Row]:
        sights = self.probe.run(self._product, self._stream)
        monitor = self.monitor
        missing = [branch.name for i, branch in enumerate(monitor.branches) if _stream(i) not in self.numbers]
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

    def _row(self, key: Key) -> Row:
        monitor = self.monitor
        row: Row = {"stream": -1, "branch": "", "position": -1, "additions": 0, "layer": "", "role": "outside"}
        row |= {"kind": key.kind.value, "folded": 1.0}
        index = key.number if key.kind is Kind.STREAM else None
        if key.kind is Kind.LAYER:
            row["layer"] = str(key)
            if key.name in monitor._roles:
                index, row["role"] = monitor._roles[key.name]
            if monitor.plan is not None:
                row["folded"] = monitor.plan[key.name].folded
        if index is not None:
            branch = monitor.branches[index]
            row |= {
                "stream": branch.stream,
                "branch": branch.name,
                "position": branch.position,
                "additions": branch.additions,
            }
        return row

    def _update(self, key: Key, value: Tensor) -> Tensor:
        """Notes size, update and change of a feature; returns its update since initialization."""
        if value.shape != self.monitor._first[key].shape:
            raise MeasurementError(
                f"{self.monitor._label(key)}: it had another shape when the monitor was made. A network that changes "
                "from call to call cannot be watched"
            )
        update = value - self.monitor._first[key].to(value.device)
        change = value - self.monitor._last[key].to(value.device)
        start = _rms(self.monitor._first[key]).to(value.device)
        self.numbers[key] = {"start": start, "size": _rms(value), "update": _rms(update), "change": _rms(change)}
        self.now[key] = value.clone()  # what comes after may write over it
        return update

    def _stream(self, branch: int, value: Tensor, added: Tensor) -> None:
        key = _stream(branch)
        self._update(key, value)
        self.numbers[key]["added"] = _rms(added)
        if len(value) > 1:
            self.numbers[key]["spread"] = _rms(value - value.mean(0)) / _rms(value)
        self.initial[key] = self.now[key]
        self.entries.append((self._row(key), self.numbers[key]))

    def _product(self, it: Product) -> bool:
        monitor = self.monitor
        if it.key not in monitor._weights:
            return False
        difference = it.weight - monitor._weights[it.key].to(it.weight.device)
        own = it.times(difference)
        initial = it.value - own
        if it.value.shape == monitor._first[it.key].shape:
            update = self._update(it.key, it.value)
        else:  # an expert that got other samples: what it learned itself is known, how its features moved is not
            self.numbers[it.key] = {"size": _rms(it.value)}
            update = torch.full_like(it.value, math.nan)
        numbers = self.numbers[it.key]
        numbers["own"], numbers["initial"], numbers["below"] = _rms(own), _rms(initial), _rms(update - own)
        wide = update.flatten().to(_wide(update))
        numbers["own_share"] = torch.dot(own.flatten().to(wide.dtype), wide) / torch.dot(wide, wide)
        numbers["weight"], numbers["weight_update"] = _norm(it.weight), _norm(difference)
        parameter = self.parameters.get(it.key.name)
        if parameter is not None and parameter.grad is not None:
            numbers["weight_gradient"] = _norm(parameter.grad)
        self.initial[it.key] = initial
        self.entries.append((self._row(it.key), numbers))
        return True

    def _gradients(self, sights: Sights) -> None:
        with torch.no_grad():
            for key, gradient in sights.gradients.items():
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
