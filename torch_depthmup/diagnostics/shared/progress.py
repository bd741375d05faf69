"""A bar with the time left, for what takes minutes: on standard error, and only where somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch_depthmup.diagnostics.shared.extras import needs

__all__ = ["bar"]


@contextmanager
def bar(what: str, total: int, done: int = 0, *, show: bool) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each of ``total`` pieces of work. The bar disappears at the end.

    Args:
        what: a word before the bar.
        total: how many pieces there are.
        done: how many of them were done before.
        show: ``False`` shows nothing; a standard error that is neither a terminal nor a notebook shows nothing either.

    Raises:
        ImportError: a bar is wanted and rich is not installed.
    """
    console = needs("rich.console").Console(stderr=True) if show else None
    if console is None or not (console.is_terminal or console.is_jupyter):
        yield lambda: None
        return
    progress = needs("rich.progress")
    columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    with progress.Progress(*columns, transient=True, console=console) as shown:
        task = shown.add_task(what, total=total, completed=done)
        yield lambda: shown.advance(task)
