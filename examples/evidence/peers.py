"""Other packages beside this one, in one run: lines, learning rates in depth, step times, other people's networks.

    python examples/evidence/peers.py --data DIR                # loads CIFAR-10 through torchvision into DIR
    python examples/evidence/peers.py --data cifar10_16px.npz   # or the arrays train_images, train_labels

The folder same_network/ holds one network and its optimizer as each package wants them: MLP blocks of width 128 as
torch initializes them (unit-scaling has its own), Adam, with LayerNorm and without. "lines" are those that a diff from
plain_torch.py adds or changes. "depth" trains them on 150 batches of 128 images, none seen twice, at depths 4 and 32;
the regret is the loss at depth 32 with the rate that was best at depth 4, less that with its own best. "time" is that
of whole steps at depth 16, in rounds of shuffled order, over plain torch's. "zoo" takes the networks of torch,
torchvision, timm and transformers that this package is tested on, and asks which can be scaled in depth as their
library builds them.

Writes peers_PART.csv beside this file; half an hour of one core, less with --only PART.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import importlib
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from types import ModuleType
from typing import Any

import torch
from onepass import DATA, HERE, PIXELS, final, one_pass, shuffled
from torch import nn

import torch_depthmup as dm
from torch_depthmup.errors import DepthMuPError
from torch_depthmup.running import call, main_output

SAME = HERE / "same_network"
TESTS = HERE.parents[1] / "tests"
PEERS = {
    "plain torch": ("plain_torch", (-14, -8)),
    "mup": ("with_mup", (-12, -6)),
    "CompleteP by hand": ("with_completep", (-12, -7)),
    "unit-scaling": ("with_unit_scaling", (-5, 0)),
    "torch_depthmup": ("with_depthmup", (-13, -7)),
}
"""Files of the folder, and the powers of two of their learning rates."""
RULES = {
    "plain torch": "none",
    "mup": "none; width",
    "CompleteP by hand": "branches and eps",
    "unit-scaling": "branches and rates, of its own modules",
    "torch_depthmup": "branches, rates, decay and eps",
}
"""What each scales in depth."""
OVERVIEW = [
    "",
    "lines added or changed",
    "scales in depth",
    "networks of others, as built",
    "step time over plain torch",
]
TRANSFERS = ["blocks", "", "best rate at depth 4", "at 32", "loss at 4", "at 32 with the rate of 4", "at 32", "regret"]
BATCH, STEPS, SHALLOW, DEEP, TIMED = 128, 150, 4, 32, 16
NORMS = {"with norm": True, "without": False}
Rows = list[dict[str, Any]]


def module(peer: str) -> ModuleType:
    """The file of a peer; it is imported where it is asked for, so that only what is used need be installed."""
    if str(SAME) not in sys.path:
        sys.path.append(str(SAME))
    return importlib.import_module(PEERS[peer][0])


def lines(peer: str) -> int:
    """How many lines of code the peer's file adds to plain torch's, or changes in it."""
    ours, theirs = (_code(name) for name in (PEERS["plain torch"][0], PEERS[peer][0]))
    return sum(line.startswith("+ ") for line in difflib.ndiff(ours, theirs))


def _code(name: str) -> list[str]:
    text = (SAME / f"{name}.py").read_text().split('"""', 2)[2]
    return [line for line in text.splitlines() if line.strip()]


def depths(source: str, seeds: int) -> Rows:
    """The loss of each run."""
    rows: Rows = []
    for peer, (norm, normed), depth in product(PEERS, NORMS.items(), (SHALLOW, DEEP)):
        low, high = PEERS[peer][1]
        for power, seed in product(range(low, high + 1), range(seeds)):
            torch.manual_seed(seed)
            its = module(peer)
            model, optimizer = its.make(depth, normed, 2.0**power)
            losses = one_pass(model, optimizer, shuffled(source, seed, BATCH, STEPS * BATCH), its.loss)
            rows.append({
                "peer": peer, "blocks": norm, "depth": depth, "log2_lr": power, "seed": seed,
                "loss": f"{final(losses):.6g}",
            })  # fmt: skip
        print(f"{peer}, {norm}, depth {depth}: {len(rows)} runs", flush=True)
    return rows


def regret(rows: Iterable[Mapping[str, str]], peer: str, blocks: str) -> dict[str, Any]:
    """Best rates and losses, and the regret at the deep end: mean and standard error over paired seeds.

    A best rate is one of the grid, "<=" or ">=" where it is at its end.
    """
    curves: dict[int, dict[int, list[float]]] = {SHALLOW: {}, DEEP: {}}
    for row in rows:
        if (row["peer"], row["blocks"]) == (peer, blocks):
            curves[int(row["depth"])].setdefault(int(row["log2_lr"]), []).append(float(row["loss"]))
    best = {depth: min(curve, key=lambda lr: statistics.fmean(curve[lr])) for depth, curve in curves.items()}
    there, least = curves[DEEP][best[SHALLOW]], curves[DEEP][best[DEEP]]
    paired = [a - b for a, b in zip(there, least, strict=True)]
    ends = {depth: (min(curve), max(curve)) for depth, curve in curves.items()}
    bounds = {
        depth: "<= " if lr == ends[depth][0] else ">= " if lr == ends[depth][1] else "" for depth, lr in best.items()
    }
    return {
        "best": {depth: f"{bounds[depth]}2^{lr}" for depth, lr in best.items()},
        "shallow": statistics.fmean(curves[SHALLOW][best[SHALLOW]]),
        "transferred": statistics.fmean(there),
        "deep": statistics.fmean(least),
        "regret": statistics.fmean(paired),
        "error": statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else math.nan,
    }


def times(rounds: int) -> Rows:
    """Processor time of a whole training step over plain torch's: median and quartiles over rounds."""
    x, y = torch.randn(BATCH, PIXELS), torch.randint(10, (BATCH,))
    steps = {peer: _step(module(peer), x, y) for peer in PEERS}
    taken: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for turn in range(rounds + 12):  # in the first ones more is looked at
        for peer in random.sample(list(PEERS), len(PEERS)):
            start = time.process_time()
            steps[peer]()
            if turn >= 12:
                taken[peer].append(time.process_time() - start)
    rows: Rows = []
    for peer in PEERS:
        ratios = [a / b for a, b in zip(taken[peer], taken["plain torch"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        numbers = {"ratio": middle, "low": low, "high": high}
        rows.append({"peer": peer, **{name: f"{value:.3f}" for name, value in numbers.items()}, "rounds": rounds})
    return rows


def _step(its: ModuleType, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    model, optimizer = its.make(TIMED, True, 1e-5)

    def step() -> None:
        loss = its.loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def zoo() -> Rows:
    """For each network of the tests what this package and unit-scaling's transformation say to it as it is."""
    sys.path.append(str(TESTS))
    importlib.import_module("torchvision_shim")
    models = importlib.import_module("models")
    rows: Rows = []
    for entry in models.TORCH_MODELS + models.TABLE + models.MORE + models.FIELD:
        found = {"torch_depthmup": _parametrized(entry), "unit_scale": _unit_scaled(entry)}
        rows.append({"network": entry.name, "from": entry.requires or "torch", **found})
        print(rows[-1], flush=True)
    return rows


def _parametrized(entry: Any) -> str:
    """What `parametrize` says to the network beside its shallower base, and whether a step can be trained then."""
    for how in ("fold", "wrap"):
        torch.manual_seed(0)
        model = entry.build()
        try:
            dm.parametrize(model, base=entry.build(entry.base), example_inputs=entry.inputs(), how=how)
        except DepthMuPError as error:
            said = str(error)
            continue
        optimizer = dm.AdamW(model.parameters(), lr=1e-4)
        return how if _trains(model, entry.inputs(), optimizer) else "not finite"
    return f"refused: {said.split('.')[0]}"


def _unit_scaled(entry: Any) -> str:
    """Whether unit-scaling's experimental transformation of a whole model runs, and a step can be trained then."""
    from unit_scaling.transforms import unit_scale

    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        model = unit_scale(entry.build())
        finite = _trains(model, entry.inputs(), torch.optim.AdamW(model.parameters(), lr=1e-4))
    except Exception as error:  # whatever a package raises
        return f"error: {type(error).__name__}"
    return "runs" if finite else "not finite"


def _trains(model: nn.Module, inputs: Any, optimizer: torch.optim.Optimizer) -> bool:
    for _ in range(2):
        value = main_output(call(model, inputs)).float().square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return bool(value.isfinite()) and all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def written(part: str, rows: Rows) -> None:
    with (HERE / f"peers_{part}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def committed(part: str) -> list[dict[str, str]]:
    with (HERE / f"peers_{part}.csv").open() as file:
        return list(csv.DictReader(file))


def overview() -> list[list[str]]:
    """A row for each peer: lines, step time over plain torch's with quartiles, networks scaled in depth as they are."""
    ratios = {row["peer"]: f"{row['ratio']} [{row['low']}, {row['high']}]" for row in committed("time")}
    networks = committed("zoo")
    scaled = sum(row["torch_depthmup"] in ("fold", "wrap") for row in networks)
    found = {peer: f"0 of {len(networks)}" for peer in PEERS} | {"torch_depthmup": f"{scaled} of {len(networks)}"}
    return [[peer, str(lines(peer)), RULES[peer], found[peer], ratios[peer]] for peer in PEERS]


def transfers() -> list[list[str]]:
    """A row for each peer and kind of blocks: best rates, losses, and the regret of the shallow rate with its error."""
    rows, found = committed("depth"), []
    for (peer, _), blocks in product(PEERS.items(), NORMS):
        said = regret(rows, peer, blocks)
        losses = [f"{said[name]:.3f}" for name in ("shallow", "transferred", "deep")]
        found.append([blocks, peer, *said["best"].values(), *losses, f"{said['regret']:.3f} ± {said['error']:.3f}"])
    return sorted(found, key=lambda row: list(NORMS).index(row[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help=f"{DATA}; only depth needs it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=200, help="of the step times (default 200)")
    parser.add_argument("--only", choices=("depth", "time", "zoo"))
    options = parser.parse_args()
    if options.only in (None, "depth") and options.data is None:
        parser.error(f"--data is {DATA}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the libraries
    start = time.perf_counter()
    parts: dict[str, Callable[[], Rows]] = {
        "depth": lambda: depths(options.data, options.seeds),
        "time": lambda: times(options.rounds),
        "zoo": zoo,
    }
    for part in [options.only] if options.only else parts:
        written(part, parts[part]())
    for header, rows in ((OVERVIEW, overview()), (TRANSFERS, transfers())):
        print("", *("   ".join(row) for row in (header, *rows)), sep="\n")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
