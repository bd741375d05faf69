"""Neural Feature Dynamics (arXiv 2512.21075): predict the training of very wide residual networks.

`simulate` trains the canonical network at any width without its matrices, `simulate_like` a user's own; `gia_gap`,
`infinite_depth`, `returns` and the closed forms say what follows; `CanonicalResNet` is the network as a module.
"""

from torch_depthmup.diagnostics.canonical import CanonicalResNet, Scales, Setting
from torch_depthmup.diagnostics.kernels import first_order_change, initial_kernels, tangent_kernel
from torch_depthmup.diagnostics.like import simulate_like
from torch_depthmup.diagnostics.limits import DepthLimit, Returns, infinite_depth, returns
from torch_depthmup.diagnostics.simulation import GIAGap, NFDResult, gia_gap, memory_estimate, simulate

__all__ = [
    "CanonicalResNet",
    "DepthLimit",
    "GIAGap",
    "NFDResult",
    "Returns",
    "Scales",
    "Setting",
    "first_order_change",
    "gia_gap",
    "infinite_depth",
    "initial_kernels",
    "memory_estimate",
    "returns",
    "simulate",
    "simulate_like",
    "tangent_kernel",
]
