"""Whether an initialization has scaled the residual branches with depth before a rule does.

GPT-2, nanoGPT and Megatron start the last weights of a branch smaller by the root of the number of layers. A multiplier
that is measured to be right then comes on top of another one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from torch_depthmup.rules import Rule
from torch_depthmup.running import without_numbers
from torch_depthmup.scaling.plan import Stream
from torch_depthmup.tracing.branches import Branch

__all__ = ["depth_exponent", "warn_of_shrinking"]

DEEPER = 1.5  # depth ratios below this say nothing about exponents
ERROR = 0.08  # of an exponent from random entries: three of these lie between 0 and what counts as shrinking
SHRINKS = -0.25  # halfway between an initialization that does not know the depth and one that divides by its root


def warn_of_shrinking(
    model: nn.Module,
    branches: Sequence[Branch],
    base: nn.Module,
    base_branches: Sequence[Branch],
    streams: Sequence[Stream],
    rule: Rule,
) -> None:
    """Warns, from the caller's caller, where the carriers of a stream start smaller than its base's.

    Args:
        model: freshly initialized.
        branches: of the model.
        base: freshly initialized too, or on ``meta``, which has no sizes.
        base_branches: of the base.
        streams: the model's, in the order of their numbers.
        rule: what is about to be carried out.
    """
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    for number, stream in enumerate(streams):
        if not rule.alpha or stream.depth_multiplier < DEEPER:
            continue
        kinds, base_kinds = _kinds(branches, number, ours), _kinds(base_branches, number, theirs)
        for kind in (kind for kind in kinds if kind in base_kinds):
            exponent = depth_exponent(list(kinds[kind].values()), list(base_kinds[kind].values()), stream)
            if exponent < SHRINKS:
                _warn(next(iter(kinds[kind])), exponent, rule, stream)
                break  # once is enough


def _warn(name: str, exponent: float, rule: Rule, stream: Stream) -> None:
    multiplier = f"{rule.branch_multiplier(stream.depth_multiplier):.3g}"
    warnings.warn(
        f"{name}: its initial size falls with depth already, as depth^{exponent:.2f} from the base's (GPT-2's "
        f"initialization does so), and {rule.name}'s multiplier {multiplier} comes on top: branches start smaller than "
        "the rule says. Initialise them alike at every depth, then parametrize",
        UserWarning,
        stacklevel=5,
    )


def depth_exponent(carriers: Sequence[Tensor], base_carriers: Sequence[Tensor], stream: Stream) -> float:
    """With which power of depth initial carriers grow from those of the base: 0 where depth was not thought of.

    Args:
        carriers: of a stream and of one kind, any shapes. Fan-in initialization of matrices does not count as a change
            with width.
        base_carriers: of the same stream and kind in the base.
        stream: deeper than its base.

    Returns:
        The exponent; nan where carriers start at zero, have no values, or too few random ones to tell.
    """
    levels, variance = [], 0.0
    for group in (carriers, base_carriers):
        if not group or any(carrier.is_meta for carrier in group):
            return math.nan
        sizes = [float(c.detach().float().norm()) / c.numel() ** (0.25 if c.ndim > 1 else 0.5) for c in group]
        if min(sizes) == 0:
            return math.nan
        levels.append(sum(map(math.log, sizes)) / len(sizes))
        if group[0].ndim > 1:  # gains start at one and the same value
            variance += 1 / (2 * sum(carrier.numel() for carrier in group))  # of the log size of normal entries
    if math.sqrt(variance) > ERROR * math.log(stream.depth_multiplier):
        return math.nan
    return (levels[0] - levels[1]) / math.log(stream.depth_multiplier)


def _kinds(branches: Sequence[Branch], stream: int, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Carriers by their names without numbers; no biases, which start small or at zero of themselves."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name in (name for branch in branches if branch.stream == stream for name in branch.carrier):
        if name in parameters and not name.endswith("bias"):
            kinds.setdefault(without_numbers(name), {})[name] = parameters[name]
    return kinds
