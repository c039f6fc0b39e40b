"""An actor-critic that acts and learns in machine code: a step of all worlds is one call, and so are all passes over a segment.

Parameters, gradient and Adam's averages remain the tensors that are saved, so a run goes on from its checkpoint as always. The
noise of the actions and the orders of the rows are torch's, as without it; sums and tanh are rounded otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.acting.worlds import Worlds
from etude.core.errors import UserError
from etude.core.run import Run
from etude.optim.adam import Adam
from etude.optim.flat import Vector
from etude.rl.parts import kernels
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.rollouts import Segment

SINGLE = 2**18
"""Multiplications in a product that BLAS gives to one thread of its own accord."""


def refuse(run: Run, worlds: Worlds) -> None:
    """Raise UserError where the updates are not compiled: images, continuous actions, several ranks, accelerators."""
    for met, why in (
        (len(worlds.shape) == 3, f"learns from numbers, and {worlds.name} shows images"),
        (worlds.box, f"learns discrete actions, and those of {worlds.name} are continuous"),
        (run.world > 1, f"learns on one rank, and there are {run.world}"),
        (run.device.type != "cpu", f"computes on the CPU, not on {run.device}: add --device cpu"),
    ):
        if met:
            raise UserError(f"--update compiled {why}{'' if '--device' in why else '; leave it out'}")


class Fused:
    """A discrete actor-critic flat in `vector`, and its Adam, which follow `rule`; `count` worlds are acted in."""

    def __init__(self, model: ActorCritic, vector: Vector, optimizer: Adam, rule: kernels.Rule, count: int) -> None:
        import scipy.linalg  # noqa: F401  (whose BLAS numba calls)
        from threadpoolctl import ThreadpoolController

        self.vector, self.optimizer, self.rule = vector, optimizer, rule
        self._rows = max(rule.batch, count)
        self.networks, size = laid_out(model, vector, self._rows)
        self._room = tuple(np.empty((3, size), np.float32))
        self._theta = vector.detach().numpy()
        self._blas = ThreadpoolController().select(user_api="blas")
        self._largest = max(a * b for a, b, *_ in self.networks.layers.tolist())

    def act(self, state: Tensor, noise: Tensor) -> Tensor:
        """Actions (n,) int64 of states (n, D), noise (n,): `ActorCritic.act`."""
        action = np.empty(len(state), np.int64)
        with self._one_thread() if len(state) * self._largest > SINGLE else contextlib.nullcontext():
            kernels.compiled(kernels.act)(
                self._theta, self.networks, state.numpy(), noise.numpy(), self._room[0], action
            )
        return torch.from_numpy(action)

    def value(self, state: Tensor) -> Tensor:
        """Values (N,) of states (N, D): `ActorCritic.value`."""
        value = np.empty(len(state), np.float32)
        with self._one_thread():
            kernels.compiled(kernels.values)(
                self._theta, self.networks, state.numpy(), self._room[0], self._rows, value
            )
        return torch.from_numpy(value)

    def judge(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π(a | s), the entropy of π(· | s) and V(s), (N,) each: `ActorCritic.judge`."""
        found = tuple(np.empty((3, len(state)), np.float32))
        with self._one_thread():
            kernels.compiled(kernels.judge)(
                self._theta, self.networks, state.numpy(), action.numpy(), self._room[0], self._rows, *found
            )
        log_prob, entropy, value = map(torch.from_numpy, found)
        return log_prob, entropy, value

    def advantages(
        self, segment: Segment, value: Callable[[Tensor], Tensor], gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """A (T, n) and the returns A + V(s) (T, n): `rollouts.advantages`."""
        steps, count = segment.reward.shape
        v = value(segment.state.flatten(0, 1)).view(steps + 1, count)
        behind, found = v[1:].clone(), torch.empty_like(segment.reward)
        if len(segment.reached):
            behind[segment.truncated] = value(segment.reached)
        given = (x.numpy() for x in (segment.reward, segment.terminated, segment.truncated, v[:-1], behind))
        kernels.compiled(kernels.lambda_advantages)(*given, gamma, lam, found.numpy())
        return found, found + v[:-1]

    def learn(
        self, clip: float, orders: Iterable[Tensor], state: Tensor, action: Tensor, old: Tensor, advantage: Tensor,
        returns: Tensor,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
        """Pass over N rows in each of the `orders` (N,), a step of Adam on every minibatch; ε is `clip`.

        Returns the losses (float64), and clip_fraction over all of them; kl, entropy and value_loss of the last one. Where a
        loss or the gradient is not finite there was no step, and nothing comes after it.
        """
        assert self.vector.grad is not None
        (group,), averages = self.optimizer.param_groups, self.optimizer.state[self.vector]
        if not averages:  # as the optimizer's own first step makes them
            averages |= {name: torch.zeros_like(self.vector.detach()) for name in ("exp_avg", "exp_avg_sq")}
            averages["step"] = torch.zeros((), dtype=torch.float32)
        beta1, beta2 = group["betas"]
        adam = kernels.Adam(float(group["lr"]), beta1, beta2, group["eps"], int(averages["step"]))
        data = kernels.Data(*(x.numpy() for x in (state, action, old, advantage, returns)))
        rows = torch.stack(list(orders)).numpy()
        losses = np.empty(len(rows) * -(-len(action) // self.rule.batch))
        vectors = (self.vector.detach(), self.vector.grad, averages["exp_avg"], averages["exp_avg_sq"])
        with self._one_thread():
            updates, finite, *numbers = kernels.compiled(kernels.learn)(
                *(x.numpy() for x in vectors), adam, self.networks, self.rule._replace(clip=clip), data, rows,
                self._room, losses,
            )  # fmt: skip
        averages["step"] += updates - (not finite)
        names = "clip_fraction", "kl", "entropy", "value_loss"
        return list(torch.from_numpy(losses[:updates])), {name: torch.tensor(x) for name, x in zip(names, numbers)}

    def _one_thread(self) -> contextlib.AbstractContextManager[object]:
        return self._blas.limit(limits=1)


def laid_out(model: ActorCritic, vector: Vector, rows: int) -> tuple[kernels.Networks, int]:
    """Where the layers of a model lie in its vector, and the size of the room for `rows` rows of what leaves each.

    Raises UserError for layers other than linear ones with tanh between them.
    """
    table: list[list[int]] = []
    begin, units, top = [], 0, -1
    for net in (model.trunk, model.policy, model.critic):
        begin.append(len(table))
        below = top
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                place = (layer.weight.data_ptr() - vector.data_ptr()) // vector.element_size()
                table.append([layer.in_features, layer.out_features, place, 0, units, below])
                below, units = len(table) - 1, units + rows * layer.out_features
            elif isinstance(layer, nn.Tanh):
                table[-1][kernels.BENT] = 1
            elif not isinstance(layer, (nn.Sequential, nn.Identity)):
                raise UserError(
                    f"--update compiled knows linear layers and tanh, not {type(layer).__name__}; leave it out"
                )
        top = len(table) - 1 if net is model.trunk else top
    return kernels.Networks(np.array(table, np.int64), begin[1], begin[2]), units
