"""Which live modules have which plan, and which parameter is which of a plan's.

A plan sits on its module as an attribute. A deep copy of the module is known too. A pickle of the module holds the plan
as plain data, so that it loads where this package is not installed, and is known again where it is.
"""

from __future__ import annotations

import gc
import math
import statistics
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from torch_depthmup.errors import PlanError
from torch_depthmup.scaling.checkpoints import load_count, note_in_checkpoints, take_off_notes
from torch_depthmup.scaling.plan import Plan, PlannedParameter

__all__ = [
    "ATTRIBUTE",
    "Handle",
    "Planned",
    "beside",
    "discover",
    "folded_multipliers",
    "forget",
    "owner_of",
    "owners",
    "plan_of",
    "planned_parameters",
    "refuse_replaced",
    "refuse_shared_with_others",
    "trust_sizes",
    "warn_if_rewritten",
    "way_out_of_folding",
]

ATTRIBUTE = "_torch_depthmup"
TELLING = 64  # entries from which on a size tells
ALIKE = 0.1  # relative difference of sizes of values that are drawn from one distribution
Planned = tuple[Plan, str]
"""A plan and the planned name of one parameter."""

_folded: dict[int, tuple[weakref.ref[Tensor], float]] = {}  # what folded_multipliers has looked up


class Handle:
    """A plan on its module.

    Args:
        owner: the module; ``None`` where it is not known yet.
        plan: its plan.
        versions: how often each parameter had been written to when the plan was carried out; ``None`` on a copy.
        set_shapes: whether mup's ``infshape`` was put on the parameters.
    """

    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __init__(
        self,
        owner: nn.Module | None,
        plan: Plan,
        versions: Mapping[str, int] | None = None,
        set_shapes: bool = False,
    ):
        self.owner = None if owner is None else weakref.ref(owner)
        self.plan = plan
        self.versions = versions
        self.set_shapes = set_shapes
        self.modules: dict[str, tuple[weakref.ref[nn.Module], weakref.ref[Tensor]]] = {}
        self.sizes: dict[str, float] = {}
        if owner is not None:
            self.alive.add(owner)
            _folded.clear()
            note_in_checkpoints(owner, plan)

    @staticmethod
    def attach(model: nn.Module, plan: Plan, set_shapes: bool) -> None:
        """Makes a plan known as that of a module."""
        versions = {name: parameter._version for name, parameter in model.named_parameters()}
        handle = vars(model)[ATTRIBUTE] = Handle(model, plan, versions, set_shapes)
        handle.remember(model)
        unscaled = _unscaled_sizes(plan)
        for name, parameter in model.named_parameters():
            if name in unscaled and _tells(parameter):
                handle.sizes[name] = float(parameter.detach().norm())

    def remember(self, owner: nn.Module) -> None:
        """Notes which module holds each parameter, to notice later that one was replaced."""
        modules = dict(owner.named_modules())
        self.modules = {
            name: (weakref.ref(modules[name.rpartition(".")[0]]), weakref.ref(parameter))
            for name, parameter in owner.named_parameters()
        }

    def was_replaced(self, owner: nn.Module, name: str, parameter: Tensor) -> bool:
        """Whether both a parameter and the module that holds it are other objects than when the plan was made."""
        known = self.modules.get(name)
        if known is None:
            return False
        module, was = known
        return was() is not parameter and module() is not owner.get_submodule(name.rpartition(".")[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        # A module is in the memo before its attributes are copied.
        return Handle(memo.get(id(self.owner())) if self.owner else None, self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        # A class that torch.load(weights_only=True) knows too.
        return OrderedDict, (), None, None, iter({"plan": self.plan.to_json(indent=None)}.items())


def _handle(module: nn.Module) -> Handle:
    """The handle of a module with a plan: made anew after pickling and after a copy that did not bring its own."""
    held = vars(module)[ATTRIBUTE]
    if isinstance(held, Handle) and held.owner is not None and held.owner() is module:
        return held
    plan = held.plan if isinstance(held, Handle) else Plan.from_json(held["plan"])
    handle = vars(module)[ATTRIBUTE] = Handle(module, plan)
    return handle


def owners() -> list[tuple[nn.Module, Plan]]:
    """All live parametrized modules with their plans, copies included."""
    return [(module, _handle(module).plan) for module in list(Handle.alive) if ATTRIBUTE in vars(module)]


def discover() -> None:
    """Makes modules known that came with a plan from a pickle. Looks at every live object: about 0.1 s."""
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and ATTRIBUTE in vars(thing):
            _handle(thing)


def plan_of(model: nn.Module) -> Plan:
    """The plan of a parametrized model, looked for through wrappers (compile, DDP, EMA) and in submodules.

    Raises:
        PlanError: the model has no plan, or several.
    """
    return _handle(owner_of(model)).plan


def owner_of(model: nn.Module) -> nn.Module:
    """The module on which a plan was carried out: the model itself, or what a wrapper holds."""
    found = [module for module in model.modules() if ATTRIBUTE in vars(module)]
    if not found:
        raise PlanError(f"{type(model).__name__} has no plan. Call dm.parametrize(model, ...) first")
    if len(found) > 1:
        raise PlanError(f"{type(model).__name__} holds {len(found)} parametrized modules. Ask for the plan of one")
    _handle(found[0])
    return found[0]


def planned_parameters(model: nn.Module | None = None) -> dict[int, Planned]:
    """The plan and the planned name of every parameter, by its id, of all live modules or of those in one model."""
    inside = [m for m, _ in owners()] if model is None else [m for m in model.modules() if ATTRIBUTE in vars(m)]
    found: dict[int, Planned] = {}
    for owner in inside:
        handle = _handle(owner)
        for name, parameter in owner.named_parameters(remove_duplicate=True):
            found[id(parameter)] = handle.plan, _unpruned(owner, name)
    return found


def folded_multipliers(parameters: Sequence[Tensor]) -> list[float]:
    """The forward multiplier that each parameter's value contains; 1 for parameters without a plan.

    Raises:
        PlanError: a flat parameter of FSDP1 holds several parameters of a folded plan.
    """
    known = [_folded.get(id(parameter)) for parameter in parameters]
    if any(k is None or k[0]() is not p for k, p in zip(known, parameters, strict=True)):
        planned = planned_parameters()
        if any(id(p) not in planned for p in parameters):
            discover()
            planned = planned_parameters()
        for parameter in parameters:
            folded = _folded_multiplier(parameter, planned.get(id(parameter)))
            _folded[id(parameter)] = weakref.ref(parameter), folded
        known = [_folded[id(parameter)] for parameter in parameters]
    return [k[1] for k in known if k is not None]


def _folded_multiplier(parameter: Tensor, planned: Planned | None) -> float:
    if planned is None:
        return 1.0
    plan, name = planned
    try:
        return plan[name].folded
    except PlanError:
        if type(parameter.data).__name__ == "FlatParameter" or type(parameter).__name__ == "FlatParameter":
            raise PlanError(
                f"{name} is a flat parameter of FSDP1, in which folded multipliers cannot be told apart. Write "
                "FSDP(..., use_orig_params=True), use fully_shard, or write how='wrap'"
            ) from None
        return 1.0  # added after dm.parametrize, so nothing was folded into it


def forget(model: nn.Module) -> None:
    """Takes the plan off a module."""
    del vars(model)[ATTRIBUTE]
    take_off_notes(model)
    Handle.alive.discard(model)
    _folded.clear()


def _unpruned(owner: nn.Module, name: str) -> str:
    """A pruned weight's own name: ``torch.nn.utils.prune`` calls it ``weight_orig`` and multiplies it by a mask."""
    path, _, last = name.rpartition(".")
    if not last.endswith("_orig"):
        return name
    hooks = owner.get_submodule(path)._forward_pre_hooks.values()
    pruned = any(isinstance(hook, prune.BasePruningMethod) for hook in hooks)
    return name.removesuffix("_orig") if pruned else name


def refuse_replaced(parameters: Iterable[Tensor]) -> None:
    """Refuses parameters that took the place of ones that the plan had scaled, by assignment or by tying.

    Raises:
        PlanError: names the first such parameter.
    """
    wanted = {id(parameter) for parameter in parameters}
    planned: dict[int, PlannedParameter] = {}
    for owner, plan in owners():
        handle = _handle(owner)
        for name, parameter in owner.named_parameters(remove_duplicate=False):
            if id(parameter) not in wanted:
                continue
            try:
                entry = plan[name]
            except PlanError:
                continue  # the optimizer has words for parameters without a plan
            first = planned.setdefault(id(parameter), entry)
            if first != entry and (_scaled(first) or _scaled(entry)):
                raise PlanError(
                    f"{first.name} and {entry.name} were tied after dm.parametrize, which had scaled them as two "
                    "parameters. Tie them first and call dm.parametrize after it, on a fresh model"
                )
            if not _scaled(entry):
                continue
            if handle.was_replaced(owner, name, parameter):
                raise PlanError(
                    f"{name} was replaced after dm.parametrize, so its value is not scaled as the plan says. Replace "
                    "modules first and call dm.parametrize after it, on a fresh model"
                )
            if entry.folded != 1.0 and ".parametrizations." in f".{name}" and ".parametrizations." not in entry.name:
                raise PlanError(
                    f"{name} was reparametrized (weight norm, spectral norm, ...) after a multiplier had been folded "
                    "into it, which may take the multiplier out again. Reparametrize first and call dm.parametrize "
                    "after it, or write how='wrap'"
                )


LOADED = (
    "{} was loaded with values of a model whose multipliers are elsewhere, or that has none: it is {:.3g} times as "
    "large as dm.parametrize left it. Load a checkpoint of a run with this plan, or see dm.convert_state_dict and "
    "dm.attach"
)
WRITTEN = (
    "{} was written to after dm.parametrize (initialised again?): it is {:.3g} times as large as dm.parametrize left "
    "it. Initialise first, and call dm.parametrize after it"
)


def warn_if_rewritten(parameters: Iterable[Tensor]) -> None:
    """Warns where scaled values were written to before their first optimizer, and have lost the plan's factor by it.

    Initialised again, or loaded from a model without the factor. Trained values that were loaded are any size.
    """
    wanted = {id(parameter) for parameter in parameters}
    for owner, plan in owners():
        ratios = _sizes_now(owner, wanted)
        if load_count(owner):
            told, message = (list(ratios) if _lack_the_factors(plan, ratios) else []), LOADED
        else:
            told, message = [name for name in ratios if plan[name].size_factor != 1.0], WRITTEN
            told = [name for name in told if abs(ratios[name] - 1) > _chance(owner.get_parameter(name))]
        if told:
            warnings.warn(message.format(told[0], ratios[told[0]]), UserWarning, stacklevel=6)
            return


def _sizes_now(owner: nn.Module, wanted: set[int]) -> dict[str, float]:
    """The sizes of parameters that were written to, over what they were; those ``wanted`` are not asked for again."""
    handle, ratios = _handle(owner), {}
    for name, parameter in owner.named_parameters():
        if name in handle.sizes and id(parameter) in wanted:
            size = handle.sizes.pop(name)
            if parameter._version != (handle.versions or {}).get(name) and _tells(parameter):
                ratios[name] = float(parameter.detach().norm()) / size
    return ratios


def _lack_the_factors(plan: Plan, ratios: Mapping[str, float]) -> bool:
    """Whether sizes are those of a model without the plan."""
    unscaled = _unscaled_sizes(plan)
    off = [abs(r / unscaled[name] - 1) for name, r in ratios.items() if abs(unscaled[name] - 1) > 2 * ALIKE]
    return bool(off) and statistics.median(off) < ALIKE / 2 and max(off) < 2 * ALIKE


def _holding(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The parametrized modules that hold some of the parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return [owner for owner, _ in owners() if any(id(parameter) in wanted for parameter in owner.parameters())]


def beside(parameters: Iterable[Tensor]) -> list[Tensor]:
    """All parameters of the parametrized modules that hold some of them."""
    return [parameter for owner in _holding(parameters) for parameter in owner.parameters()]


def way_out_of_folding(parameters: Iterable[Tensor]) -> str:
    """What to write so that no value contains a multiplier: ``how="wrap"``, and more where width has put some there."""
    kept: dict[str, PlannedParameter] = {}
    for plan in (plan_of(owner) for owner in _holding(parameters)):
        carriers = {name for branch in plan.branches for name in branch.carrier} if plan.how == "fold" else set()
        kept |= {e.name: e for e in plan.entries if e.folded * e.present != 1.0 and e.name not in carriers}
    wrap = "dm.parametrize(..., how='wrap')"
    if not kept:
        return wrap
    names = f"{', '.join(list(kept)[:3])}{', ...' if len(kept) > 3 else ''}"
    readout = any(entry.width is not None and entry.width.kind == "readout" for entry in kept.values())
    own = "with a mup.MuReadout for the readout of model and base, or " if readout else ""
    return f"{wrap} {own}with a base as wide as the model: width's factor is in {names} otherwise"


def trust_sizes(parameters: Iterable[Tensor]) -> None:
    """Ends what `warn_if_rewritten` waits for: something else has trained the parameters."""
    for owner in _holding(parameters):
        _handle(owner).sizes.clear()


def _chance(parameter: Tensor) -> float:
    """How far sizes of two draws may be apart: DDP writes those of the first process into the others."""
    return 0.02 + 4 / math.sqrt(parameter.numel())


def _tells(parameter: Tensor) -> bool:
    return (
        type(parameter.data) is Tensor
        and not parameter.is_meta
        and parameter.numel() >= TELLING
        and bool(parameter.any())
    )


def _unscaled_sizes(plan: Plan) -> dict[str, float]:
    """The size that a value has in a model without the plan, or with it the other way, over its size in this one."""
    sizes = {}
    if plan.how == "wrap":
        sizes = {name: planned.supplied for planned in plan.planned_branches for name in planned.branch.carrier}
    sizes |= {entry.name: 1 / entry.size_factor for entry in plan.entries if entry.size_factor not in (0.0, 1.0)}
    return {name: size for name, size in sizes.items() if size != 1.0}


def _scaled(entry: PlannedParameter) -> bool:
    width = entry.width.multiplier if entry.width else 1.0
    return (entry.folded, entry.scale, entry.depth_multiplier, width) != (1.0, 1.0, 1.0, 1.0)


def refuse_shared_with_others(model: nn.Module) -> None:
    """Refuses a model whose parameters are planned already, as part of another module.

    Raises:
        PlanError: names the first such parameter.
    """
    known = planned_parameters()
    for name, parameter in model.named_parameters():
        if id(parameter) in known:
            raise PlanError(
                f"{name} was scaled already, as {known[id(parameter)][1]} of another module on which dm.parametrize "
                "was called. Call it once, on the module that holds all of them"
            )
