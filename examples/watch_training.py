"""Watch feature learning while networks of two depths train on scanned digits, and read what the instruments say.

    python examples/watch_training.py [--figures FOLDER]

Trains a shallow and a deep two-layer-block ResNet on scikit-learn's digits under depth-muP with and without the
correction of the inner learning rates, prints the reports, then checks the coordinates over depth. Under a minute on
two cores; needs the extra: pip install 'torch-depthmup[diagnostics]'
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torch_depthmup as dm
from torch_depthmup.diagnostics.coordinates.check import coordinate_check
from torch_depthmup.diagnostics.monitor.recording import FeatureMonitor
from torch_depthmup.diagnostics.plots import monitor_figure

SHALLOW, DEEP, LR, STEPS = 4, 32, 1e-3, 40


def resnet(depth: int, width: int = 64) -> nn.Module:
    def branch() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    blocks = [dm.Residual(branch()) for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


def train(depth: int, rule: str, x: Tensor, y: Tensor) -> FeatureMonitor:
    torch.manual_seed(0)
    model = resnet(depth)
    dm.parametrize(model, base=resnet(SHALLOW), example_inputs=x[:4], rule=rule)
    optimizer = dm.Adam(model.parameters(), lr=LR)
    monitor = FeatureMonitor(model, probe=x[:16], every=5)
    for step in range(STEPS):
        batch = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        monitor.record(step)
    print(f"{rule}, depth {depth}: loss {loss.item():.3f}")
    return monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, help="write the two figures into this folder")
    folder = parser.parse_args().figures
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)

    watched = {}
    for rule in ("depth-mup", "depth-mup-corrected"):
        shallow, deep = train(SHALLOW, rule, x, y), train(DEEP, rule, x, y)
        print(deep.report(base=shallow), end="\n\n")
        watched[rule] = deep

    check = coordinate_check(
        resnet, (x[:64], y[:64]), depths=(4, 8, 16, 32), rule="depth-mup-corrected", lr=LR, seeds=3
    )
    print(check)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        monitor_figure(watched).savefig(folder / "watched.png", dpi=150)
        dm.diagnostics.plots.coordinate_figure(check).savefig(folder / "coordinates.png", dpi=150)
        print(f"figures in {folder}")


if __name__ == "__main__":
    main()
