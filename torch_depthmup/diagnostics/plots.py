"""Every figure: of monitored runs and coordinate checks, of learning-rate sweeps and of Neural Feature Dynamics.

Each takes what an instrument returned and gives a matplotlib figure with ``savefig``, in the inks of ``rcParams``.
"""

from torch_depthmup.diagnostics.coordinates.figures import coordinate_figure
from torch_depthmup.diagnostics.monitor.figures import initial_figure, monitor_figure
from torch_depthmup.diagnostics.nfd.figures import comparison_figure, simulation_figure
from torch_depthmup.diagnostics.transfer.figures import drift_figure, transfer_figure

__all__ = [
    "comparison_figure",
    "coordinate_figure",
    "drift_figure",
    "initial_figure",
    "monitor_figure",
    "simulation_figure",
    "transfer_figure",
]
