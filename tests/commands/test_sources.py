"""What a command makes of a user's factory and data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from terminal import BRANCHES, CHECK, PLAN, SWEEP, line

from torch_depthmup import cli
from torch_depthmup.commands.sources import batches


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
        (BRANCHES, "speechless", "data", r"user_net.py, line \d+: .*Speechless: <exception str\(\) failed>"),
        (BRANCHES, "claims", "data", r"user_net.py, line \d+: AssertionError$"),
        (BRANCHES, "make", "of_no_samples", "there are no samples in it"),
        (PLAN, "make", "data_of_nobody", r"user_net.py, line \d+: KeyError: 'nobody'"),
        (CHECK, "Crooked", "data", r"user_net.py, line \d+: RuntimeError: the shapes do not fit"),
        (SWEEP, "Crooked", "data", r"user_net.py, line \d+: RuntimeError: the shapes do not fit"),
        (BRANCHES, "raises_the_base", "data", r"user_net.py, line \d+: BaseException: all of it"),
        (CHECK, "raises_the_base", "data", r"user_net.py, line \d+: BaseException: all of it"),
        (PLAN, "mute", "data", r"user_net.py, line \d+: user_net.Mute: <exception str\(\) failed>"),
    ],
)
def test_whatever_the_users_code_raises_takes_one_line(
    here, tmp_path: Path, capsys, command, model: str, data: str, message: str
) -> None:
    arguments = [command[0], f"user_net:{model}", f"user_net:{data}", *command[1:], "--out", str(tmp_path / "x.html")]
    assert cli.main(arguments) == 2
    assert re.search(message, line(capsys))


@pytest.mark.parametrize("command", [PLAN, CHECK, SWEEP], ids=lambda c: c[0])
def test_a_factory_that_ignores_depth_is_said_to(here: Path, tmp_path: Path, capsys, command) -> None:
    out = str(tmp_path / "never.html")
    assert cli.main([command[0], "user_net:always_two", "user_net:data", *command[1:], "--out", out]) == 2
    assert re.search("2 residual branches at depth .* ignores depth", line(capsys))


def test_a_width_that_the_factory_does_not_take(here: Path, capsys) -> None:
    assert cli.main(["branches", "user_net:depth_only", "user_net:data", "--depth", "2", "--width", "8"]) == 2
    assert "Leave the width out" in line(capsys)


def test_batches_are_whole_and_do_not_repeat_samples() -> None:
    inputs = {"x": torch.arange(10.0)[:, None]}
    found = batches(inputs, torch.arange(10), 4, 5)
    assert [len(targets) for _, targets in found] == [4, 4]
    assert len({int(t) for _, targets in found for t in targets}) == 8
    assert all(torch.equal(given["x"][:, 0].long(), targets) for given, targets in found)
    assert [len(targets) for _, targets in batches(inputs, torch.arange(10), 64, 3)] == [10]


@pytest.mark.parametrize("command", [BRANCHES, PLAN, CHECK, SWEEP], ids=lambda c: c[0])
@pytest.mark.parametrize("text", ["import torch\n", "", "\x00\xff", '{"sweep": ""}\n'])
def test_nobodys_own_file_is_written_over(here, tmp_path: Path, capsys, command, text: str) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    arguments = [command[0], "user_net:make", "user_net:gone", *command[1:], "--out", str(mine)]
    if text:
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert "mine.py is no page that could be replaced" in line(capsys)
    else:  # an empty file is nothing to lose
        assert cli.main(arguments) == 2 and "has no 'gone'" in line(capsys)
    assert mine.read_text() == text


@pytest.mark.parametrize("command", [[*BRANCHES, "user_net:make", "user_net:data"], ["nfd"]], ids=lambda c: c[0])
@pytest.mark.parametrize("folder", [".", "/", ""])
def test_a_folder_is_no_file_to_write(capsys, command: list[str], folder: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--out", folder])
    assert "is a folder. Give the name of a file" in line(capsys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--samples -1", "--samples: must be a positive whole number"),
        ("--network-width 0", "--network-width: must be a positive whole number"),
        ("--lr nan", "--lr: must be a positive number"),
        ("--lr 0", "--lr: must be a positive number"),
        ("--lr much", "--lr: must be a positive number"),
        ("--out figure.nope", "--out: must end in one of .png"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_any_work(capsys, arguments: str, message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["nfd", *arguments.split()])
    assert message in line(capsys)
