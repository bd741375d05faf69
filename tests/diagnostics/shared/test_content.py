"""What was trained is known by its content."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from torch_depthmup.diagnostics.shared.content import content_digest, source_digest


def test_equal_tensors_have_equal_digests_and_others_have_others() -> None:
    x = torch.arange(6.0)
    assert content_digest(x) == content_digest(x.clone()) == content_digest(torch.arange(12.0)[::2] / 2)
    others = [x + 1e-6, x.double(), x.reshape(2, 3), (x, x.clone()), x.bfloat16()]
    assert len({content_digest(other) for other in [x, *others]}) == 6


def test_the_source_of_what_a_module_imports_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "layers_of_mine.py").write_text("SIZE = 3\n")
    (tmp_path / "net_of_mine.py").write_text("import torch\nimport layers_of_mine\ndef make(depth): ...\n")
    found = []
    for size in (3, 3, 4):
        (tmp_path / "layers_of_mine.py").write_text(f"SIZE = {size}\n")
        found.append(source_digest(importlib.import_module("net_of_mine").make))
    assert found[0] == found[1] != found[2]
    for name in ("net_of_mine", "layers_of_mine"):
        del sys.modules[name]
    assert source_digest(torch.nn.Linear) == source_digest(print)  # installed code is not the user's
