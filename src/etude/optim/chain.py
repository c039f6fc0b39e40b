"""Every first-order optimizer is a chain of transforms of the gradient, then θ ← θ − α u

A *rule* is a pure function: `Signal` and state in, `Signal` and new state out, nothing modified. The links below
are the whole vocabulary; SGD, momentum, RMSProp, AdaGrad, Adam and AdamW are one expression each over them:

    sgd       chain(l2(λ))
    momentum  chain(l2(λ), accumulate(μ))
    rmsprop   chain(l2(λ), over_root(β, ε))
    adagrad   chain(l2(λ), over_root(None, ε))
    adam      chain(l2(λ), average(β₁), over_root(β₂, ε, corrected=True))
    adamw     chain(average(β₁), over_root(β₂, ε, corrected=True), decay(λ))

`Chain` turns a rule into a `torch.optim.Optimizer`. The rule *defines* an optimizer; where torch has one kernel with
the same arithmetic the subclass names it in `_fused`, and it is taken by itself (`fused=False` runs the rule).

Differences:
- g, s, m, v are zero before the first step, as in the notes; k counts from 1.
- Clipping by norm sees one norm over all parameters of the optimizer (E21: the notes print it per g_i), so `clip_norm`
  and `clip_value` come first in a chain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.optimizer import _global_optimizer_post_hooks as _POST_HOOKS
from torch.optim.optimizer import _global_optimizer_pre_hooks as _PRE_HOOKS

from etude.optim.clipping import clip_by_value, global_norm, shrink

State = dict[str, Tensor]
Rule = Callable[["Signal", Mapping[str, Tensor]], tuple["Signal", State]]

BLOCK = 1 << 17
"""Elements a rule sees at a time: every link is elementwise, and temporaries of this size stay in the cache."""


class Signal(NamedTuple):
    """What flows through a chain for one parameter tensor (all tensors have its shape)."""

    update: Tensor
    """u, the direction made so far; it starts as the gradient."""
    gradient: Tensor
    """g after clipping and L2: what the second moments see."""
    parameter: Tensor
    """θ before this step."""
    step: int
    """k = 1, 2, …"""
    norm: Callable[[], Tensor]
    """‖g‖₂ of the untouched gradient over all parameters of the optimizer (0-dim; computed when asked for)."""


# ---------------------------------------------------------------------------------------------------- the links


def chain(*links: Rule | None) -> Rule:
    """Compose links left to right; None (a link whose strength is zero) is left out."""
    live = [link for link in links if link is not None]

    def rule(signal: Signal, state: Mapping[str, Tensor]) -> tuple[Signal, State]:
        after = dict(state)
        for link in live:
            signal, after = link(signal, after)
        return signal, after

    return rule


def _of_gradient(change: Callable[[Signal], Tensor]) -> Rule:
    """A stateless link that replaces the gradient itself, so it must stand before any moment."""

    def link(signal: Signal, state: Mapping[str, Tensor]) -> tuple[Signal, State]:
        gradient = change(signal)
        return signal._replace(gradient=gradient, update=gradient), dict(state)

    return link


def l2(strength: float) -> Rule | None:
    """g ← g + λθ: the gradient of (λ/2)‖θ‖². The notes' penalty λ‖θ‖² is `weight_decay` = 2λ (E05)."""
    return _of_gradient(lambda s: s.gradient.add(s.parameter, alpha=strength)) if strength else None


def clip_value(limit: float) -> Rule:
    """g_i ← max(min(g_i, c), −c)."""
    return _of_gradient(lambda s: clip_by_value([s.gradient], limit)[0])


def clip_norm(limit: float, eps: float = 0.0) -> Rule:
    """g ← g min(1, c / (‖g‖ + ε)); exact with ε = 0, torch's `clip_grad_norm_` with ε = 1e-6. A zero g stays zero."""
    return _of_gradient(lambda s: s.gradient * shrink(s.norm(), limit, eps).to(s.gradient.device, s.gradient.dtype))


def accumulate(factor: float, nesterov: bool = False, slot: str = "momentum_buffer") -> Rule | None:
    """b ← μb + u, then u ← b (heavy ball) or u ← u + μb (Nesterov, in Sutskever's form)."""
    if not factor:
        return None

    def link(signal: Signal, state: Mapping[str, Tensor]) -> tuple[Signal, State]:
        buffer = factor * state.get(slot, 0.0) + signal.update
        update = signal.update.add(buffer, alpha=factor) if nesterov else buffer
        return signal._replace(update=update), {**state, slot: buffer}

    return link


def average(factor: float, corrected: bool = True, slot: str = "exp_avg") -> Rule:
    """m ← βm + (1 − β)u; u ← m / (1 − βᵏ), or m itself when not `corrected`."""

    def link(signal: Signal, state: Mapping[str, Tensor]) -> tuple[Signal, State]:
        moment = factor * state.get(slot, 0.0) + (1 - factor) * signal.update
        update = moment / (1 - factor**signal.step) if corrected else moment
        return signal._replace(update=update), {**state, slot: moment}

    return link


def over_root(factor: float | None, eps: float, corrected: bool = False, slot: str = "exp_avg_sq") -> Rule:
    """v ← βv + (1 − β)g², or v ← v + g² for β = None; u ← u / (√v̂ + ε), v̂ = v / (1 − βᵏ) when `corrected`.

    ε is outside the root, in the unit of g. Without it a coordinate that never had a gradient is 0/0 (E09).
    """

    def link(signal: Signal, state: Mapping[str, Tensor]) -> tuple[Signal, State]:
        old, new = (1.0, 1.0) if factor is None else (factor, 1 - factor)
        square = old * state.get(slot, 0.0) + new * signal.gradient**2
        scale = square / (1 - old**signal.step) if corrected else square
        return signal._replace(update=signal.update / (scale.sqrt() + eps)), {**state, slot: square}

    return link


def decay(strength: float) -> Rule | None:
    """u ← u + λθ after everything else: decoupled weight decay, θ ← (1 − αλ)θ − αu (arXiv:1711.05101)."""
    if not strength:
        return None

    def link(signal: Signal, state: Mapping[str, Tensor]) -> tuple[Signal, State]:
        return signal._replace(update=signal.update.add(signal.parameter, alpha=strength)), dict(state)

    return link


# ------------------------------------------------------------------------------------------------- using a rule


def update(
    rule: Rule,
    parameter: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    lr: float,
    norm: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, State]:
    """One step of one tensor, purely: θ' = θ − α u(g), and the new state. Start from `state` = {} and `step` = 1.

    `norm` returns ‖g‖₂ over all parameters when the rule clips by norm and this tensor is not all there is.
    """
    whole = norm or functools.partial(global_norm, [gradient])
    signal, after = rule(Signal(gradient, gradient, parameter, step, whole), state)
    return parameter.add(signal.update, alpha=-lr), after


class Chain(torch.optim.Optimizer):
    """A rule as a torch optimizer: parameter groups, state dicts, schedulers, closures; None gradients are skipped.

    `Chain(params, rule, lr=…)` runs any rule. A named optimizer subclasses it, keeps its hyperparameters in the
    groups under torch's names, builds its rule from them in `rule`, and may name an equal kernel in `_kernel`.
    State entries have torch's names too, so a state dict moves between `torch.optim.Adam` and ours both ways.
    `fused`: None takes the kernel where there is one, False never, True raises RuntimeError where there is none.
    Raises ValueError for a hyperparameter out of range, RuntimeError for a sparse or complex gradient.
    """

    checks: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {}
    """What raises ValueError for a value of a hyperparameter that is out of range, for every group."""
    absent: ClassVar[Mapping[str, float]] = {}
    """torch's settings that this optimizer lacks, at the value that switches them off. They stand in the groups, so
    that torch can load our state dict; making or loading a group where one is on raises ValueError."""

    def __init__(
        self, params: ParamsT, rule: Rule | None = None, *, lr: float, fused: bool | None = None, **group: Any
    ):
        self._given = rule
        super().__init__(params, {"lr": lr, **group, "fused": fused, **self.absent})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with the group's own hyperparameters checked first."""
        group = {**self.defaults, **param_group}
        for name, check in {"lr": nonnegative, **self.checks}.items():
            check(name, group[name])
        self._lacks(group)
        super().add_param_group(param_group)

    def _lacks(self, group: Mapping[str, Any]) -> None:
        for name, off in self.absent.items():
            if group[name] != off:
                raise ValueError(f"{type(self).__name__} has no {name}, but a parameter group has {name}={group[name]}")

    def rule(self, group: dict[str, Any]) -> Rule:
        """The update rule with the hyperparameters of one parameter group."""
        if self._given is None:
            raise TypeError(f"{type(self).__name__} needs a rule: Chain(params, rule, lr=...)")
        return self._given

    def _kernel(self, group: dict[str, Any]) -> Kernel | None:
        """A kernel that computes exactly `rule(group)` on lists of tensors of one device and dtype, or None."""
        return None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; returns the closure's value (run with gradients on) or None."""
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or _PRE_HOOKS or _POST_HOOKS
        if hooks or torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
            return _watched_step(self, closure)
        return self._step(closure)

    # torch wraps `step` for hooks and profiler unless it is marked so; on a tiny network the wrapper is 5 % of a
    # training step, so it is put on only when something listens
    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            norm = None
            for group in self.param_groups:
                kernel = None if group["fused"] is False else self._kernel(group)
                if kernel is None and group["fused"]:
                    name = type(self).__name__
                    raise RuntimeError(f"{name} has no fused kernel for these settings: leave fused at None")
                for bucket in self._buckets(group):
                    if kernel is not None and bucket.fusable:
                        torch._foreach_add_(bucket.steps, 1)  # pyright: ignore[reportPrivateImportUsage]
                        kernel(bucket)
                    else:
                        norm = norm or functools.cache(self._norm)
                        self._run(group, bucket, norm)
        return loss

    def _norm(self) -> Tensor:
        """‖g‖₂ over the gradients of all parameters."""
        grads = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        return global_norm(grad for grad in grads if grad is not None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient (or fill it with 0); for a flat vector both are one fill."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.detach().zero_()

    def _buckets(self, group: dict[str, Any]) -> Iterable[Bucket]:
        """The group's parameters that have a gradient, by device and dtype, with their state (made when new)."""
        buckets: dict[Any, Bucket] = {}
        strided = torch.strided
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if gradient.layout is not strided:
                raise self._unfit(gradient)
            if "step" not in state:
                self._begin(group, parameter, gradient, state)
            step, gaps = state["step"], False
            if hasattr(parameter, "to_local"):  # sharded: every link is elementwise, so each rank updates its own part
                parameter, gradient = parameter.to_local(), gradient.to_local()
                state = {name: value.to_local() for name, value in state.items() if hasattr(value, "to_local")}
            elif not (parameter.is_contiguous() and gradient.is_contiguous()):
                # a fused kernel reads all tensors in one order of memory, and would write into the gaps of a slice
                if gradient.stride() != parameter.stride():
                    gradient = _like(parameter, gradient)
                if not parameter.is_contiguous(memory_format=torch.channels_last):
                    gaps = torch.empty_like(parameter, device="meta").stride() != parameter.stride()
            key = (device := parameter.device, parameter.dtype, gaps)
            bucket = buckets.get(key)
            if bucket is None:
                bucket = buckets[key] = Bucket([], [], [], [], device.type in _FUSED_DEVICES and not gaps)
            bucket.steps.append(step)
            bucket.parameters.append(parameter)
            bucket.gradients.append(gradient)
            bucket.states.append(state)
        return buckets.values()

    def _unfit(self, gradient: Tensor) -> RuntimeError:
        name = type(self).__name__
        return RuntimeError(f"{name} needs dense real gradients, got {gradient.dtype} in {gradient.layout}")

    def _begin(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, state: State) -> None:
        """Zero state for a parameter seen for the first time; its entries are those the rule returns."""
        if gradient.is_complex():
            raise self._unfit(gradient)
        nothing = torch.zeros(0, dtype=parameter.dtype)
        for slot in update(self.rule(group), nothing, nothing, {}, 1, 0.0)[1]:
            if state.get(slot) is None:
                state[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] = torch.zeros((), dtype=torch.float32, device=_clock(parameter))

    def _run(self, group: dict[str, Any], bucket: Bucket, norm: Callable[[], Tensor]) -> None:
        """The rule itself, block by block."""
        rule, lr = self.rule(group), float(group["lr"])
        for parameter, gradient, state, step in zip(*bucket[:4], strict=True):
            step += 1
            k = int(step)
            slots = {name: value for name, value in state.items() if name != "step" and value is not None}
            for theta, g, *values in blocks(parameter, gradient, *slots.values()):
                new_theta, after = update(rule, theta, g, dict(zip(slots, values, strict=True)), k, lr, norm)
                theta.copy_(new_theta)
                for name, value in zip(slots, values, strict=True):
                    value.copy_(after[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also called by load_state_dict
        for group in self.param_groups:
            group.setdefault("fused", None)
            for name, off in self.absent.items():
                group.setdefault(name, off)
            self._lacks(group)
        for parameter, values in self.state.items():
            for name, value in values.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    values[name] = _like(parameter, value)
            if "step" in values:
                values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device=_clock(parameter))


class Bucket(NamedTuple):
    """Parameters of one device and dtype that have a gradient, and what belongs to each."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[State]
    steps: list[Tensor]
    fusable: bool

    def slot(self, name: str) -> list[Tensor]:
        """The state entry `name` of every parameter."""
        return [state[name] for state in self.states]


Kernel = Callable[[Bucket], None]

_watched_step = torch.optim.Optimizer.profile_hook_step(Chain._step)

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _clock(parameter: Tensor) -> torch.device:
    """Where a parameter's step counter lives: the fused kernels read it beside the parameter."""
    return parameter.device if parameter.device.type in _FUSED_DEVICES else torch.device("cpu")


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """The same numbers in the parameter's order of memory."""
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Matching views of tensors of one shape, small enough for the cache when they are on a CPU and contiguous."""
    whole = tensors[0].numel() <= BLOCK or tensors[0].device.type != "cpu"
    if whole or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.detach().view(-1).split(BLOCK) for tensor in tensors), strict=True)


def nonnegative(name: str, value: float) -> None:
    """ValueError unless `value` is a finite number ≥ 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def fraction(name: str, value: float) -> None:
    """ValueError unless 0 ≤ `value` < 1 (a decay rate of a moment)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def two_fractions(name: str, value: Sequence[float]) -> None:
    """ValueError unless `value` is a pair of `fraction`s."""
    if len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value}")
    for index, beta in enumerate(value):
        fraction(f"{name}[{index}]", beta)
