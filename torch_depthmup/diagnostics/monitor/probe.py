"""One pass of a probe batch: the residual stream and every weight operation, seen without touching the network.

Nothing is hung on the model. A function mode reads the residual additions that `tracing` found; a dispatch mode reads
the matrix products and convolutions with a weight, however the network writes them (modules, functional code, packed
attention). This module knows no rule and compares nothing: `recording.py` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_depthmup.errors import MeasurementError
from torch_depthmup.running import (
    exact_matrix_products,
    has_batch_statistics,
    main_output,
    quiet,
    tensors_in,
    trial,
    unwrap,
)
from torch_depthmup.tracing.branches import Trace, trace
from torch_depthmup.tracing.replay import AtAdditions

__all__ = ["Key", "Kind", "Probe", "Product", "Sights", "signed_sum"]

aten = torch.ops.aten


class Kind(Enum):
    """What is watched."""

    FUNCTION = "function"
    STREAM = "stream"
    LAYER = "layer"


@dataclass(frozen=True)
class Key:
    """What a measured feature belongs to.

    Args:
        kind: the function, a residual stream after an addition, or a weight operation.
        name: the weight's parameter name, for a weight operation.
        number: the branch's index, for a residual stream; which use of its weight it is, for a weight operation.
    """

    kind: Kind
    name: str = ""
    number: int = 0

    def __str__(self) -> str:
        """As in the rows: from a weight's second use on with ``#1``, ``#2``, ..."""
        return f"{self.name}#{self.number}" if self.number else self.name


@dataclass(frozen=True)
class Product:
    """A weight operation of the probe pass.

    Args:
        key: the weight's parameter name, and the how-manieth use of the weight in the pass it is.
        weight: the operand that depends on parameters only, as the operation got it.
        value: ``W h`` without a bias.
        times: the same operation on the same input with another weight and no bias.
    """

    key: Key
    weight: Tensor
    value: Tensor
    times: Callable[[Tensor], Tensor]


@dataclass
class Sights:
    """What a pass leaves: the main output, and the gradients of the objective where the pass was looked at."""

    output: Tensor
    gradients: dict[Key, Tensor | None]


def signed_sum(output: Any) -> Tensor:
    """The default objective: the main output times fixed random signs, summed, over the root of its size per sample.

    A scalar whose gradient reaches all features, and which needs no targets.
    """
    value = main_output(output)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, value.shape[1:], generator=generator).mul_(2).sub_(1)
    return (value * signs.to(value)).sum() / max(1, signs.numel()) ** 0.5


class Probe:
    """A model and a batch to look at it with.

    Args:
        model: any module; compiled and DDP wrappers are looked through, and the module inside runs eagerly.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
        objective: model output -> scalar whose gradients are measured.
        options: of `trace`: ``include``, ``exclude``, ``branches``.

    Raises:
        MeasurementError: the inputs are on another device, or the model has no residual branches.
        TracingError: the branches cannot be read off the forward pass.
    """

    def __init__(self, model: nn.Module, inputs: Any, objective: Callable[[Any], Tensor], **options: Any):
        self.model, self.inputs, self.objective = unwrap(model), inputs, objective
        _check_devices(self.model, inputs)
        self.found: Trace = trace(self.model, inputs, **options)
        if not self.found.branches:
            raise MeasurementError(
                f"{type(self.model).__name__} has no residual branches to watch. Name them: branches=['<module whose "
                "output is added to the skip>']"
            )
        hidden = [traced.branch.name for traced in self.found.traced if traced.site is None]
        if hidden:
            raise MeasurementError(
                f"{hidden[0]}: its addition happens out of Python's sight (a scripted module?), so it cannot be "
                "watched. Write the addition in Python, or use dm.Residual"
            )
        self.batch_statistics = has_batch_statistics(self.model, inputs)

    def run(
        self, see_product: Callable[[Product], bool | None], see_stream: Callable[[int, Tensor, Tensor], None]
    ) -> Sights:
        """Runs the probe batch forward and the objective backward. The model and all random states stay as they were.

        Args:
            see_product: called with each weight operation; returning ``False`` saves its gradient.
            see_stream: called at each residual addition with the branch's index, the sum, and the branch's value.
        """
        with self._undisturbed(), exact_matrix_products():
            streams, products = _Streams(self.found, see_stream), _Products(self.model, see_product)
            with streams, products:
                output = trial(self.model, self.inputs)
            products.settle()
            edges = products.edges | streams.edges
            gradients = torch.autograd.grad(self.objective(output), list(edges.values()), allow_unused=True)
        return Sights(main_output(output).detach(), dict(zip(edges, gradients, strict=True)))

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """`quiet`, without the caller's autocast."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet(self.model, batch_statistics=self.batch_statistics))
            for device in {p.device.type for p in self.model.parameters()}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield


def _check_devices(model: nn.Module, inputs: Any) -> None:
    if any(tensor.ndim and not len(tensor) for tensor in tensors_in(inputs)):
        raise MeasurementError("the probe holds no samples. A few will do")
    devices = {p.device for p in model.parameters()}
    if any(device.type == "meta" for device in devices):
        raise MeasurementError("the model is on the meta device and has no values to watch. Materialise it first")
    for tensor in tensors_in(inputs):
        if devices and tensor.device not in devices:
            raise MeasurementError(
                f"the probe is on {tensor.device}, the model on {', '.join(sorted(map(str, devices)))}. Move the probe "
                "to the model's device"
            )


class _Streams(AtAdditions):
    """Reads the residual additions."""

    def __init__(self, found: Trace, see: Callable[[int, Tensor, Tensor], None]):
        super().__init__(found)
        self.see, self.edges = see, dict[Key, Any]()

    def meet(
        self, branch: int, position: int, operands: tuple[Tensor, Tensor], func: Callable, args: tuple, kwargs: dict
    ) -> Any:
        value = operands[position].detach().clone()  # the sum may be written over it
        result = func(*args, **kwargs)
        self.edges[Key(Kind.STREAM, number=branch)] = torch.autograd.graph.get_gradient_edge(result)
        with torch.no_grad():
            self.see(branch, result.detach(), value)
        return result


class _Products(TorchDispatchMode):
    """Reads the weight operations: products of data with what depends on parameters and buffers only.

    Made where the pass runs, which has buffers of its own.
    """

    def __init__(self, model: nn.Module, see: Callable[[Product], bool | None]):
        super().__init__()
        self.see, self.uses = see, dict[str, int]()
        self.edges: dict[Key, Any] = {}
        self.pending: tuple[Key, Tensor] | None = None
        # For each storage that depends on parameters only: which names, from where to where in it.
        self.constant: dict[int, list[tuple[tuple[str, ...], int, float]]] = {}
        self.alive: list[Tensor] = []
        for name, parameter in model.named_parameters():
            start = int(parameter.storage_offset())
            self._mark(parameter, ((name,), start, start + max(1, int(parameter.numel()))))
        for _, buffer in model.named_buffers():
            self._mark(buffer, ((), 0, float("inf")))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.settle()
        kwargs = kwargs or {}
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list | tuple) else (a,))]
        tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        names = [self._names(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        if tensors and all(name is not None for name in names):
            joined = tuple(sorted({n for name in names if name for n in name}))
            for out in result if isinstance(result, list | tuple) else (result,):
                if isinstance(out, Tensor) and self._names(out) is None:
                    self._mark(out, (joined, 0, float("inf")))
        elif func.overloadpacket in OPERANDS:
            self._look(func, args, kwargs, result)
        return result

    def settle(self) -> None:
        """Notes where the last product's gradient arrives. Autograd has recorded the product only by now."""
        if self.pending is not None:
            (key, out), self.pending = self.pending, None
            if out.requires_grad:
                self.edges[key] = torch.autograd.graph.get_gradient_edge(out)

    def _mark(self, tensor: Tensor, entry: tuple[tuple[str, ...], int, float]) -> None:
        self.alive.append(tensor)  # so that the storage's address stays taken
        self.constant.setdefault(tensor.untyped_storage()._cdata, []).append(entry)

    def _names(self, tensor: Tensor) -> tuple[str, ...] | None:
        entries = self.constant.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
        if entries is None:
            return None
        at = tensor.storage_offset()
        return next((names for names, start, end in entries if start <= at < end), ())

    def _look(self, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
        first, second, added = OPERANDS[func.overloadpacket]
        weights = [i for i in (first, second) if self._names(args[i])]
        if len(weights) != 1 or args[weights[0]].ndim < 2:
            return
        at = weights[0]
        name = min(self._names(args[at]) or (), key=len)
        use = self.uses[name] = self.uses.get(name, -1) + 1
        key = Key(Kind.LAYER, name, use)
        value, times = result.detach(), _without_addend(func, args, kwargs, at)
        if added is not None and len(args) > added and isinstance(args[added], Tensor):
            value = value - _addend(func, args, kwargs, added, value)
        with torch.no_grad():
            wanted = self.see(Product(key, args[at].detach(), value, times))
        if wanted is not False:
            self.pending = (key, result)


OPERANDS: dict[Any, tuple[int, int, int | None]] = {
    aten.mm: (0, 1, None),
    aten.bmm: (0, 1, None),
    aten.mv: (0, 1, None),
    aten.addmm: (1, 2, 0),
    aten.baddbmm: (1, 2, 0),
    aten.addmv: (1, 2, 0),
    aten.linear: (0, 1, 2),
    aten.convolution: (0, 1, 2),
}
"""The two factors of each weight operation among its arguments, and what is added to their product."""
if hasattr(aten, "_grouped_mm"):  # experts side by side
    OPERANDS[aten._grouped_mm] = (0, 1, None)

PLAIN = {aten.addmm: aten.mm, aten.baddbmm: aten.bmm, aten.addmv: aten.mv}
"""The operation that is left without the addend."""


def _without_addend(func: Any, args: tuple, kwargs: dict, at: int) -> Callable[[Tensor], Tensor]:
    def times(weight: Tensor) -> Tensor:
        changed: Sequence[Any] = [*args[:at], weight, *args[at + 1 :]]
        packet = func.overloadpacket
        if packet in PLAIN:
            return PLAIN[packet](changed[1], changed[2]) * kwargs.get("alpha", 1)
        if packet in (aten.linear, aten.convolution):
            return packet(*changed[:2], None, *changed[3:])
        return packet(*changed, **kwargs)

    return times


def _addend(func: Any, args: tuple, kwargs: dict, added: int, value: Tensor) -> Tensor:
    addend = args[added].detach()
    if func.overloadpacket is aten.convolution:
        return addend.reshape(-1, *(1,) * (value.ndim - 2))
    return addend * kwargs.get("beta", 1)
