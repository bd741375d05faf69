"""Whether an initialization has scaled the residual branches with depth before a rule does.

GPT-2, nanoGPT and Megatron start the last weights of a branch smaller by the root of the number of layers. A multiplier
that is measured to be right then comes on top of another one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from torch_depthmup.plan import Stream
from torch_depthmup.rules import Rule
from torch_depthmup.tracing import Branch

__all__ = ["depth_exponent", "warn_of_shrinking"]

DEEPER = 1.5  # depth ratios below this say nothing about exponents
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
        if not rule.alpha or stream.ratio < DEEPER:
            continue
        carriers = _carriers(branches, number, ours)
        exponent = depth_exponent(
            list(carriers.values()), list(_carriers(base_branches, number, theirs).values()), stream
        )
        if exponent < SHRINKS:
            warnings.warn(
                f"{next(iter(carriers))}: its initial size falls with depth already, as depth^{exponent:.2f} from the "
                f"base's (GPT-2's initialization does so), and {rule.name}'s multiplier "
                f"{rule.branch_multiplier(stream.ratio):.3g} comes on top: branches start smaller than the rule says. "
                "Initialise them alike at every depth, then parametrize",
                UserWarning,
                stacklevel=4,
            )


def depth_exponent(carriers: Sequence[Tensor], base_carriers: Sequence[Tensor], stream: Stream) -> float:
    """With which power of depth initial carriers grow from those of the base: 0 where depth was not thought of.

    Args:
        carriers: of a stream, any shapes. Fan-in initialization of matrices does not count as a change with width.
        base_carriers: of the same stream in the base.
        stream: deeper than its base.

    Returns:
        The exponent; nan where carriers start at zero or have no values.
    """
    levels = []
    for group in (carriers, base_carriers):
        if not group or any(carrier.is_meta for carrier in group):
            return math.nan
        sizes = [float(c.detach().float().norm()) / c.numel() ** (0.25 if c.ndim > 1 else 0.5) for c in group]
        if min(sizes) == 0:
            return math.nan
        levels.append(sum(map(math.log, sizes)) / len(sizes))
    return (levels[0] - levels[1]) / math.log(stream.ratio)


def _carriers(branches: Sequence[Branch], stream: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without biases, which start small or at zero of themselves."""
    names = [name for branch in branches if branch.stream == stream for name in branch.carrier]
    return {name: parameters[name] for name in names if name in parameters and not name.endswith("bias")}
