"""Learning from a replay buffer in machine code: all updates of a round are one call.

Parameters, targets and Adam's averages remain the tensors that are saved, so a run goes on from its checkpoint as always. The
minibatches and the noise are torch's, as without it; sums are rounded otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.core.errors import UserError
from etude.core.run import Run
from etude.optim.adam import Adam
from etude.optim.denormals import flushed
from etude.rl.parts import replay_kernels as kernels
from etude.rl.parts import replay_updates as updates
from etude.rl.parts.continuous import MLP, Critics
from etude.rl.parts.replay_updates import Choices, Steps, Told

EXACT: dict[str, Any] = {"error_model": "numpy"}
SUMS: dict[str, Any] = {**EXACT, "fastmath": {"contract", "nsz", "reassoc"}}


@functools.cache
def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """One of the loops of `replay_updates` in machine code (half a minute the first time ever, then from numba's cache).

    The cache looks at the loop's own file and name, so the name tells what the other file was.
    """
    from numba import njit

    _parts()
    loop.__qualname__ = f"{loop.__name__}_{hashlib.sha256(Path(kernels.__file__).read_bytes()).hexdigest()[:12]}"
    try:
        return njit(cache=True, **EXACT)(loop)
    except RuntimeError:  # no writable place for the cache
        return njit(**EXACT)(loop)


@functools.cache
def _parts() -> None:
    from numba.extending import register_jitable

    for part in (
        kernels.weight, kernels.bias, kernels.units, kernels.table, kernels.forward, kernels.down, kernels.backward,
        kernels.climb, updates.joined, updates.bend, updates.unbend, updates.one_of, updates.goals, updates.drawn,
        updates.squashed, updates.critics_say, updates.critics_learn,
    ):  # fmt: skip
        register_jitable(**EXACT)(part)
    for part in (
        kernels.shift, kernels.rectify, kernels.add_up, kernels.awake, kernels.pick, kernels.put, kernels.gate,
        kernels.squeeze, kernels.descend, kernels.follow, kernels.length, kernels.shrink,
    ):  # fmt: skip
        register_jitable(**SUMS)(part)


def refuse(run: Run, *others: tuple[bool, str], flag: str = "--update compiled") -> None:
    """Raise UserError where the updates are not compiled: several ranks, accelerators, and (met, why) of the method's own."""
    for met, why in (
        *others,
        (run.world > 1, f"learns on one rank, and there are {run.world}"),
        (run.device.type != "cpu", f"computes on the CPU, not on {run.device}: add --device cpu"),
    ):
        if met:
            raise UserError(f"{flag} {why}{'' if '--device' in why else '; leave it out'}")


def gathered(module: nn.Module) -> Tensor:
    """All parameters moved into one vector (P,), of which they are views."""
    parts = list(module.parameters())
    vector = torch.cat([part.detach().flatten() for part in parts])
    for part, piece in zip(parts, vector.split([part.numel() for part in parts])):
        part.data = piece.view_as(part)
    return vector


def laid_out(shapes: list[tuple[int, int]]) -> kernels.NDArray[np.int64]:
    """The table of layers with these (inputs, outputs), one behind the other."""
    table, place, before = [], 0, 0
    for inputs, outputs in shapes:
        table.append((inputs, outputs, place, before))
        place, before = place + (inputs + 1) * outputs, before + outputs
    return np.array(table, np.int64)


def room_for(layers: kernels.NDArray[np.int64], rows: int, kind: Any) -> kernels.Room:
    """Room for so many rows."""
    widest, largest = int(layers[:, :2].max()), int((layers[:, 0] * layers[:, 1]).max())
    kept, full, some = (np.empty(rows * size, kind) for size in (int(layers[:, 1].sum()), widest, widest))
    picked = np.empty((2, max(largest, widest)), kind)
    return kernels.Room(kept, full, some, picked, np.empty(widest, np.int64), np.empty(rows, np.int64))


def state_of(optimizer: Adam) -> tuple[Tensor, dict[str, Tensor]]:
    """The one parameter of an optimizer and its averages, which are made where there are none yet."""
    (group,) = optimizer.param_groups
    (parameter,) = group["params"]
    averages = optimizer.state[parameter]
    if not averages:  # as the optimizer's own first step makes them
        averages |= {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
        averages["step"] = torch.zeros((), dtype=torch.float32)
    return parameter, averages


def vectors(optimizer: Adam, target: Tensor | None = None) -> tuple[kernels.Vectors, kernels.Adam]:
    """What an optimizer moves, and φ' that follows, as arrays; and its numbers."""
    (group,), (parameter, averages) = optimizer.param_groups, state_of(optimizer)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    theta = parameter.detach()
    given = (theta, theta if target is None else target, parameter.grad, averages["exp_avg"], averages["exp_avg_sq"])
    beta1, beta2 = group["betas"]
    adam = kernels.Adam(float(group["lr"]), beta1, beta2, group["eps"], int(averages["step"]))
    return kernels.Vectors(*(x.view(-1).numpy() for x in given)), adam


class Machine:
    """What runs the loops: BLAS on one thread, subnormal numbers flushed."""

    def __init__(self) -> None:
        import scipy.linalg  # noqa: F401  (whose BLAS numba calls)
        from threadpoolctl import ThreadpoolController

        self._blas = ThreadpoolController().select(user_api="blas")

    def call(self, loop: Callable[..., Any], *given: Any) -> Any:
        with self._ready():
            return compiled(loop)(*given)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        with self._blas.limit(limits=1), flushed():
            yield


class BoxLearner(Machine):
    """Actor and critics with the optimizers that hold them flat, and their targets (`target_model` None: the actor has none)."""

    def __init__(
        self, model: MLP, critic: Critics, target_model: MLP | None, target_critic: Critics, actor_optimizer: Adam,
        optimizer: Adam, batch: int, temperature_optimizer: Adam | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._temperature = temperature_optimizer
        self._optimizers = actor_optimizer, optimizer
        self._targets = None if target_model is None else gathered(target_model), gathered(target_critic)
        kind = self._targets[1].numpy().dtype
        actor, other = ([(w.shape[1], w.shape[0]) for w, _ in net.pairs] for net in (model, critic.each[0]))
        self._layers = laid_out(actor), laid_out(other)
        self._rooms = (
            room_for(self._layers[0], batch, kind),
            tuple(room_for(self._layers[1], batch, kind) for _ in critic.each),
        )

    def learn(
        self, loop: Callable[..., Any], rule: Steps, rows: dict[str, Tensor], noise: Tensor, done: int = 0
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """One of the loops of `replay_updates` over rows (K, N, …) of the buffer: K' losses, means of Q, and entropies.

        K' is K, or where a loss was not finite that many and the last of them. `done` updates were made before.
        """
        (actor, actor_adam), (critic, adam) = map(vectors, self._optimizers, self._targets)
        agent = updates.Agent(actor, critic, *self._layers, actor_adam, adam, *self._rooms)
        told = Told(*np.zeros((3, len(rows["reward"]))))
        more = (done,) if self._temperature is None else vectors(self._temperature)
        critic_steps, actor_steps = self.call(loop, agent, rule, data_of(rows), noise.numpy(), *more, told)
        counts = [(self._optimizers[0], actor_steps), (self._optimizers[1], critic_steps)]
        if self._temperature is not None and rule.flag:
            counts.append((self._temperature, actor_steps))
        for optimizer, count in counts:
            state_of(optimizer)[1]["step"] += count
        loss, value, entropy = (list(torch.from_numpy(x)[: critic_steps + 1]) for x in told)
        return loss, value, entropy


def data_of(rows: dict[str, Tensor]) -> updates.Data:
    """Rows of the buffer as arrays without gaps."""
    names = ("state", "action", "reward", "next_state", "terminated")
    return updates.Data(*(np.ascontiguousarray(rows[name].numpy()) for name in names))


class ValueLearner(Machine):
    """`rl/dqn`'s φ with its optimizer; layers of these (inputs, outputs)."""

    def __init__(self, optimizer: Adam, shapes: list[tuple[int, int]], batch: int) -> None:
        super().__init__()
        self._optimizer, self._layers = optimizer, laid_out(shapes)
        self._room = room_for(self._layers, batch, state_of(optimizer)[0].detach().numpy().dtype)

    def learn(self, rule: Choices, rows: dict[str, Tensor], behind: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Line 5: Q_φ(s, ·) (K, N, A) before each update and ‖gradient‖ (K',); y (K, N) changes where φ chooses.

        K' is K, or where the gradient was not finite that many and the last of them.
        """
        net, adam = vectors(self._optimizer)
        said, norms = np.zeros(behind.shape, net.theta.dtype), np.zeros(len(y))
        given = (net, self._layers, adam, self._room, rule, data_of(rows), behind.numpy(), y.numpy(), said, norms)
        count = self.call(updates.dqn, *given)
        state_of(self._optimizer)[1]["step"] += count
        return torch.from_numpy(said), torch.from_numpy(norms)[: count + 1]
