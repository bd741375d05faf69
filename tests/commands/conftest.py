"""A folder with a user's modules, and commands that run in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from terminal import MODULE


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user")
    (path / "user_net.py").write_text(MODULE)
    (path / "broken_net.py").write_text("import torch\nraise RuntimeError('half written')\n")
    (path / "lacking_net.py").write_text("import a_library_that_nobody_has\n")
    return path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder
