"""Every figure: of monitored runs and coordinate checks, of learning-rate sweeps.

Each takes what an instrument returned and gives a matplotlib figure with ``savefig``, in the inks of ``rcParams``.
"""

from torch_depthmup.diagnostics.coordinates.figures import coordinate_figure
from torch_depthmup.diagnostics.monitor.figures import initial_figure, monitor_figure
from torch_depthmup.diagnostics.transfer.figures import drift_figure, transfer_figure

__all__ = ["coordinate_figure", "drift_figure", "initial_figure", "monitor_figure", "transfer_figure"]
