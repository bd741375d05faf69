"""Learning rates that transfer in depth, for any residual network in PyTorch."""

from torch_depthmup import diagnostics
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.modules import Residual
from torch_depthmup.optim import SGD, Adam, AdamW, Muon, optimizer, per_group, rescale
from torch_depthmup.rules import Rule
from torch_depthmup.scaling.apply import parametrize, undo
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.scaling.registry import plan_of
from torch_depthmup.tracing.branches import Branch, find_branches

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Branch",
    "DepthMuPError",
    "Muon",
    "Plan",
    "Residual",
    "Rule",
    "diagnostics",
    "find_branches",
    "optimizer",
    "parametrize",
    "per_group",
    "plan_of",
    "rescale",
    "undo",
]
