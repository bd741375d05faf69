"""Runs a model of someone else's and leaves no trace: modes, buffers, caches, random states; unwraps it and its names.

Knows tensors and modules, and nothing of branches, plans or rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_depthmup.errors import MeasurementError, PlanError

__all__ = [
    "call",
    "exact_matrix_products",
    "fresh",
    "has_batch_statistics",
    "is_sharded",
    "main_output",
    "normalise_name",
    "number_of",
    "quiet",
    "tensors_in",
    "trial",
    "unwrap",
    "without_numbers",
]


WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under ``torch.compile``, DDP and DataParallel.

    Raises:
        PlanError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"models and their bases are nn.Modules, and this is a {type(model).__name__}. If it makes one, "
            "pass what it returns"
        )
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def normalise_name(name: str) -> str:
    """A parameter's name without what wrappers and parametrizations add to it."""
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix).replace("." + prefix, ".")
    return re.sub(r"\.?parametrizations\.([^.]+)\.original(\d*)$", _parametrized, name)


def _parametrized(match: re.Match[str]) -> str:
    dot = "." if match.group(0).startswith(".") else ""
    return f"{dot}{match.group(1)}" + (f".{match.group(2)}" if match.group(2) else "")


def without_numbers(name: str) -> str:
    """A module's or parameter's name with ``#`` for every number: what the same places of several blocks share.

    A number that tells apart the branches of one module (``"layers#1"``) is left out.
    """
    return re.sub(r"\d+", "#", re.sub(r"#\d+$", "", name))


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter's values are spread over processes (FSDP, tensor parallelism)."""
    return type(parameter.data).__name__ in ("DTensor", "FlatParameter", "ShardedTensor")


def number_of(value: Tensor) -> float:
    """A tensor of one element as a number, also where it is spread over processes."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)


def call(model: nn.Module, example_inputs: Any) -> Any:
    """The model on example inputs: a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings, dataclasses and plain objects."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, tuple | list):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, f.name) for f in dataclasses.fields(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not inspect.isroutine(value):
        items = vars(value).values()
    for item in items:
        yield from tensors_in(item, seen)


def fresh(value: Any) -> Any:
    """Copies of the example inputs that autograd follows and in-place operations may overwrite.

    A sparse one is taken for a constant, such as the edges of a graph: what multiplies it has seldom a gradient for it.
    """
    if isinstance(value, Tensor):
        copy = value.detach().clone()  # a copy of an inference tensor is an ordinary one
        followed = (copy.is_floating_point() or copy.is_complex()) and copy.layout in (torch.strided, torch.jagged)
        return copy.requires_grad_().clone() if followed else copy
    if isinstance(value, Mapping):
        return {key: fresh(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(fresh, value))
    return type(value)(map(fresh, value)) if isinstance(value, tuple | list) else value


def trial(model: nn.Module, example_inputs: Any) -> Any:
    """The model on copies of the example inputs; what its forward pass writes to parameters and attributes is undone.

    Some networks rescale their weights when they find themselves in evaluation mode, and note in an attribute that
    they did (RWKV).
    """
    kinds = (bool, int, float, str, type(None))
    plain = [(m, {k: v for k, v in vars(m).items() if type(v) in kinds}) for m in model.modules()]
    with _Writes() as writes:
        output = call(model, fresh(example_inputs))
    if writes.before:
        with torch.no_grad():
            for parameter, value in writes.before.values():
                parameter.copy_(value)
        for module, attributes in plain:
            vars(module).update(attributes)
    return output


class _Writes(TorchFunctionMode):
    """Keeps what parameters were before a function wrote into them."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], nn.Parameter) and _writes(getattr(func, "__name__", "")):
            self.before.setdefault(id(args[0]), (args[0], args[0].detach().clone()))
        return func(*args, **(kwargs or {}))


def _writes(name: str) -> bool:
    """Whether the function of that name writes into its first argument: ``div_``, ``__itruediv__``, ``__setitem__``."""
    in_place = name.endswith("_") and not name.endswith("__") or name.startswith("__i") or name == "__setitem__"
    return in_place and name != "requires_grad_"


_ONE_AT_A_TIME = threading.RLock()  # modes, buffers and random states are everybody's


@contextlib.contextmanager
def quiet(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """Evaluation mode with gradients; mode, buffers, RNG and ``requires_grad`` come back as they were.

    Threads take turns. Under autocast weights are cast anew: a cached cast does not see what was done to a weight.

    Args:
        model: any module.
        batch_statistics: normalise by the batch instead of by the running statistics, which at initialization are
            those of no data at all and let deep networks overflow.
    """
    with _ONE_AT_A_TIME, _without_cached_casts(), _undisturbed(model, batch_statistics):
        yield


@contextlib.contextmanager
def _without_cached_casts() -> Iterator[None]:
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def _undisturbed(model: nn.Module, batch_statistics: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies = {id(b): b.detach().clone() for _, own in buffers for b in own.values() if b is not None}
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpy_state = numpy_random.get_state() if numpy_random else None
    python_state = random.getstate()
    indices = [d.index for d in devices if d.index is not None and d.type == "cuda"]
    try:
        # The pass gets copies, so that the buffers are never written to: a graph may wait for its backward pass.
        for module, own in buffers:
            module._buffers.update({name: b if b is None else copies[id(b)] for name, b in own.items()})
        for module, _ in modes:
            module.training = batch_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm)
        for parameter in frozen:
            parameter.requires_grad_()
        with (
            torch.random.fork_rng(devices=indices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module in [module for module, _ in modes if type(module).train is not nn.Module.train]:
            module.train()  # its own way of letting go of what it cached in evaluation mode
        for module, training in modes:
            module.training = training
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)
        random.setstate(python_state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


def has_batch_statistics(model: nn.Module, inputs: Any) -> bool:
    """Whether the model has batch norms, and the batch enough samples for statistics of its own."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if any(isinstance(norm, nn.SyncBatchNorm) for norm in norms) and _is_distributed():
        return False  # synchronised statistics would wait for the other processes
    try:
        if norms:
            with quiet(model, batch_statistics=True), torch.no_grad():
                trial(model, inputs)
    except ValueError:  # "Expected more than 1 value per channel when training"
        return False
    return bool(norms)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def exact_matrix_products() -> Iterator[None]:
    """Without TF32, whose rounding would hide what is measured."""
    saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved


def main_output(output: Any) -> Tensor:
    """The tensor that stands for the function: ``logits`` where there are any, else the first floating one."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    candidates = [logits] if isinstance(logits, Tensor) else tensors_in(output)
    for tensor in candidates:
        if tensor.is_floating_point() and tensor.ndim > 0:
            return tensor
    raise MeasurementError("the model returned no floating-point tensor with a batch dimension. Return its outputs")
