"""Whether a model looks as if it had been trained or loaded before `parametrize`, which is for fresh models."""

from __future__ import annotations

import warnings

import torch
from torch import nn

__all__ = ["warn_if_trained"]

COUNTED = 10  # batches; a few may have been run to initialise or to try the model
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def warn_if_trained(model: nn.Module) -> None:
    """Warns where normalisation layers tell of training: gains that differ from channel to channel, counted batches.

    A checkpoint of a parametrized run holds its scaling already: to scale it again is to scale it twice.
    """
    for name, module in model.named_modules():
        if not isinstance(module, NORMS):
            continue
        gain = module.weight
        counted = getattr(module, "num_batches_tracked", None)
        has_gain = isinstance(gain, torch.Tensor) and not gain.is_meta and gain.numel() > 1
        if has_gain and bool((gain != gain.flatten()[0]).any()):
            told = f"the gains of {name} differ from channel to channel"
        elif counted is not None and not counted.is_meta and int(counted) > COUNTED:
            told = f"{name} has counted {int(counted)} batches"
        else:
            continue
        warnings.warn(
            f"this {type(model).__name__} looks trained or loaded: {told}. dm.parametrize scales values at "
            "initialization, and a checkpoint of a parametrized run is scaled already. Call dm.parametrize on the "
            "fresh model first, and load_state_dict after it",
            UserWarning,
            stacklevel=4,
        )
        return
