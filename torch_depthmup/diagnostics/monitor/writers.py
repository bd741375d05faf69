"""Where a monitor's rows go: pandas, CSV, JSON lines, TensorBoard. Any callable that takes a list of dicts will do."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["CSVWriter", "JSONLinesWriter", "TensorBoardWriter"]

Row = dict[str, Any]


class _FileWriter:
    """Opens its file at the first rows, appends, and flushes after each record, so that a killed run loses nothing."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._file: Any = None

    def _open(self) -> Any:
        if self._file is None:
            self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115  closed by close()
        return self._file

    def close(self) -> None:
        """Closes the file. A later record opens it again and appends."""
        if self._file is not None:
            self._file.close()
            self._file = None


class CSVWriter(_FileWriter):
    """Appends rows to a CSV file; writes the header where the file is new or empty.

    Args:
        path: the file.
    """

    def __call__(self, rows: Sequence[Row]) -> None:
        file = self._open()
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()


class JSONLinesWriter(_FileWriter):
    """Appends one JSON object a row; numbers that are not finite become ``null``, as JSON has no word for them.

    Args:
        path: the file.
    """

    def __call__(self, rows: Sequence[Row]) -> None:
        file = self._open()
        for row in rows:
            file.write(json.dumps({key: _json(value) for key, value in row.items()}) + "\n")
        file.flush()


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


SHOWN = ("size", "update", "own", "gradient_alignment", "gradient")


class TensorBoardWriter:
    """Writes each number as a scalar ``<quantity>/<branch or layer>`` to a TensorBoard writer.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar(tag, value, step)``. It
            stays open: who made it closes it.
        quantities: the columns to write.
    """

    def __init__(self, writer: Any, quantities: Iterable[str] = SHOWN):
        self.writer, self.quantities = writer, tuple(quantities)

    def __call__(self, rows: Sequence[Row]) -> None:
        for row in rows:
            where = row["layer"] or (f"{row['branch'] or 'model'}.{row['kind']}")
            for quantity in self.quantities:
                if not math.isnan(row[quantity]):
                    self.writer.add_scalar(f"{quantity}/{where}", row[quantity], row["step"])
