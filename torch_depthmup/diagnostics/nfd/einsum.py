"""An einsum of data and one matrix as a matrix product, which a matrix that is never formed can answer."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_depthmup.errors import DepthMuPError

__all__ = ["einsum_as_matmul"]


def einsum_as_matmul(equation: str, operands: list[Tensor], at: int, name: str) -> Tensor:
    """The einsum of data and one weight that sums over one of its two indices, as a matrix product.

    Args:
        equation: of the einsum.
        operands: its tensors.
        at: which of them is the weight.
        name: what messages call the weight.

    Raises:
        DepthMuPError: it is no such product.
    """
    left, _, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    weight, indices = operands[at], terms[at]
    summed = [i for i in indices if i not in out]
    if len(operands) != 2 or len(indices) != 2 or len(summed) != 1 or "..." in out or not out:
        raise DepthMuPError(
            f"{name}: einsum {equation!r} is not a product with this matrix over one of its indices. Write it as a "
            "linear layer or matmul"
        )
    data, free = terms[1 - at], indices.replace(summed[0], "")
    kept = data.replace(summed[0], "")
    if set(kept + free) != set(out) or data.count(summed[0]) != 1 or len(set(data)) != len(data):
        raise DepthMuPError(f"{name}: einsum {equation!r} is not covered here. Write it as matmul")
    rows = operands[1 - at].movedim(data.index(summed[0]), -1)
    made = torch.matmul(rows, weight if indices[0] == summed[0] else weight.t())
    return made.permute([(kept + free).index(i) for i in out])
