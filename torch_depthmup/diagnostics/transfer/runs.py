"""A run, and the file of finished runs that a sweep takes up again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from torch_depthmup.errors import DepthMuPError

try:
    import fcntl
except ImportError:  # Windows has no such locks: two sweeps on one file are then the caller's affair
    fcntl = None  # type: ignore[assignment]

__all__ = ["Job", "Run", "appending", "finished"]


def finished(path: str | Path | None, jobs: Iterable[Job], fingerprint: str) -> dict[Job, Run]:
    """The runs of this grid that a file holds. A last line that was cut off is not one."""
    if path is None or not Path(path).exists():
        return {}
    lines = Path(path).read_text().split("\n")[:-1]
    if not lines:
        return {}
    if lines[0] != _header(fingerprint):
        what = "runs of another model, training, data or base depth" if lines[0].startswith(HEADER) else "no sweep"
        raise DepthMuPError(f"{path} holds {what}. Name another file, or delete it")
    wanted, found = set(jobs), {}
    for number, line in enumerate(lines[1:], 2):
        try:
            run = Run.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise DepthMuPError(f"{path}, line {number}: not a run of a sweep ({error}). Name another file") from error
        if run.job in wanted:
            found[run.job] = run
    return found


HEADER = '{"sweep": "'


def _header(fingerprint: str) -> str:
    return f'{HEADER}{fingerprint}"}}'


def _lock(file: IO[str], path: Path) -> None:
    """One writer at a time; the lock goes with the process, however that ends."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DepthMuPError(
                f"{path} is being written by another sweep. Wait for it, or name another file"
            ) from None


@contextmanager
def appending(path: str | Path | None, fingerprint: str) -> Iterator[Callable[[Run], None]]:
    """Gives a function that adds a finished run to the file at once.

    Raises:
        DepthMuPError: another process is writing to the file.
    """
    if path is None:
        yield lambda run: None
        return
    path = Path(path)
    with path.open("a") as file:
        _lock(file, path)
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)  # what a killed sweep was in the middle of

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

        def append(run: Run) -> None:
            if not path.stat().st_size:  # not before: a sweep that fails at once should not claim the file
                write(_header(fingerprint))
            write(run.to_json())

        yield append


@dataclass(frozen=True, order=True)
class Job:
    """One run to do: a rule by its label, a depth as the factory takes it, the base's learning rate, a seed."""

    rule: str
    depth: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Run:
    """A finished run. ``loss`` is infinite where it diverged; ``seconds`` is the time it took in its worker."""

    job: Job
    loss: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the loss is not a number that training could have gone on from."""
        return not math.isfinite(self.loss)

    def to_json(self) -> str:
        """One line; an infinite loss is null, which JSON has and infinity it has not."""
        return json.dumps({**asdict(self.job), "loss": None if self.diverged else self.loss, "seconds": self.seconds})

    @classmethod
    def from_json(cls, line: str) -> Run:
        """The run that `to_json` wrote."""
        data = json.loads(line)
        loss, seconds = data.pop("loss"), data.pop("seconds")
        return cls(Job(**data), math.inf if loss is None else loss, seconds)
