"""depthmup branches, plan, check and sweep on a user's module; their pages in a real browser."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from browser import browser

from torch_depthmup import cli
from torch_depthmup.commands.sources import batches
from torch_depthmup.commands.sweep import learning_rates

MODULE = """
import math
import torch
from torch import nn
from torch_depthmup.diagnostics.shared.digits import DigitsResNet, digits

def make(depth, width=16):
    return DigitsResNet(depth, width)

def needs_width(depth, width):
    return DigitsResNet(depth, width)

def depth_only(depth):
    return DigitsResNet(depth, 16)

def data():
    inputs, targets = digits()
    return inputs[:256], targets[:256]

PAIR = data()

class Block(nn.Module):  # its norms stand beside the branches
    def __init__(self):
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.before_feed_forward, self.feed_forward = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def forward(self, x):
        n = self.before_attention(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        return x + self.feed_forward(self.before_feed_forward(x))

class Transformer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block() for _ in range(depth))), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(x.unflatten(1, (8, 8))).mean(1))

def warning(depth):
    warnings.warn("this network\\nis slow", UserWarning)
    return make(depth)

def always_two(depth):
    return DigitsResNet(2, 16)

def no_branches(depth):
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth)), nn.Linear(64, 10))

def a_list(depth):
    return [make(depth)]

def elsewhere(depth):
    return make(depth).to("meta")

def not_numbers():
    inputs, targets = data()
    return torch.full_like(inputs, math.nan), targets

def only_inputs():
    return data()[0]

def of_two_lengths():
    return data()[0][:10], data()[1]

def without_arguments():
    return make(2)

def leaves(depth):
    raise SystemExit(3)

def leaves_well(depth):
    raise SystemExit(0)

def data_of_nobody():
    return {}["nobody"]

class Crooked(DigitsResNet):
    def forward(self, x):
        if self.training:
            raise RuntimeError("the shapes\\ndo not fit")
        return super().forward(x)

NUMBER = 3
"""


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


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command wrote to stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


CHECK = ("check", "--depths", "2", "4")
SWEEP = ("sweep", "--depths", "2", "4", "--lrs", "0.01", "--steps", "2", "--seeds", "1")
BRANCHES = ("branches", "--depth", "4")
PLAN = ("plan", "--depth", "4", "--base-depth", "2")


@pytest.mark.parametrize("command", [BRANCHES, PLAN, CHECK, SWEEP], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "model, data, message",
    [
        ("user_net", "user_net:data", "the factory must be written module:function, not 'user_net'"),
        ("user_net.py:make", "user_net:data", "is a file: write user_net:make, in the folder that holds user_net.py"),
        ("user_nett:make", "user_net:data", "no module is called user_nett, .* Run the command where user_nett.py is"),
        ("user_net:mak", "user_net:data", "user_net has no 'mak'. Is it 'make'"),
        ("user_net:make", "user_net:datum", "user_net has no 'datum'. Is it 'data'"),
        ("broken_net:make", "user_net:data", "broken_net cannot be imported: RuntimeError: half written"),
        ("lacking_net:make", "user_net:data", "lacking_net cannot be imported: No module named 'a_library_that"),
        ("user_net:NUMBER", "user_net:data", "user_net:NUMBER is a int, not a function"),
        ("user_net:needs_width", "user_net:data", r"needs_width\(depth, width\) cannot be called .* Give --width"),
        ("user_net:without_arguments", "user_net:data", "cannot be called with a depth. It must take a depth"),
        ("user_net:make", "user_net:only_inputs", "must be a pair .inputs, targets. .* not a Tensor"),
        ("user_net:make", "user_net:of_two_lengths", r"equally many samples, not \[10, 256\]"),
        ("user_net:no_branches", "user_net:data", "no residual branch"),
        ("user_net:a_list", "user_net:data", "returned list, not an nn.Module"),
        ("user_net:elsewhere", "user_net:data", "meta"),
        ("user_net:make", "user_net:not_numbers", "nan|not finite"),
    ],
)
def test_what_is_wrong_takes_one_line(
    here, tmp_path: Path, capsys, command, model: str, data: str, message: str
) -> None:
    out = tmp_path / "never.html"
    assert cli.main([command[0], model, data, *command[1:], "--out", str(out)]) == 2
    said = line(capsys)
    assert said.startswith(f"depthmup {command[0]}: ") and re.search(message, said)
    assert not out.exists()
    if (tmp_path / "never.jsonl").exists():
        assert (tmp_path / "never.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "command, model, data, message",
    [
        (BRANCHES, "leaves", "data", r"called sys.exit\(3\)"),
        (CHECK, "leaves", "data", r"called sys.exit\(3\)"),
        (CHECK, "leaves_well", "data", r"called sys.exit\(0\)"),
        (PLAN, "make", "data_of_nobody", r"user_net.py, line \d+: KeyError: 'nobody'"),
        (CHECK, "Crooked", "data", r"user_net.py, line \d+: RuntimeError: the shapes do not fit"),
        (SWEEP, "Crooked", "data", r"user_net.py, line \d+: RuntimeError: the shapes do not fit"),
    ],
)
def test_whatever_the_users_code_raises_takes_one_line(
    here, tmp_path: Path, capsys, command, model: str, data: str, message: str
) -> None:
    arguments = [command[0], f"user_net:{model}", f"user_net:{data}", *command[1:], "--out", str(tmp_path / "x.html")]
    assert cli.main(arguments) == 2
    assert re.search(message, line(capsys))


def test_a_page_does_not_overwrite_the_runs(here, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "x.jsonl")
    assert cli.main(["sweep", "user_net:make", "user_net:data", *SWEEP[1:], "--out", out]) == 2
    assert "the report and the finished runs cannot be one file" in line(capsys)


@pytest.mark.parametrize("command", [PLAN, CHECK, SWEEP], ids=lambda c: c[0])
def test_a_factory_that_ignores_depth_is_said_to(here: Path, tmp_path: Path, capsys, command) -> None:
    out = str(tmp_path / "never.html")
    assert cli.main([command[0], "user_net:always_two", "user_net:data", *command[1:], "--out", out]) == 2
    assert re.search("2 residual branches at depth .* ignores depth", line(capsys))


def test_a_width_that_the_factory_does_not_take(here: Path, capsys) -> None:
    assert cli.main(["branches", "user_net:depth_only", "user_net:data", "--depth", "2", "--width", "8"]) == 2
    assert "Leave the width out" in line(capsys)


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("0.01", [0.01]),
        ("2^-8", [2**-8]),
        ("2^-4..2^-2", [2**-4, 2**-3, 2**-2]),
        ("1e-3..9e-3", [1e-3, 2e-3, 4e-3, 8e-3]),
    ],
)
def test_learning_rates_are_numbers_powers_and_ranges(text: str, numbers: list[float]) -> None:
    assert learning_rates(text) == pytest.approx(numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0",
        "-1",
        "nan",
        "inf",
        "2^",
        "2^-4..",
        "2^-2..2^-4",
        "2^-8...2^-4",
        "1...2",
        "0^-1",
        "2^1e9",
        "(-1)^0.5",
    ],
)
def test_what_is_no_learning_rate_is_refused(here: Path, capsys, text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", "user_net:make", "user_net:data", "--depths", "2", f"--lrs={text}"])
    assert caught.value.code == 2 and "must" in line(capsys)


def test_batches_are_whole_and_do_not_repeat_samples() -> None:
    inputs = {"x": torch.arange(10.0)[:, None]}
    found = batches(inputs, torch.arange(10), 4, 5)
    assert [len(targets) for _, targets in found] == [4, 4]
    assert len({int(t) for _, targets in found for t in targets}) == 8
    assert all(torch.equal(given["x"][:, 0].long(), targets) for given, targets in found)
    assert [len(targets) for _, targets in batches(inputs, torch.arange(10), 64, 3)] == [10]


def test_branches_and_plan_print_what_the_library_says(here: Path, capsys, tmp_path: Path) -> None:
    assert (
        cli.main(["branches", "user_net:make", "user_net:PAIR", "--depth", "4", "--out", str(tmp_path / "b.html")]) == 0
    )
    said = capsys.readouterr().out
    assert "4 residual branches in 1 stream of 4 additions" in said and "{1..4}.branch" in said
    assert re.search(r"\{1\.\.4\}\.branch\.\{0\.\.1\}\.weight +inner\n", said)
    assert re.search(r"\{1\.\.4\}\.branch\.3\.weight +outer +carrier\n", said)
    plan = ["plan", "user_net:make", "user_net:data", "--depth", "8", "--base-depth", "2", "--width", "32"]
    assert (
        cli.main([*plan, "--base-width", "16", "--rule", "complete-p", "--out", str(tmp_path / "new" / "p.html")]) == 0
    )
    said = capsys.readouterr().out
    assert "rule complete-p" in said and "depth multiplier 4, branch multiplier 0.25" in said
    assert "branch multiplier" in (tmp_path / "new" / "p.html").read_text()


def test_branches_whose_norms_stand_beside_them_are_folded_into_few_lines(here: Path, capsys, tmp_path: Path) -> None:
    out = str(tmp_path / "t.html")
    assert cli.main(["branches", "user_net:Transformer", "user_net:data", "--depth", "6", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "12 residual branches in 1 stream of 12 additions" in said
    assert re.search(r"blocks\.\{0\.\.5\}\.before_feed_forward\.weight +inner\n", said)
    assert re.search(r"blocks\.\{0\.\.5\}\.attention\.out_proj\.bias +outer +carrier\n", said)
    assert len(said.splitlines()) < 40 and max(map(len, said.splitlines())) <= 80


def test_a_warning_takes_one_line_too(here: Path, capsys, tmp_path: Path) -> None:
    plan = ["plan", "user_net:warning", "user_net:data", "--depth", "16", "--base-depth", "2"]
    assert cli.main([*plan, "--out", str(tmp_path / "p.html")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said and set(said) == {"depthmup plan: warning: this network is slow"}


def test_the_check_exits_with_its_verdict(here: Path, capsys, tmp_path: Path) -> None:
    check = ["check", "user_net:make", "user_net:data", "--depths", "4", "8", "16", "32", "--width", "64", "--out"]
    assert cli.main([*check, str(tmp_path / "holds.html")]) == 0
    assert "coordinate check of depth-mup-corrected with adam: holds" in capsys.readouterr().out
    page = (tmp_path / "holds.html").read_text()
    assert "Verdict: holds." in page and page.count("<td class=good>holds</td>") == 5
    cli_arguments = [*check, str(tmp_path / "large.html"), "--optimizer", "sgd", "--lr", "1e30", "--steps", "4"]
    assert cli.main(cli_arguments) == 2 and "smaller lr" in line(capsys)


def test_a_stopped_sweep_is_taken_up(here: Path, capsys, tmp_path: Path) -> None:
    sweep = ["sweep", "user_net:make", "user_net:data", "--depths", "2", "4", "--lrs", "2^-10..2^-4", "--steps", "3"]
    sweep += ["--seeds", "2", "--rules", "mup", "depth-mup-corrected", "--out", str(tmp_path / "sweep.html")]
    assert cli.main(sweep) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[:6])) <= 80
    lines = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 7 * 2
    (tmp_path / "sweep.jsonl").write_text("\n".join(lines[:20]) + "\n")
    assert cli.main(sweep) == 0
    assert capsys.readouterr().out == said
    again = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert again[:20] == lines[:20] and len(again) == len(lines)


def test_a_sweep_of_edited_code_is_not_taken_up(here: Path, capsys, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "edited_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    sweep = ["sweep", "edited_net:make", "edited_net:data", *SWEEP[1:], "--rules", "mup"]
    assert cli.main(sweep) == 0 and cli.main(sweep) == 0
    (tmp_path / "edited_net.py").write_text(MODULE.replace("width=16", "width=24"))
    capsys.readouterr()
    assert cli.main(sweep) == 2 and "another model, training, data or base depth" in line(capsys)


# The pages in a browser


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
