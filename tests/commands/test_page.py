"""Every page in a real browser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from browser import browser
from terminal import BRANCHES, CHECK, PLAN, SWEEP

from torch_depthmup import cli


@pytest.fixture(scope="session")
def reports(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        choose = ("choose", *SWEEP[1:], "--rules", "mup", "--target", "8")
        for command in (
            BRANCHES,
            PLAN,
            CHECK,
            choose,
            (*SWEEP, "--seeds", "2", "--rules", "mup", "depth-mup-corrected"),
        ):
            arguments = [command[0], "user_net:make", "user_net:data", *command[1:]]
            assert cli.main([*arguments, "--out", str(out / f"{command[0]}.html")]) in (0, 1, 3)
    return out


PROBE = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const found = rgb(getComputedStyle(e).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const texts = [...document.querySelectorAll('h1, h2, p, li, th, td, figcaption, code, footer')];
const contrasts = texts.map(e => {
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
const corner = image => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 4;
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  return [...context.getImageData(1, 1, 1, 1).data];
};
const images = [...document.images];
return {
  page: [document.documentElement.scrollWidth, innerWidth],
  background: rgb(getComputedStyle(document.body).backgroundColor),
  contrast: Math.min(...contrasts),
  smallest: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
  images: images.map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
  corners: images.map(corner),
  alts: images.map(i => i.alt),
  boxes: [...document.querySelectorAll('.scroll')].map(b => b.getBoundingClientRect().right),
  fetched: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
  scripts: document.scripts.length, tables: document.querySelectorAll('table').length,
};
"""


@pytest.mark.parametrize("phone", [False, True], ids=["desk", "phone"])
def test_the_pages_are_read_in_a_browser_dark_and_light(reports: Path, phone: bool) -> None:
    with browser(390 if phone else 1280, 844, phone=phone) as window:
        for path in sorted(reports.glob("*.html")):
            for scheme, dark in (("light", False), ("dark", True)):
                window.scheme(scheme)
                window.open(path)
                found = window.ask(PROBE)
                told = f"{path.name}, {scheme}: {found}"
                assert found["page"][0] <= found["page"][1] == (390 if phone else 1280), told
                assert all(right <= found["page"][1] for right in found["boxes"]), told
                assert (sum(found["background"][:3]) < 150) == dark, told
                assert found["contrast"] >= 4.5 and found["smallest"] >= 12, told
                assert found["images"] and found["tables"], told
                for (complete, natural, shown), corner in zip(found["images"], found["corners"], strict=True):
                    assert complete and 0.7 * natural < shown < natural + 1, told
                    assert all(abs(a - b) <= 2 for a, b in zip(corner, found["background"][:3], strict=False)), told
                assert all(found["alts"]) and found["fetched"] == [] and found["scripts"] == 0, told
                assert window.console() == [], told
    assert len(list(reports.glob("*.html"))) == 5
