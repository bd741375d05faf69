"""Instruments: what a network's features do, beside what the theory predicts. Imported when they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_depthmup.diagnostics import nfd as nfd
    from torch_depthmup.diagnostics import plots as plots
    from torch_depthmup.diagnostics.coordinates.check import coordinate_check
    from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
    from torch_depthmup.diagnostics.nfd import comparison
    from torch_depthmup.diagnostics.transfer.sweep import transfer_sweep

__all__ = ["FeatureMonitor", "comparison", "coordinate_check", "nfd", "plots", "transfer_sweep"]

_MODULES = {"nfd": "nfd", "plots": "plots", "comparison": "nfd.comparison"}
_MEMBERS = {
    "FeatureMonitor": "monitor.recording",
    "coordinate_check": "coordinates.check",
    "transfer_sweep": "transfer.sweep",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name in _MEMBERS:
        return getattr(importlib.import_module(f"{__name__}.{_MEMBERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
