"""Momentum teachers: parts of a model that are copies of another part, follow its values, and are not trained.

The student's multipliers go into what is copied, so a teacher without them would compute another function.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from torch_depthmup.errors import PlanError
from torch_depthmup.running import number_of
from torch_depthmup.scaling.plan import Copy, Hook, PlannedParameter
from torch_depthmup.tracing.branches import Trace, roles
from torch_depthmup.tracing.choosing import above

__all__ = ["copied", "find_copies", "refuse_unequal", "scaled_as_originals"]


def find_copies(model: nn.Module, found: Trace) -> tuple[Copy, ...]:
    """The largest parts of a model that train nothing and hold the values of a part that does.

    Nothing of them is trained: they are frozen, or the gradient does not reach them. On ``meta``, without values, a
    part of the same names and shapes counts as a copy where its branches, or the lack of a gradient, tell so.
    """
    known = {name: parameter for name, parameter in model.named_parameters()}
    inside: dict[str, list[str]] = {path: [] for path, _ in model.named_modules() if path}
    for name in known:
        for path in above(name):
            inside[path].append(name)
    still = {name for name, parameter in known.items() if not parameter.requires_grad or name not in found.reached}
    streams = {name: found.branches[i].stream for name, (i, _) in roles(found.branches).items()}
    originals: dict[tuple[tuple[str, tuple[int, ...]], ...], list[str]] = {}
    for path, names in inside.items():
        if names and any(known[name].requires_grad and name in found.reached for name in names):
            originals.setdefault(_structure(path, names, known), []).append(path)
    copies: list[Copy] = []
    settled: list[str] = []
    for path, names in inside.items():
        if not names or not set(names) <= still or any(path.startswith(f"{outer}.") for outer in settled):
            continue
        if all(known[name].ndim < 2 for name in names):
            continue  # fresh gains and biases are alike everywhere
        # A block of the stream that the other is in is no copy of it, though it may have been made as one.
        like = [
            other
            for other in originals.get(_structure(path, names, known), ())
            if not {streams.get(n) for n in names} & {streams.get(n) for n in inside[other]} - {None}
        ]
        if same := [other for other in like if _are_equal(known, names, inside[other], streams, found)]:
            copies.append(Copy(path, same[0]))
        elif unlike := [other for other in like if _holds_a_stream(inside[other], streams)]:
            if not any(known[name].requires_grad for name in names):  # else it may just not be used
                _warn_unequal(path, unlike[0])
        else:
            continue
        settled.append(path)
    return tuple(copies)


def _are_equal(
    known: Mapping[str, Tensor], names: Sequence[str], others: Sequence[str], streams: Mapping[str, int], found: Trace
) -> bool:
    if any(known[name].is_meta for name in names):
        return not set(names) & found.reached or any(name in streams for name in others)
    return all(_equal(known[a], known[b]) for a, b in zip(names, others, strict=True))


def _holds_a_stream(names: Collection[str], streams: Mapping[str, int]) -> bool:
    """Whether all branches of a residual stream are among these parameters: a network, not a block."""
    touched = {streams[name] for name in names if name in streams}
    return any(all(name in names for name, stream in streams.items() if stream == each) for each in touched)


def _structure(path: str, names: Sequence[str], known: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name.removeprefix(path), tuple(known[name].shape)) for name in names)


def _equal(a: Tensor, b: Tensor) -> bool:
    return number_of(torch.linalg.vector_norm((a.detach() - b.detach()).abs().float())) == 0


def _warn_unequal(path: str, original: str) -> None:
    warnings.warn(
        f"{path} is built as {original} is, trains nothing, and has other values: it is left alone. If it follows "
        f"{original} (a momentum teacher), load {original}'s values into it before dm.parametrize",
        UserWarning,
        stacklevel=5,
    )


def copied(name: str, copies: Iterable[Copy]) -> str | None:
    """The parameter or module whose copy this is, or ``None``."""
    for copy in copies:
        if f"{name}.".startswith(f"{copy.name}."):
            return copy.of + name.removeprefix(copy.name)
    return None


def scaled_as_originals(
    entries: Sequence[PlannedParameter], hooks: Sequence[Hook], copies: Sequence[Copy], reached: Iterable[str]
) -> tuple[list[PlannedParameter], tuple[Hook, ...]]:
    """Entries and hooks with those of the copies that the gradient does not reach, after their originals."""
    known, seen = {entry.name: entry for entry in entries}, set(reached)
    mirrored = []
    for entry in entries:
        original = copied(entry.name, copies)
        if original is not None and entry.name not in seen:
            entry = replace(known[original], name=entry.name, reason=f"a copy of {original}: scaled as it is")
        elif original is not None:
            entry = replace(entry, reason=f"{entry.reason}; a copy of {original}: scaled as it is")
        mirrored.append(entry)
    hung = list(hooks)
    hooked = {hook.module for hook in hooks}
    for copy in copies:
        for hook in hooks:
            if f"{hook.module}.".startswith(f"{copy.of}."):
                module = copy.name + hook.module.removeprefix(copy.of)
                hung += [replace(hook, module=module, is_copy=True)] if module not in hooked else []
    return mirrored, tuple(hung)


def refuse_unequal(model: nn.Module, copies: Iterable[Copy]) -> None:
    """Refuses copies, planned on ``meta``, that have other values than their originals.

    Raises:
        PlanError: names the first.
    """
    known = dict(model.named_parameters())
    for copy in copies:
        for name in (name for name in known if copy.name in above(name)):
            original = copied(name, [copy])
            assert original is not None
            if not _equal(known[name], known[original]):
                raise PlanError(
                    f"{copy.name} was planned as a copy of {copy.of}, built as it is and not trained, and {name} has "
                    f"other values. Load {copy.of}'s values into it before dm.apply"
                )
