"""The numbers that a forward pass multiplies around an operation on a weight: on the weight, its data and its value.

``W / sqrt(n) @ x``, ``W @ (x / sqrt(n))`` and ``(W @ x) / sqrt(n)`` are one network, and so is an embedding times the
root of its width. Where an operation's weight and another's could both answer for a number, one of them does.
"""

from __future__ import annotations

import math

from torch_depthmup.tracing.graph import Graph
from torch_depthmup.tracing.operations import Kind

__all__ = ["Factors"]


class Factors:
    """The factors around each operation of a graph.

    Args:
        graph: the forward pass.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.before = {i: self._before(i) for i, node in enumerate(graph.nodes) if node.is_weight_operation}
        """The numbers that only the data of weight operations is multiplied with, by their nodes."""
        self.taken = frozenset().union(*self.before.values())

    def of_use(self, node: int, operand: int, name: str) -> float:
        """What one use of a parameter is multiplied with; 1 where other weights make the operand of it."""
        if self._is_made_by_weights(operand):
            return 1.0
        return self._on_parameter(operand, name) * self._inside(node, operand) * self.after(node)[0]

    def number(self, node: int) -> float:
        """The constant that a node multiplies its one operand with, else 1."""
        found = self.graph.nodes[node]
        alone = found.kind.is_product and sum(j >= 0 for j in found.inputs) == 1
        return found.factor if alone and (found.kind is Kind.MULTIPLY or found.inputs[0] >= 0) else 1.0

    def _is_made_by_weights(self, operand: int) -> bool:
        """Whether a product of weights is on the way to an operand, as for a query that is a parameter."""
        pending = [operand]
        for i in pending:
            if self.graph.nodes[i].kind.takes_one_factor_of_data:
                return True
            pending += [j for j in self.graph.nodes[i].inputs if j >= 0]
        return False

    def is_bias(self, node: int, operand: int) -> bool:
        """Whether an operand is added to the product of the others in one operation."""
        found = self.graph.nodes[node]
        place = {Kind.MATRIX_PRODUCT: -3, Kind.CONVOLUTION: 2}.get(found.kind)
        return place is not None and len(found.inputs) > 2 and found.inputs[place] == operand

    def _on_parameter(self, operand: int, name: str) -> float:
        """What a parameter is multiplied with before it enters as an operand: where it does so in one way."""
        graph, factors = self.graph, set[float]()
        pending = [(operand, 1.0)]
        while pending:
            i, factor = pending.pop()
            node = graph.nodes[i]
            below = [j for j in node.inputs if j >= 0 and name in graph.nodes[j].weights]
            if not below or not (node.kind.is_sum or node.kind is Kind.LINEAR or self._is_passed(i)):
                factors.add(factor)
            else:
                pending += [(j, factor * self.number(i)) for j in below]
        return factors.pop() if len(factors) == 1 else 1.0

    def _inside(self, node: int, operand: int) -> float:
        """What an operation's data is multiplied with; 1 for an operand that does not multiply them, as a bias."""
        found = self.graph.nodes[node]
        if self.is_bias(node, operand):
            return 1.0
        number = found.factor if found.kind is Kind.MATRIX_PRODUCT else 1.0
        return number * math.prod(self.number(i) for i in self.before.get(node, ()))

    def after(self, node: int) -> tuple[float, bool]:
        """The product of the numbers behind an operation, as long as one thing takes the value; whether scores do."""
        graph, factor = self.graph, 1.0
        while len(graph.consumers[node]) == 1 and node not in graph.outputs:
            node = graph.consumers[node][0]
            found = graph.nodes[node]
            if found.kind is Kind.ATTENTION or found.kind is Kind.MATRIX_PRODUCT and not found.is_weight_operation:
                return factor, True
            if found.is_weight_operation or not found.keeps_positive_factors or len(graph.data_inputs(node)) != 1:
                break
            factor *= 1.0 if node in self.taken else self.number(node)
        return factor, False

    def _before(self, node: int) -> frozenset[int]:
        """The multiplications that lead to an operation, of values that nothing but weight operations takes."""
        found, data = set(), self.graph.data_inputs(node)
        while len(data) == 1 and self._is_passed(data[0]) and self._ends_in_weights(data[0]):
            found.add(data[0])
            data = self.graph.data_inputs(data[0])
        return frozenset(found)

    def _is_passed(self, node: int) -> bool:
        found = self.graph.nodes[node]
        return found.kind is Kind.VIEW or found.kind.is_product and sum(j >= 0 for j in found.inputs) == 1

    def _ends_in_weights(self, node: int) -> bool:
        following = self.graph.consumers[node]
        return bool(following) and node not in self.graph.outputs and all(
            self.graph.nodes[i].is_weight_operation or self._is_passed(i) and self._ends_in_weights(i)
            for i in following
        )  # fmt: skip
