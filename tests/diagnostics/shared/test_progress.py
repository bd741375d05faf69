"""Bars: in the terminal of a person, never in what a command writes."""

from __future__ import annotations

import pytest

from torch_depthmup.diagnostics.shared.progress import bar


def run(capsys: pytest.CaptureFixture[str], **options) -> tuple[str, str]:
    with bar("training", 4, 1, **options) as advance:
        for _ in range(3):
            advance()
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_terminal_sees_how_far_it_is_and_how_long_it_takes(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    out, err = run(capsys, show=True)
    assert out == "" and "training" in err and "4/4" in err and "0:00:00" in err


@pytest.mark.parametrize("show", [False, True])
def test_a_file_or_pipe_gets_nothing(capsys, monkeypatch: pytest.MonkeyPatch, show: bool) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert run(capsys, show=show) == ("", "")
