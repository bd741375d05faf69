"""Instruments: what a network's features do, beside what the theory predicts. Imported when they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_depthmup.diagnostics import comparison, nfd, plots
    from torch_depthmup.diagnostics.coordinates import coordinate_check
    from torch_depthmup.diagnostics.monitor import FeatureMonitor
    from torch_depthmup.diagnostics.transfer import transfer_sweep

__all__ = ["FeatureMonitor", "comparison", "coordinate_check", "nfd", "plots", "transfer_sweep"]

_HOMES = {"FeatureMonitor": "monitor", "coordinate_check": "coordinates", "transfer_sweep": "transfer"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module
