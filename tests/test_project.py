"""What surrounds the package agrees with it: version, citation, and nothing of one machine in any file."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from pages import ROOT

import torch_depthmup as dm

FOLDERS = "home|Users|root|work|mnt|media|opt|tmp|var|private"
MACHINE = re.compile(rf"(?<![\w.:/@-])(?:/(?:{FOLDERS})/|\b[A-Z]:\\(?=[A-Z]))[\w~]")
"""An absolute path of somebody's machine; those that every machine has, such as /usr/bin/env, are none."""


def committed() -> list[Path]:
    """The files that git knows, or all of the source where this is no checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in ROOT.rglob("*") if path.is_file() and not any(p.startswith(".") for p in path.parts)]


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert importlib.metadata.version("torch-depthmup") == dm.__version__ == citation["version"]


def test_the_citation_has_what_the_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors", "license"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= reference.keys()
        assert all(author.keys() <= {"given-names", "family-names", "name"} for author in reference["authors"])


def test_the_papers_that_the_rules_cite_are_cited() -> None:
    named = set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "torch_depthmup" / "rules.py").read_text()))
    cited = {
        reference["url"].rpartition("/")[2]
        for reference in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    }
    assert {"2310.02244", "2512.21075", "2505.01618", "2203.03466"} <= named & cited


def test_changes_are_told_in_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version) for version in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


def test_no_file_holds_a_path_of_one_machine() -> None:
    found = []
    for path in committed():
        try:
            text = path.read_text()
        except UnicodeDecodeError:  # a figure
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE.finditer(text)]
    assert found == []


@pytest.mark.parametrize("text", ["data=|home|a|x.npz", "'|work|x'", "see (|Users|b|c)", "C:\\Users", '"|tmp|x"'])
def test_such_a_path_is_known(text: str) -> None:
    """They are written with bars, as this file may hold none either."""
    assert MACHINE.search(text.replace("|", "/"))


@pytest.mark.parametrize("text", ["#!|usr|bin|env bash", "https:||a.org|home|b", ".|work|x", "docs|work|x", "a|tmp|b"])
def test_other_slashes_are_not(text: str) -> None:
    assert not MACHINE.search(text.replace("|", "/"))
