"""One vector for all parameters and one for all gradients: the optimizer works on a single tensor

A small network's training step is dispatch, not arithmetic: six parameters cost six kernel launches where one would do.
`flatten(module)` moves every trainable parameter into one contiguous vector θ ∈ ℝⁿ, as the equations write it, and
every gradient into another; the parameters stay where they are in the module, as views. So

    vector = flatten(model)                       # after model.to(...), before the optimizer
    optimizer = Adam([vector], lr=1e-3)           # or any torch.optim
    optimizer.zero_grad(); loss.backward(); optimizer.step()

updates the model, `zero_grad` is one fill, clipping by norm is one norm, and a penalty is `vector.square().sum()`.

What holds:
- `module.state_dict()` has the same names, shapes and values; `module.load_state_dict` writes through to the vector.
- A gradient that something replaced (`module.zero_grad()` sets it to None, `torch.autograd.grad` users assign it) is
  gathered into the vector when the optimizer reads `vector.grad`, so no update is lost; zeroing through the optimizer
  is faster.
- Parameters keep their memory format (channels_last), ties (one copy in the vector) and order (`module.parameters()`).

Differences from parameters of their own:
- There is no None gradient: a parameter the loss did not reach has gradient 0, so momentum and decay still move it.
- `copy.deepcopy(module)` and pickles of it are ordinary modules with parameters of their own: flatten the copy.
- `module.to(...)` and `.double()` move parameters out of the vector; the next `vector.grad` raises RuntimeError naming
  one. Move first, flatten last. `load_state_dict(assign=True)` makes new parameters, which no optimizer follows.
- Sharded parameters cannot be flat.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class Vector(nn.Parameter):
    """(n,) all parameters of a module as one leaf; make it with `flatten`.

    `.grad` is always the (n,) vector that the parameters' gradients are views of; setting it to None fills it with 0.
    """

    _gradient: Tensor
    _members: list[tuple[str, nn.Parameter, Tensor, int]]
    """For each parameter: its name, itself, its view of the gradient, and the address of its view of the vector."""

    def _own_gradient(self) -> Tensor:
        """The gradient vector, after bringing home every gradient that is not the vector's own view."""
        for name, parameter, view, place in self._members:
            if parameter.data_ptr() != place:
                raise RuntimeError(
                    f"{name} no longer lives in the flat vector (moved by .to() or .double()?): "
                    "move the module first, then flatten it"
                )
            gradient = parameter.grad
            if gradient is not view:
                if gradient is None:
                    view.zero_()
                else:
                    view.copy_(gradient)
                parameter.grad = view
        return self._gradient

    def _assign_gradient(self, value: Tensor | None) -> None:
        if value is None:  # zero_grad, once a step: nothing to bring home
            for _, parameter, view, _ in self._members:
                if parameter.grad is not view:
                    parameter.grad = view
            self._gradient.zero_()
        elif value is not (gradient := self._own_gradient()):
            gradient.copy_(value)

    grad = property(_own_gradient, _assign_gradient)  # pyright: ignore[reportAssignmentType]

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a flat vector belongs to its module: deepcopy the module and flatten the copy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a flat vector belongs to its module: save the module's state_dict instead")


@torch.no_grad()
def flatten(module: nn.Module | Iterable[nn.Parameter]) -> Vector:
    """Re-point the trainable parameters of a module (or those given) at views of one vector, and return the vector.

    Frozen parameters (requires_grad=False) stay outside; gradients that exist are kept. Pass two disjoint lists of
    parameters for two vectors with settings of their own (say, no decay on biases). Flattening again makes a new vector
    and retires the old one. Raises ValueError when there is nothing to flatten, or for mixed dtypes or devices.
    """
    if isinstance(module, nn.Module):
        named = {parameter: name for name, parameter in module.named_parameters()}
    else:
        named = {parameter: f"parameter {i}" for i, parameter in enumerate(module)}
    members = [parameter for parameter in named if parameter.requires_grad]
    if not members:
        raise ValueError("there is no trainable parameter to flatten")
    kinds = {(parameter.dtype, parameter.device) for parameter in members}
    if len(kinds) > 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"one vector needs one dtype and one device, got {listed}")
    (dtype, device) = kinds.pop()
    total = sum(parameter.numel() for parameter in members)
    vector = Vector(torch.empty(total, dtype=dtype, device=device))
    vector._gradient = torch.zeros(total, dtype=dtype, device=device)
    vector._members = []
    offset = 0
    for parameter in members:
        strides = torch.empty_like(parameter, device="meta").stride()  # dense, in the parameter's memory format
        value = vector.data.as_strided(parameter.shape, strides, offset).copy_(parameter)
        slope = vector._gradient.as_strided(parameter.shape, strides, offset)
        if parameter.grad is not None:
            slope.copy_(parameter.grad)
        parameter.data, parameter.grad = value, slope
        vector._members.append((named[parameter], parameter, slope, value.data_ptr()))
        offset += parameter.numel()
    # autograd writes to the slot beneath the property: a loss of the vector itself adds to the same numbers
    torch.Tensor.grad.__set__(vector, vector._gradient)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return vector
