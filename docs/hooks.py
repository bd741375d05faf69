"""Writes what the pages say from the code and from committed measurements, so that neither can grow old.

A page holds ``{{ NAME }}`` or ``{{ NAME ARGUMENT }}`` on a line of its own, NAME one of `WRITERS`. mkdocs calls
`on_files` and, for each page, `on_page_markdown`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from torch_depthmup import cli
from torch_depthmup.diagnostics.monitor.recording import COLUMNS
from torch_depthmup.diagnostics.transfer.power import CLOSE
from torch_depthmup.diagnostics.transfer.result import Sweep, told_apart
from torch_depthmup.diagnostics.transfer.runs import Job, Run
from torch_depthmup.errors import MeasurementError
from torch_depthmup.rules import FAMILIES, RULES, predicted_slopes

sys.path.insert(0, str(Path(__file__).parent))
import rule_tables  # noqa: E402  beside this file
from rule_tables import table  # noqa: E402

ROOT = Path(__file__).parents[1]
ASKED = re.compile(r"^\{\{ (\w+)(?: (\S+))? \}\}$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Figures of examples/figures as figures/ of the site."""
    for path in sorted((ROOT / "examples" / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with every ``{{ name argument }}`` replaced by what the function of that name writes."""
    return ASKED.sub(lambda found: WRITERS[found[1]](*filter(None, [found[2]])), markdown)


def slopes() -> str:
    """The slopes over depth that each rule predicts, from `predicted_slopes`, with SGD; Adam's are the same."""
    found = {name: predicted_slopes(rule, FAMILIES["sgd"]) for name, rule in RULES.items() if rule.scales_depth}
    header = ["rule", "inner layers' own update", "outer layers' own update", "stream's update", "function's update"]
    return table(header, [[f"`{name}`", *(f"{value:g}" for value in of.values())] for name, of in found.items()])


def columns() -> str:
    """The names of a monitor's columns."""
    return ", ".join(f"`{name}`" for name in COLUMNS) + "."


def commands() -> str:
    """The help of every command, as the command prints it."""
    texts = []
    for name, (module, _) in cli.COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"depthmup {name}")
        importlib.import_module(module).add_arguments(parser)
        texts.append(f"## depthmup {name}\n\n```text\n{parser.format_help()}```")
    return "\n\n".join(texts)


def sweep_of(path: str) -> Sweep:
    """The sweep whose `frame()` was written to this CSV file, relative to the repository."""
    with (ROOT / path).open() as file:
        rows = list(csv.DictReader(file))
    jobs = [Job(row["rule"], int(row["depth"]), float(row["lr"]), int(row["seed"])) for row in rows]
    losses = [math.inf if row["diverged"] == "True" else float(row["loss"]) for row in rows]
    times = [float(row["seconds"]) for row in rows]
    return Sweep(tuple(map(Run, jobs, losses, times)))


def transfer(path: str) -> str:
    """Optima, moves and regrets of a committed sweep, and what it says in words."""
    sweep = sweep_of(path)
    header, rows = sweep.table()
    return table(header, [[f"`{name}`", *rest] for name, rest in rows]) + f"\n\n{sweep.reading}"


def predicted(path: str) -> str:
    """For each rule of a committed sweep, the deepest known optimum as shallower depths predict it, and as found."""
    sweep = sweep_of(path)
    rows = []
    for rule in sweep.rules:
        try:
            law = sweep.power_law(rule)
        except MeasurementError:
            rows.append(
                [f"`{rule}`", "–", "–", "–", f"{sweep.optimum(rule, sweep.depths[-1]).log2_lr}", "too few optima"]
            )
            continue
        off = abs(law.predicted.value - law.found.value)
        verdict = "yes" if off <= CLOSE else "within the errors" if law.predicts_deepest else "no"
        exponent = f"{law.exponent.value:+.2f}±{law.exponent.error:.2f}"
        rows.append([f"`{rule}`", exponent, str(law.deepest), f"{law.predicted}", f"{law.found}", verdict])
    header = [
        "rule",
        "drift: depth^",
        "deepest with an optimum",
        "log2 lr predicted there",
        "found",
        "within a factor 2^0.5",
    ]
    return table(header, rows)


def rates(path: str) -> str:
    """Optimum and edge of stability at each depth: of committed predictions, and of the networks in the file beside."""
    ours, theirs = sweep_of(path), sweep_of(path.replace(".csv", "_trained.csv"))
    rows = []
    for rule in ours.rules:
        for depth in ours.depths:
            optima = [sweep.optimum(rule, depth).log2_lr for sweep in (ours, theirs)]
            off = optima[0].value - optima[1].value
            inside = "yes" if all(o.known for o in optima) and abs(off) <= CLOSE else "no"
            edges = [f"2^{math.log2(sweep.edge_of_stability(rule, depth)):g}" for sweep in (ours, theirs)]
            rows.append([f"`{rule}`", str(depth), *map(str, optima), f"{off:+.1f}", inside, *edges])
    found = ["log2 lr predicted", "trained", "off by 2^", "within a factor 2^0.5"]
    header = ["rule", "depth", *found, "diverges from, predicted", "trained"]
    return table(header, rows)


def instruments(path: str) -> str:
    """The inner layers' own update at the ends of a range of depths, predicted and trained, and its exponent."""
    with (ROOT / path).open() as file:
        found: dict[tuple[str, str], dict[int, list[float]]] = {}
        for row in csv.DictReader(file):
            if row["part"] == "depths" and "inner" in row["layer"]:
                sizes = found.setdefault((row["rule"], row["source"]), {})
                sizes.setdefault(int(row["depth"]), []).append(float(row["own"]))
    rows = []
    for (rule, source), sizes in found.items():
        first, last = min(sizes), max(sizes)
        small, large = (sum(sizes[depth]) / len(sizes[depth]) for depth in (first, last))
        exponent = math.log(large / small) / math.log(last / first)
        rows.append([f"`{rule}`", source, f"{small:.3f}", f"{large:.3f}", f"{exponent:+.2f}"])
    return table(["rule", "", f"own update at depth {first}", f"at depth {last}", "depth^"], rows)


def collapse(path: str) -> str:
    """Slopes over depth of the layers' own updates: a row for blocks and optimizer, a column for each rule."""
    with (ROOT / path).open() as file:
        found = {(r["layers"], r["optimizer"], r["quantity"], r["rule"]): r for r in csv.DictReader(file)}
    rules_ = list(dict.fromkeys(key[3] for key in found))
    rows = []
    for layers, optimizer, quantity in dict.fromkeys(key[:3] for key in found):
        cells = [found[layers, optimizer, quantity, rule] for rule in rules_]
        shown = [f"{float(c['slope']):+.2f} ({float(c['predicted']):+.2f})" for c in cells]
        rows.append([layers, optimizer, quantity, *shown])
    return table(["layers in a block", "optimizer", "update of", *(f"`{rule}`" for rule in rules_)], rows)


SETUPS = {
    "cifar_transfer_adam": ("MLP blocks without normalization", "Adam"),
    "cifar_transfer_sgd": ("MLP blocks without normalization", "SGD"),
    "cifar_transfer_adam-norm": ("pre-norm MLP blocks", "Adam"),
    "vision_transfer_conv": ("convolutions with BatchNorm", "Adam"),
    "vision_transfer_vit": ("vision transformer", "Adam"),
}
"""Committed sweeps over rules: what was trained, and with what."""


def which() -> str:
    """For each committed sweep: the rule to take, those that its seeds do not tell from it, and how optima move."""
    rows = []
    for name, what in SETUPS.items():
        sweep = sweep_of(f"examples/evidence/{name}.csv")
        base, deepest = sweep.depths[0], sweep.depths[-1]
        losses = {rule: sweep.transferred(rule, deepest) for rule in sweep.rules}
        trained = {rule: values for rule, values in losses.items() if all(map(math.isfinite, values))}
        best = min(trained, key=lambda rule: fmean(trained[rule]))
        alike = [rule for rule in trained if rule != best and not told_apart(trained, best, rule)]
        moves = f"{sweep.drift(best, deepest)}"
        seeds = str(len(sweep.curves(best, deepest)))
        others = ", ".join(f"`{rule}`" for rule in alike) or "–"
        rows.append([*what, f"{deepest // base}", seeds, f"`{best}`", moves, others])
    header = ["network", "optimizer", "depth ratio", "seeds", "lowest loss", "its optimum moves by 2^", "not told from"]
    return table(header, rows)


def coverage(group: str) -> str:
    """How often an optimum lies within its error, of one group of curves of the benchmark."""
    rows = [row for row in _csv("examples/benchmarks/optimum_coverage.csv") if row["group"].startswith(group)]
    shown = [[row["curve"], row["one"], row["two"], row["off"], row["error"]] for row in rows]
    return table(["curve", "within 1 SE", "within 2 SE", "mean deviation", "mean SE, in octaves"], shown)


def setups() -> str:
    """What the coordinate check says of right set-ups, by network; what it could not tell by name."""
    rows = _csv("examples/benchmarks/right_setups.csv")
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        of = [row for row in rows if row["network"] == network]
        counts = [str(sum(row["verdict"] == verdict for row in of)) for verdict in ("holds", "cannot tell", "broken")]
        others = [f"{row['optimizer']}, `{row['rule']}`: {row['why']}" for row in of if row["verdict"] != "holds"]
        lines.append([network, *counts, "<br>".join(others) or "–"])
    return table(["network", "holds", "cannot tell", "broken", "not held: slopes (the rule's)"], lines)


def numbers(path: str) -> str:
    """A committed file of measurements as it is."""
    found = _csv(path)
    return table([name.replace("_", " ") for name in found[0]], [row.values() for row in found])


def _csv(path: str) -> list[dict[str, str]]:
    with (ROOT / path).open() as file:
        return list(csv.DictReader(file))


def script_of(name: str) -> Any:
    """A script of the evidence as a module."""
    sys.path.insert(0, str(ROOT / "examples" / "evidence"))
    return importlib.import_module(name)


def peers(part: str) -> str:
    """Other packages beside this one, as the script of these runs has them: "overview" or "transfers"."""
    script = script_of("peers")
    if part == "overview":
        return table(script.OVERVIEW, script.overview())
    return table(script.TRANSFERS, script.transfers())


def horizon(path: str) -> str:
    """Best rates and regrets for other batch sizes and durations, as the script of these runs has them."""
    script = script_of("horizon")
    with (ROOT / path).open() as file:
        return table(script.HEADER, script.regrets(csv.DictReader(file)))


WRITERS: dict[str, Callable[..., str]] = {
    "rules": rule_tables.rules,
    "alphas": rule_tables.alphas,
    "in_depth": rule_tables.in_depth,
    "in_width": rule_tables.in_width,
    "starts": rule_tables.starts,
    "folds": rule_tables.folds,
    "slopes": slopes,
    "columns": columns,
    "commands": commands,
    "transfer": transfer,
    "predicted": predicted,
    "rates": rates,
    "instruments": instruments,
    "collapse": collapse,
    "which": which,
    "numbers": numbers,
    "coverage": coverage,
    "setups": setups,
    "horizon": horizon,
    "peers": peers,
}
