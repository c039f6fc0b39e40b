"""Reverse-mode differentiation: a tape of Nodes over plain tensors, and the operations that write it

Every operation computes its value and records, for each operand, the product δ ↦ Jᵀδ with its Jacobian. `backward`
walks the record from the losses to the leaves: lines 2 to 4 of the algorithm in `etude.basics.backprop.train`.

    w, b = Node(torch.randn(3, 2)), Node(torch.zeros(2))
    loss = cross_entropy(tanh(x @ w + b), y)            # x, y: tensors, hence constants
    backward(loss);  w.grad, b.grad
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""δ_z ↦ J_aᵀ δ_z, from the shape of the result to that of the operand."""


class Node:
    """A value on the tape, its gradient after `backward`, and the operands it was made of.

    Operators take other Nodes, tensors and numbers; only Nodes get gradients, so a constant is anything else.
    """

    __slots__ = ("edges", "grad", "name", "value")

    def __init__(self, value: Tensor, name: str = "", *edges: tuple[Any, Product]) -> None:
        self.value, self.name = value, name
        self.edges = tuple((operand, product) for operand, product in edges if isinstance(operand, Node))
        self.grad: Tensor | None = None

    def __add__(self, other: Any) -> Node:
        return add(self, other)

    def __sub__(self, other: Any) -> Node:
        return add(self, -other)

    def __rsub__(self, other: Any) -> Node:
        return add(other, -self)

    def __mul__(self, other: Any) -> Node:
        return mul(self, other)

    def __truediv__(self, other: Any) -> Node:
        return mul(self, other**-1)

    def __rtruediv__(self, other: Any) -> Node:
        return mul(other, self**-1)

    def __neg__(self) -> Node:
        return mul(self, -1)

    def __pow__(self, exponent: float) -> Node:
        return power(self, exponent)

    def __matmul__(self, other: Any) -> Node:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Node:
        return matmul(other, self)

    def __getitem__(self, index: Any) -> Node:
        return take(self, index)

    __radd__, __rmul__ = __add__, __mul__


def topological(heads: Sequence[Node]) -> list[Node]:
    """Line 2: everything the heads were made of, operands first, each Node once. No recursion, so any depth will do."""
    order, seen = [], set()
    stack = [(head, False) for head in heads]
    while stack:
        node, operands_are_in = stack.pop()
        if operands_are_in:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((operand, False) for operand, _ in node.edges)
    return order


def backward(*heads: Node, deltas: Sequence[Tensor] | None = None) -> list[Node]:
    """Set `grad` of everything the heads were made of to the gradient of Σ heads, or of Σ ⟨delta, head⟩.

    Returns the Nodes in topological order. Raises ValueError for a head that is not a scalar and has no delta."""
    if deltas is None and any(head.value.numel() != 1 for head in heads):
        raise ValueError("a head that is not a scalar needs a delta of its own shape")
    order = topological(heads)
    for node in order:
        node.grad = None
    for head, delta in zip(heads, deltas or [torch.ones_like(head.value) for head in heads], strict=True):  # line 3
        head.grad = delta if head.grad is None else head.grad + delta
    for node in reversed(order):  # line 4: here every use of the node has reported, so its δ is complete
        delta = node.grad
        assert delta is not None
        for operand, product in node.edges:
            part = product(delta)
            operand.grad = part if operand.grad is None else operand.grad + part
    return order


def fold(delta: Tensor, like: Tensor) -> Tensor:
    """The transpose of broadcasting `like` to the shape of `delta`: the sum over the copies."""
    if delta.shape == like.shape:
        return delta
    if delta.dim() > like.dim():
        delta = delta.sum(tuple(range(delta.dim() - like.dim())))
    copied = tuple(i for i, size in enumerate(like.shape) if size == 1 and delta.shape[i] != 1)
    return delta.sum(copied, keepdim=True) if copied else delta


def _value(operand: Any) -> Any:
    return operand.value if isinstance(operand, Node) else operand


def add(a: Any, b: Any) -> Node:
    """a + b, broadcast."""
    x, y = _value(a), _value(b)
    return Node(x + y, "+", (a, lambda d: fold(d, x)), (b, lambda d: fold(d, y)))


def mul(a: Any, b: Any) -> Node:
    """a · b elementwise, broadcast."""
    x, y = _value(a), _value(b)
    return Node(x * y, "×", (a, lambda d: fold(d * y, x)), (b, lambda d: fold(d * x, y)))


def power(a: Node, exponent: float) -> Node:
    """aᵏ elementwise for a constant k."""
    x = a.value
    slope = exponent * x ** (exponent - 1) if exponent else torch.zeros_like(x)
    return Node(x**exponent, f"^{exponent:g}", (a, lambda d: d * slope))


def matmul(a: Any, b: Any) -> Node:
    """a @ b for (..., n, k) and (..., k, m), leading axes broadcast. Raises ValueError for vectors."""
    x, y = _value(a), _value(b)
    if x.dim() < 2 or y.dim() < 2:
        raise ValueError(f"matmul takes matrices, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    return Node(x @ y, "@", (a, lambda d: fold(d @ y.mT, x)), (b, lambda d: fold(x.mT @ d, y)))


def exp(a: Node) -> Node:
    """eᵃ elementwise."""
    z = a.value.exp()
    return Node(z, "exp", (a, lambda d: d * z))


def log(a: Node) -> Node:
    """Natural logarithm, elementwise."""
    x = a.value
    return Node(x.log(), "log", (a, lambda d: d / x))


def tanh(a: Node) -> Node:
    """Hyperbolic tangent, elementwise."""
    z = a.value.tanh()
    return Node(z, "tanh", (a, lambda d: d * (1 - z * z)))


def relu(a: Node) -> Node:
    """max(a, 0) elementwise, with derivative 0 at 0."""
    z = a.value.clamp(min=0)
    return Node(z, "relu", (a, lambda d: d * (z > 0)))


def total(a: Node, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Node:
    """Σ a over `dim` (all axes if None)."""
    x = a.value
    axes = tuple(range(x.dim())) if dim is None else dim
    spread = lambda d: (d if keepdim else _unsqueeze(d, axes, x.dim())).expand_as(x)  # noqa: E731
    return Node(x.sum(axes, keepdim=keepdim), "Σ", (a, spread))


def _unsqueeze(d: Tensor, axes: int | tuple[int, ...], dims: int) -> Tensor:
    gone = {axis % dims for axis in ((axes,) if isinstance(axes, int) else axes)}
    return d[tuple(None if i in gone else slice(None) for i in range(dims))]


def mean(a: Node, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Node:
    """The mean of a over `dim` (all axes if None)."""
    sums = total(a, dim, keepdim)
    return mul(sums, sums.value.numel() / a.value.numel())


def reshape(a: Node, *shape: int) -> Node:
    """a with its elements in order in another shape."""
    x = a.value
    return Node(x.reshape(shape), "reshape", (a, lambda d: d.reshape(x.shape)))


def transpose(a: Node) -> Node:
    """The last two axes swapped."""
    return Node(a.value.mT, "T", (a, lambda d: d.mT))


def concatenate(parts: Sequence[Any], dim: int = 0) -> Node:
    """Operands joined along an axis."""
    values = [_value(part) for part in parts]
    sizes = [value.shape[dim] for value in values]
    cut = [(part, lambda d, i=i: d.split(sizes, dim)[i]) for i, part in enumerate(parts)]
    return Node(torch.cat(values, dim), "cat", *cut)


def take(a: Node, index: Any) -> Node:
    """a[index], for any index that torch takes; an element that is taken twice gets both δs."""
    x = a.value

    def scatter(d: Tensor) -> Tensor:
        places = torch.arange(x.numel(), device=x.device).view(x.shape)[index]
        return d.new_zeros(x.numel()).index_add(0, places.reshape(-1), d.reshape(-1)).view(x.shape)

    return Node(x[index], "[ ]", (a, scatter))


def log_softmax(a: Node) -> Node:
    """a − log Σ exp a over the last axis, without overflow."""
    z = a.value.log_softmax(-1)
    return Node(z, "log softmax", (a, lambda d: d - z.exp() * d.sum(-1, keepdim=True)))


def cross_entropy(logits: Node, y: Tensor) -> Node:
    """Mean −log p(y) over a batch: logits (N, C), y (N,) int64 → ()."""
    return -mean(log_softmax(logits)[torch.arange(len(y), device=y.device), y])
