"""The exceptions of torch_depthmup: one family, so that one ``except`` catches all of it.

Every message says what was found, where (module or parameter name), and what to write instead.
"""

__all__ = [
    "AmbiguousBranchError",
    "DepthMuPError",
    "DivergenceError",
    "MeasurementError",
    "OptimizerError",
    "PlanError",
    "TracingError",
    "ignores_depth",
    "ignores_width",
]


class DepthMuPError(ValueError):
    """Base class of all errors that torch_depthmup raises on purpose."""


class TracingError(DepthMuPError):
    """The model's residual branches cannot be read off one forward pass."""


class AmbiguousBranchError(TracingError):
    """An addition may or may not be residual; the message names the override to write."""


class PlanError(DepthMuPError):
    """Rule, base and model do not give a plan, or a plan does not fit a model."""


class MeasurementError(DepthMuPError):
    """A branch, measured after the act, is not the planned multiple of what it was."""


class DivergenceError(DepthMuPError):
    """Training left the finite numbers: the learning rate is too large."""


class OptimizerError(DepthMuPError):
    """An optimizer cannot be given the plan's multipliers."""


def ignores_width(one: int, other: int) -> str:
    """What to say of a factory whose parameters have the same shapes at two widths."""
    return (
        f"the factory gives parameters of the same shapes at width {one} and at width {other}: it ignores width. Let "
        "its second argument set the size of the layers, or leave widths out"
    )


def ignores_depth(branches: int, one: int, other: int) -> str:
    """What to say of a factory that builds equally many branches at two depths."""
    return (
        f"the factory gives {branches} residual branches at depth {one} and at depth {other}: it ignores depth. Let it "
        "build as many blocks as its first argument says"
    )
