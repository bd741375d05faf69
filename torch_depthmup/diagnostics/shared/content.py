"""Short texts that are the same for the same content: of tensors, and of the code that functions come from."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torch_depthmup.running import tensors_in

__all__ = ["content_digest", "source_digest"]


def content_digest(*values: Any) -> str:
    """A short text that is the same for the same tensors, in the same order, and for no others."""
    digest = hashlib.sha256()
    for tensor in tensors_in(values):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def source_digest(*objects: Any) -> str:
    """Of the text of the modules that functions, classes or instances come from, and of what these import.

    Installed modules are left out, and those of the standard library and of this package.
    """
    texts: dict[str, bytes] = {}
    names = [_module_of(value) for value in objects]
    while names:
        name = names.pop()
        module = sys.modules.get(name)
        if name in texts or module is None or not _is_users(module):
            continue
        texts[name] = Path(str(module.__file__)).read_bytes()
        names += [_module_of(value) for value in list(vars(module).values())]
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(name.encode() + b"\0" + texts[name])
    return digest.hexdigest()[:16]


def _module_of(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _is_users(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is None or module.__name__.partition(".")[0] == "torch_depthmup" or not Path(file).is_file():
        return False
    return not Path(file).resolve().is_relative_to(sys.prefix) and not any(
        Path(file).resolve().is_relative_to(Path(place).resolve())
        for key, place in sysconfig.get_paths().items()
        if key in ("stdlib", "platstdlib", "purelib", "platlib")
    )
