"""Learning rates that transfer in depth, for any residual network in PyTorch."""

from torch_depthmup import diagnostics
from torch_depthmup.clipping import clip_grad_norm_, clip_grad_value_
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.modules import Residual
from torch_depthmup.optim import SGD, Adam, AdamW, Muon, optimizer, rescale
from torch_depthmup.rules import Rule
from torch_depthmup.scaling.apply import apply, attach, parametrize, undo
from torch_depthmup.scaling.bake import bake, convert_state_dict
from torch_depthmup.scaling.plan import Plan
from torch_depthmup.scaling.planning import plan
from torch_depthmup.scaling.registry import plan_of
from torch_depthmup.schedules import per_group, set_lr, unscaled
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
    "apply",
    "attach",
    "bake",
    "clip_grad_norm_",
    "clip_grad_value_",
    "convert_state_dict",
    "diagnostics",
    "find_branches",
    "optimizer",
    "parametrize",
    "per_group",
    "plan",
    "plan_of",
    "rescale",
    "set_lr",
    "undo",
    "unscaled",
]
