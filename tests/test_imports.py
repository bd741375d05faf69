"""Imports run one way: down the list of rooms, and inside folders too. None is hidden."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "torch_depthmup"

ROOMS = (
    "errors",
    "rules",
    "modules",
    "running",
    "tables",
    "tracing",
    "scaling",
    "families",
    "groups",
    "resuming",
    "schedules",
    "clipping",
    "watching",
    "optim",
    "diagnostics.shared",
    "diagnostics.monitor",
    "diagnostics.coordinates",
    "diagnostics.transfer",
    "diagnostics.nfd",
    "diagnostics.plots",
    "diagnostics",
    "commands",
    "cli",
    "",
)
"""A room may import what stands before it. ``""`` is the package's face, ``torch_depthmup/__init__.py``."""

INSIDE = {
    "tracing": (
        "operations",
        "recorder",
        "graph",
        "parameters",
        "choosing",
        "additions",
        "producers",
        "streams",
        "inside",
        "branches",
        "replay",
        "census",
    ),
    "scaling": ("plan", "verify", "registry", "hooks", "refusals", "initialization", "planning", "measuring", "apply"),
    "diagnostics.monitor": ("probe", "report", "recording", "figures"),
    "diagnostics.coordinates": ("slopes", "mistakes", "check", "figures"),
    "diagnostics.transfer": ("runs", "optimum", "result", "figures"),
    "diagnostics.nfd": ("activations", "setting", "record", "gaussian", "dynamics", "result", "simulate", "limits"),
    "commands": ("page", "sources", "console", "sweep", "demo"),
}
"""Directions inside folders: a module may import what stands before it. The others must not form circles."""

LAZY = {
    "diagnostics": "instruments load pandas and matplotlib only where they are used",
    "cli": "a command's libraries are imported for that command only",
    "diagnostics.shared.extras": "imports the packages of extras, or says which extra to install",
}
"""The modules that may import while they run, and why."""


@dataclass(frozen=True)
class Import:
    """One import of the package's own: modules by their names below the package, and whether it stands at the top."""

    importer: str
    imported: str
    line: int
    hidden: bool

    def __str__(self) -> str:
        return f"{self.importer or '__init__'} (line {self.line}) imports {self.imported or 'the package'}"


def imports_of(package: Path) -> list[Import]:
    """Every import of the package's own modules, those in functions and under conditions too."""
    modules = {_name(package, path): path for path in package.rglob("*.py")}
    return [found for name, path in modules.items() for found in _imports(package.name, name, path, modules)]


def _name(package: Path, path: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(package: str, importer: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        for target in _targets(node, importer, path.name == "__init__.py", package):
            while target and target not in modules:  # what is imported from a module is no module
                target = target.rpartition(".")[0]
            yield Import(importer, target, node.lineno, hidden=id(node) not in top)  # type: ignore[attr-defined]


def _targets(node: ast.AST, importer: str, is_package: bool, package: str) -> list[str]:
    """Full names below the package of what a statement imports, whether modules or members."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        start = node.module or ""
        if node.level:
            parts = [package, *importer.split(".")] if importer else [package]
            start = ".".join([*parts[: len(parts) - node.level + is_package], *filter(None, [node.module])])
        names = [f"{start}.{alias.name}" for alias in node.names]
    else:
        return []
    return [name.removeprefix(package).lstrip(".") for name in names if f"{name}.".startswith(f"{package}.")]


def climbing(imports: list[Import]) -> list[str]:
    """Imports against the order of rooms, or against the order inside a folder."""
    wrong = []
    for found in imports:
        rooms = [_room(found.importer), _room(found.imported)]
        if rooms[0] != rooms[1]:
            if ROOMS.index(rooms[0]) < ROOMS.index(rooms[1]):
                wrong.append(str(found))
            continue
        order = INSIDE.get(rooms[0], ())
        places = [name.removeprefix(f"{rooms[0]}.") for name in (found.importer, found.imported)]
        if set(places) <= set(order) and order.index(places[0]) <= order.index(places[1]):
            wrong.append(str(found))
    return wrong


def _room(module: str) -> str:
    while module not in ROOMS:
        parent = module.rpartition(".")[0]
        if not parent:
            raise AssertionError(f"{module} is no room: give it a place in ROOMS")
        module = parent
    return module


def circle(imports: list[Import]) -> list[str]:
    """The modules of one circle of imports, or nothing. Faces that import while they run are no part of one."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        if found.importer not in LAZY:
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def hidden(imports: list[Import]) -> list[str]:
    """Imports in functions, in classes or under conditions, TYPE_CHECKING among them."""
    return [str(found) for found in imports if found.hidden and found.importer not in LAZY]


def test_no_import_climbs() -> None:
    assert climbing(imports_of(PACKAGE)) == []


def test_there_is_no_circle() -> None:
    assert circle(imports_of(PACKAGE)) == []


def test_no_import_is_hidden() -> None:
    assert hidden(imports_of(PACKAGE)) == []


def test_nothing_else_imports_by_name() -> None:
    """``importlib.import_module`` would hide an import from this test."""
    users = {_name(PACKAGE, path) for path in PACKAGE.rglob("*.py") if "import_module" in path.read_text()}
    assert users - {"commands.sources"} <= set(LAZY), (
        "commands.sources imports the user's module, all others stand in LAZY"
    )


@pytest.mark.parametrize(
    "files, found",
    [
        ({"rules.py": "from torch_depthmup.optim import SGD", "optim.py": ""}, climbing),
        ({"rules.py": "import torch_depthmup.optim", "optim.py": ""}, climbing),
        ({"rules.py": "from . import optim", "optim.py": ""}, climbing),
        ({"rules.py": "from torch_depthmup import optim", "optim.py": ""}, climbing),
        ({"scaling/plan.py": "from .apply import undo", "scaling/apply.py": ""}, climbing),
        ({"tracing/graph.py": "from torch_depthmup.scaling.plan import Plan", "scaling/plan.py": ""}, climbing),
        ({"optim.py": "from torch_depthmup import Plan"}, climbing),
        ({"tracing/a.py": "from .b import x", "tracing/b.py": "from torch_depthmup.tracing import a"}, circle),
        (
            {"tracing/a.py": "from .b import x", "tracing/b.py": "from .c import x", "tracing/c.py": "from . import a"},
            circle,
        ),
        ({"optim.py": "def f():\n    from torch_depthmup.rules import Rule", "rules.py": ""}, hidden),
        ({"optim.py": "if TYPE_CHECKING:\n    import torch_depthmup.rules", "rules.py": ""}, hidden),
        ({"optim.py": "class A:\n    from .rules import Rule", "rules.py": ""}, hidden),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_found(files: dict[str, str], found: object, tmp_path: Path) -> None:
    package = tmp_path / "torch_depthmup"
    for name, text in {"__init__.py": "", **files}.items():
        package.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        package.joinpath(name).write_text(text)
    assert [check for check in (climbing, circle, hidden) if check(imports_of(package))] == [found]
