"""The networks of several seeds in one forward and backward pass, by `torch.vmap` over everything but hidden matrices.

Where networks cannot be batched so, or their seeds differ in more than numbers, `Apart` or an error of torch's is
raised, and the seeds are trained in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from torch_depthmup.diagnostics.nfd.gaussian import GaussianMatrix
from torch_depthmup.diagnostics.nfd.implicit import ImplicitWeight
from torch_depthmup.diagnostics.nfd.shared import Apart, SeedsMatrix, Shared
from torch_depthmup.running import call, main_output, tensors_in

__all__ = ["Together"]


class Together:
    """The networks of several seeds, which the model of the first one's code runs side by side.

    Args:
        models: one for each seed, with hidden matrices as `ImplicitWeight`.

    Raises:
        Apart: they differ in more than the numbers in their parameters and buffers.
    """

    def __init__(self, models: Sequence[nn.Module]):
        self.models = models
        _check_alike(models)
        named = [dict(model.named_parameters()) for model in models]
        self._parameters: dict[str, list[Tensor]] = {
            name: [parameters[name] for parameters in named]
            for name, parameter in named[0].items()
            if not isinstance(parameter, ImplicitWeight)
        }
        self._buffers = [dict(model.named_buffers()) for model in models]
        self._matrices = {
            name: SeedsMatrix([parameters[name] for parameters in named])  # type: ignore[misc]
            for name, parameter in named[0].items()
            if isinstance(parameter, ImplicitWeight)
        }
        self.starts: Mapping[str, GaussianMatrix] = {name: matrix.start for name, matrix in self._matrices.items()}
        self._seeds = torch.zeros(len(models), device=next(iter(self._matrices.values())).weights[0].device)

    def __call__(self, inputs: Any, loss: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Main outputs (seeds, *output) and losses (seeds,) on the same inputs."""
        for matrix in self._matrices.values():
            matrix.now = matrix.trained()
        parameters = {name: torch.stack(values) for name, values in self._parameters.items()}
        buffers = {name: torch.stack([own[name] for own in self._buffers]) for name in self._buffers[0]}

        def one(seed: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            matrices = {name: Shared.of(matrix, seed) for name, matrix in self._matrices.items()}
            with _holding(self.models[0], {**parameters, **matrices}, buffers) as held:
                output = call(self.models[0], inputs)
                return main_output(output), loss(output), held()

        with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
            outputs, losses, left = torch.vmap(one, randomness="error")(self._seeds, parameters, buffers)
        self._keep(left)
        return outputs, losses

    def _keep(self, buffers: Mapping[str, Tensor]) -> None:
        """Each seed's model gets the buffers that the pass left, such as running means."""
        with torch.no_grad():
            for name, values in buffers.items():
                for own, value in zip(self._buffers, values, strict=True):
                    own[name].copy_(value)


@contextmanager
def _holding(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """The model with other tensors, and its own afterwards. Gives what reads off the buffers that it holds then."""
    given = {id(own): parameters[name] for name, own in model.named_parameters()}
    given |= {id(own): buffers[name] for name, own in model.named_buffers()}
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (store, key, own)
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for key, own in store.items()
        if own is not None
    ]
    try:
        for store, key, own in places:
            store[key] = given[id(own)]
        yield lambda: _buffers_left(model, buffers)
    finally:
        for store, key, own in places:
            store[key] = own


def _buffers_left(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for module in model.modules():
        if any(isinstance(v, Tensor) and torch._C._functorch.is_batchedtensor(v) for v in vars(module).values()):
            raise Apart("a module keeps a tensor from one pass to the next")
    left = dict(model.named_buffers())
    if any(left[name].shape != value.shape for name, value in before.items()) or len(left) != len(before):
        raise Apart("a pass changes what buffers there are")
    return left


def _check_alike(models: Sequence[nn.Module]) -> None:
    """The first model's code is run for all, so what is neither parameter nor buffer must be the same in all."""
    for modules in zip(*(model.modules() for model in models), strict=True):
        if any(_foreign_hooks(module) for module in modules):
            raise Apart("hooks may follow one network and not the others")
        first, *others = (_own(module) for module in modules)
        if not all(_same(first, other) for other in others):
            raise Apart("their modules hold other values")


def _own(module: nn.Module) -> list[Any]:
    """What a module holds besides parameters, buffers and modules, as far as that are numbers and words."""
    torchs_own = vars(nn.Module())
    held = {key: value for key, value in sorted(vars(module).items()) if key not in torchs_own}
    own: list[Any] = [type(module)]
    for value in tree_flatten(held)[0]:
        if isinstance(value, nn.Module):
            raise Apart("a module holds another one that torch does not know of")
        if isinstance(value, bool | int | float | complex | str | torch.dtype):
            own.append(value)
        else:
            own += [torch.as_tensor(value)] if hasattr(value, "__array__") else tensors_in(value)
    return own


def _same(one: list[Any], other: list[Any]) -> bool:
    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
        return type(a) is type(b) and (a == b or (a != a and b != b))

    return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))


def _foreign_hooks(module: nn.Module) -> bool:
    """Whether anything but this package's own multipliers acts when the module is called."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    return any(not type(hook).__module__.startswith("torch_depthmup.") for hook in hooks)
