"""Neural Feature Dynamics (arXiv 2512.21075): predict the training of very wide residual networks.

`simulate` trains the canonical network at any width without its matrices; `predict` trains a model of yours in the
same way, by your own code, and `implicit_model` gives that model; `simulate_like` is for MLPs of the canonical form.
`sweep` predicts learning rates; `gia_gap`, `infinite_depth`, `returns` and the closed forms say what follows;
`CanonicalResNet` is a module.
"""

from torch_depthmup.diagnostics.nfd import algebra, products  # noqa: F401  they fill a table of operations
from torch_depthmup.diagnostics.nfd.building import implicit_model
from torch_depthmup.diagnostics.nfd.gains import Gains
from torch_depthmup.diagnostics.nfd.gia import GIAGap, gia_gap
from torch_depthmup.diagnostics.nfd.kernels import first_order_change, initial_kernels, tangent_kernel
from torch_depthmup.diagnostics.nfd.like import simulate_like
from torch_depthmup.diagnostics.nfd.limits import DepthLimit, Returns, infinite_depth, returns
from torch_depthmup.diagnostics.nfd.network import CanonicalResNet
from torch_depthmup.diagnostics.nfd.predict import Prediction, predict
from torch_depthmup.diagnostics.nfd.rates import sweep
from torch_depthmup.diagnostics.nfd.result import NFDResult
from torch_depthmup.diagnostics.nfd.setting import Scales, Setting
from torch_depthmup.diagnostics.nfd.simulate import memory_estimate, simulate

__all__ = [
    "CanonicalResNet",
    "DepthLimit",
    "GIAGap",
    "Gains",
    "NFDResult",
    "Prediction",
    "Returns",
    "Scales",
    "Setting",
    "first_order_change",
    "gia_gap",
    "implicit_model",
    "infinite_depth",
    "initial_kernels",
    "memory_estimate",
    "predict",
    "returns",
    "simulate",
    "simulate_like",
    "sweep",
    "tangent_kernel",
]
