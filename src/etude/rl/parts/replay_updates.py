"""A round's updates of the methods that learn from a replay buffer, as array loops for machine code: no dispatch between two.

Each is the update of the method's own file, line by line, on the same random numbers; numbers differ by rounding alone. K
updates of N rows, D numbers observed, A in an action, n critics behind each other in one vector. An update whose loss (in
`rl/dqn`: gradient) is not finite is not made, and ends the round.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.rl.parts.replay_kernels import (
    Adam,
    Room,
    Vectors,
    backward,
    climb,
    descend,
    follow,
    forward,
    length,
    shrink,
)

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
LOWEST, HIGHEST = -20.0, 2.0
"""Between these log σ is kept."""
GRADIENTS = "mean", "reparameterised", "score"
MEAN, SCORE = 0, 2


class Data(NamedTuple):
    """The minibatches of a round."""

    state: NDArray[Any]
    """(K, N, D)"""
    action: NDArray[Any]
    """(K, N, A)"""
    reward: NDArray[Any]
    """(K, N)"""
    reached: NDArray[Any]
    """(K, N, D)"""
    terminated: NDArray[np.bool_]
    """(K, N)"""


class Agent(NamedTuple):
    """Actor and n critics with their optimizers."""

    actor: Vectors
    critic: Vectors
    actor_layers: NDArray[np.int64]
    critic_layers: NDArray[np.int64]
    actor_adam: Adam
    critic_adam: Adam
    actor_room: Room
    critic_rooms: tuple[Room, ...]
    """One for each critic."""


class Told(NamedTuple):
    """What is reported of each update; (K,) float64 each."""

    loss: NDArray[np.float64]
    value: NDArray[np.float64]
    """Mean of Q of the minibatch."""
    entropy: NDArray[np.float64]
    """Mean of −log π of the actor's step, in `rl/sac`."""


class Steps(NamedTuple):
    """The numbers of the updates: those of each method's `Config`."""

    gamma: float
    tau: float
    noise: float
    clip: float
    every: int
    """Updates for each one of the actor (`rl/td3`) or of the targets (`rl/off_policy_actor_critic`)."""
    flag: int
    """`clipped`, `automatic`, or the kind of the actor's gradient."""
    target: float
    """H̄ of the whole action."""


class Choices(NamedTuple):
    """Those of `rl/dqn`."""

    gamma: float
    clip_norm: float
    huber: bool
    double: bool


# ------------------------------------------------------------------------------------------------ what they share


def joined(state, action, x):
    """(N, D + A) of states (N, D) and actions (N, A) into x."""
    x[:, : state.shape[1]] = state
    x[:, state.shape[1] :] = action


def bend(out):
    """tanh in place, of numbers (N, A)."""
    for i in range(out.shape[0]):
        for a in range(out.shape[1]):
            out[i, a] = math.tanh(out[i, a])


def unbend(slope, u, scale):
    """∂L/∂x times `scale` in place of ∂L/∂u (N, A), for u = tanh x."""
    for i in range(u.shape[0]):
        for a in range(u.shape[1]):
            slope[i, a] *= scale * (1 - u[i, a] * u[i, a])


def one_of(vector, index, count):
    """The parameters of one of `count` networks behind each other."""
    size = len(vector) // count
    return vector[index * size : (index + 1) * size]


def goals(reward, terminated, value, gamma, y):
    """r + γ (1 − terminated) V (N,) into y, which may be V (N,) itself."""
    for i in range(len(y)):
        y[i] = reward[i] + (0.0 if terminated[i] else gamma * value[i])


def drawn(mean, noise, sigma, action):
    """clip(μ + σ ε) into action, all (N, A)."""
    for i in range(mean.shape[0]):
        for a in range(mean.shape[1]):
            action[i, a] = min(max(mean[i, a] + sigma * noise[i, a], -1.0), 1.0)


def squashed(out, noise, u, spread, log_prob):
    """u = tanh(mean + σ ε) (N, A), σ ε (N, A) and log π (N,) of what leaves the actor (N, 2 A) and noise ε (N, A)."""
    for i in range(u.shape[0]):
        total = 0.0
        for a in range(u.shape[1]):
            log_std = min(max(np.float64(out[i, u.shape[1] + a]), LOWEST), HIGHEST)
            e = np.float64(noise[i, a])
            spread[i, a] = math.exp(log_std) * e
            x = np.float64(out[i, a]) + math.exp(log_std) * e
            u[i, a] = math.tanh(x)
            soft = max(-2 * x, 0.0) + math.log1p(math.exp(-abs(2 * x)))
            total -= 0.5 * e * e + log_std + HALF_LOG_TWO_PI + 2 * (math.log(2) - x - soft)
        log_prob[i] = total


def critics_say(agent, vector, x, values):
    """Q_i(x) into values (n, N), for x (N, D + A), by the parameters in `vector`."""
    for c in range(len(values)):
        q = forward(one_of(vector, c, len(values)), agent.critic_layers, x, agent.critic_rooms[c].kept)
        values[c] = q[:, 0]


def critics_learn(agent, x, y, share, k):
    """A step of the critics on `share` Σ_i mean (Q_i(x) − y_i)², x (N, D + A), y (n, N): the loss, and the mean of Q.

    Where the loss is not finite there is no step.
    """
    v, rooms, loss, value = agent.critic, agent.critic_rooms, 0.0, 0.0
    count = len(rooms)
    for c in range(count):
        q = forward(one_of(v.theta, c, count), agent.critic_layers, x, rooms[c].kept)
        for i in range(len(x)):
            value += q[i, 0] / (count * len(x))
            q[i, 0] -= y[c, i]
            loss += share * q[i, 0] * q[i, 0] / len(x)
            q[i, 0] *= 2 * share / len(x)
        backward(one_of(v.theta, c, count), agent.critic_layers, x, q, rooms[c], one_of(v.gradient, c, count))
    if math.isfinite(loss):
        descend(v, agent.critic_adam, agent.critic_adam.taken + k + 1)
    return loss, value


# -------------------------------------------------------------------------------------------------------- methods


def td3(agent, rule, data, noise, done, told):
    """Lines 4 to 8 of `rl/td3`, K times, after `done` updates; noise (K, N, A). Returns the critics' steps and the actor's."""
    count, kind, actor_steps = len(agent.critic_rooms), agent.actor.theta.dtype, 0
    batch, actions = data.action.shape[1:]
    x, y = np.empty((batch, agent.critic_layers[0, 0]), kind), np.empty((count, batch), kind)
    everywhere, slope = np.ones(batch, kind), np.empty((batch, actions), kind)
    for k in range(len(data.state)):
        u = forward(agent.actor.target, agent.actor_layers, data.reached[k], agent.actor_room.kept)  # line 4
        bend(u)
        for i in range(batch):
            for a in range(actions):
                push = min(max(rule.noise * noise[k, i, a], -rule.clip), rule.clip)
                u[i, a] = min(max(u[i, a] + push, -1.0), 1.0)
        joined(data.reached[k], u, x)
        critics_say(agent, agent.critic.target, x, y)
        for i in range(batch):
            if rule.flag:
                y[:, i] = y[:, i].min()
        for c in range(count):
            goals(data.reward[k], data.terminated[k], y[c], rule.gamma, y[c])
        joined(data.state[k], data.action[k], x)
        told.loss[k], told.value[k] = critics_learn(agent, x, y, 1.0, k)  # line 5
        if not math.isfinite(told.loss[k]):
            return k, actor_steps
        if (done + k + 1) % rule.every == 0:  # line 6
            u = forward(agent.actor.theta, agent.actor_layers, data.state[k], agent.actor_room.kept)
            bend(u)
            joined(data.state[k], u, x)
            forward(one_of(agent.critic.theta, 0, count), agent.critic_layers, x, agent.critic_rooms[0].kept)
            slope[:] = 0
            climb(one_of(agent.critic.theta, 0, count), agent.critic_layers, everywhere, agent.critic_rooms[0], slope)
            unbend(slope, u, -1 / batch)
            backward(
                agent.actor.theta, agent.actor_layers, data.state[k], slope, agent.actor_room, agent.actor.gradient
            )
            actor_steps += 1
            descend(agent.actor, agent.actor_adam, agent.actor_adam.taken + actor_steps)  # line 7
            follow(agent.critic, rule.tau)  # line 8
            follow(agent.actor, rule.tau)
    return len(data.state), actor_steps


def off_policy_actor_critic(agent, rule, data, noise, done, told):
    """Lines 4 to 7 of `rl/off_policy_actor_critic`, likewise, by the draws that noise (K, 2, draws, N, A) makes."""
    kind, size = agent.actor.theta.dtype, agent.critic_layers[0, 0]
    draws, batch, actions = noise.shape[2:]
    x, y = np.empty((batch, size), kind), np.empty((1, batch), kind)
    action, up, slope = (
        np.empty((batch, actions), kind),
        np.empty((batch, actions), kind),
        np.empty((batch, actions), kind),
    )
    everywhere, behind, base = np.ones(batch, kind), np.empty(batch, kind), np.empty(batch, kind)
    critic, layers, room = agent.critic, agent.critic_layers, agent.critic_rooms[0]
    draws = 1 if rule.flag == MEAN else draws
    for k in range(len(data.state)):
        u = forward(agent.actor.target, agent.actor_layers, data.reached[k], agent.actor_room.kept)  # line 4
        bend(u)
        behind[:] = 0
        for d in range(draws):
            drawn(u, noise[k, 0, d], 0.0 if rule.flag == MEAN else rule.noise, action)
            joined(data.reached[k], action, x)
            behind += forward(critic.target, layers, x, room.kept)[:, 0] / draws
        goals(data.reward[k], data.terminated[k], behind, rule.gamma, y[0])
        joined(data.state[k], data.action[k], x)
        told.loss[k], told.value[k] = critics_learn(agent, x, y, 0.5, k)  # line 5
        if not math.isfinite(told.loss[k]):
            return k, k
        u = forward(agent.actor.theta, agent.actor_layers, data.state[k], agent.actor_room.kept)
        bend(u)
        up[:] = 0
        if rule.flag == SCORE:
            joined(data.state[k], u, x)
            base[:] = forward(critic.theta, layers, x, room.kept)[:, 0]
        for d in range(draws):
            drawn(u, noise[k, 1, d], 0.0 if rule.flag == MEAN else rule.noise, action)
            joined(data.state[k], action, x)
            q = forward(critic.theta, layers, x, room.kept)
            slope[:] = 0
            if rule.flag != SCORE:
                climb(critic.theta, layers, everywhere, room, slope)
            for i in range(batch):
                for a in range(actions):
                    away = rule.noise * noise[k, 1, d, i, a]
                    if rule.flag == SCORE:  # ∇_μ log π = (a − μ) / σ²
                        up[i, a] += (q[i, 0] - base[i]) * away / (draws * rule.noise**2)
                    elif rule.flag == MEAN or abs(u[i, a] + away) <= 1:  # beyond, moving the mean moves nothing
                        up[i, a] += slope[i, a] / draws
        unbend(up, u, -1 / batch)
        backward(agent.actor.theta, agent.actor_layers, data.state[k], up, agent.actor_room, agent.actor.gradient)
        descend(agent.actor, agent.actor_adam, agent.actor_adam.taken + k + 1)  # line 6
        if (done + k + 1) % rule.every == 0:  # line 7
            follow(agent.critic, rule.tau)
            follow(agent.actor, rule.tau)
    return len(data.state), len(data.state)


def sac(agent, rule, data, noise, temperature, temperature_adam, told):
    """Lines 4 to 8 of `rl/sac`, likewise; noise (2, K, N, A), `temperature` is log α (1,) with its optimizer."""
    kind, rooms = agent.actor.theta.dtype, agent.critic_rooms
    batch, actions = data.action.shape[1:]
    x, y = np.empty((batch, agent.critic_layers[0, 0]), kind), np.empty((len(rooms), batch), kind)
    u, spread, slope = (
        np.empty((batch, actions), kind),
        np.empty((batch, actions), kind),
        np.empty((batch, actions), kind),
    )
    log_prob, by_out = np.empty(batch, kind), np.empty((batch, 2 * actions), kind)
    values, share = np.empty((len(rooms), batch), kind), np.empty(batch, kind)
    for k in range(len(data.state)):
        alpha = math.exp(temperature.theta[0])
        out = forward(agent.actor.theta, agent.actor_layers, data.reached[k], agent.actor_room.kept)  # line 4
        squashed(out, noise[0, k], u, spread, log_prob)
        joined(data.reached[k], u, x)
        critics_say(agent, agent.critic.target, x, values)
        for i in range(batch):
            values[:, i] = values[:, i].min() - alpha * log_prob[i]
        for c in range(len(rooms)):
            goals(data.reward[k], data.terminated[k], values[c], rule.gamma, y[c])
        joined(data.state[k], data.action[k], x)
        told.loss[k], told.value[k] = critics_learn(agent, x, y, 0.5, k)  # line 5
        if not math.isfinite(told.loss[k]):
            return k, k
        out = forward(agent.actor.theta, agent.actor_layers, data.state[k], agent.actor_room.kept)
        squashed(out, noise[1, k], u, spread, log_prob)
        joined(data.state[k], u, x)
        critics_say(agent, agent.critic.theta, x, values)
        slope[:] = 0
        for c in range(len(rooms)):
            for i in range(batch):
                share[i] = values[:, i].argmin() == c
            climb(one_of(agent.critic.theta, c, len(rooms)), agent.critic_layers, share, rooms[c], slope)
        for i in range(batch):
            for a in range(actions):
                by_x = (alpha * 2 * u[i, a] - slope[i, a] * (1 - u[i, a] * u[i, a])) / batch
                by_out[i, a], by_out[i, actions + a] = by_x, 0
                if LOWEST <= out[i, actions + a] <= HIGHEST:
                    by_out[i, actions + a] = by_x * spread[i, a] - alpha / batch
        backward(agent.actor.theta, agent.actor_layers, data.state[k], by_out, agent.actor_room, agent.actor.gradient)
        descend(agent.actor, agent.actor_adam, agent.actor_adam.taken + k + 1)  # line 6
        told.entropy[k] = -log_prob.mean()
        if rule.flag:
            temperature.gradient[0] = told.entropy[k] - rule.target
            descend(temperature, temperature_adam, temperature_adam.taken + k + 1)  # line 7
        follow(agent.critic, rule.tau)  # line 8
    return len(data.state), len(data.state)


def dqn(net, layers, adam, room, rule, data, behind, y, said, norms):
    """Line 5 of `rl/dqn`, K times, for actions (K, N) and Q_φ'(s', ·) `behind` (K, N, A): said (K, N, A) becomes Q_φ(s, ·).

    The goals y (K, N) are made anew where φ chooses. Returns how many updates there were; ‖gradient‖ of each stands in norms
    (K,), before it is clipped.
    """
    batch = y.shape[1]
    delta = np.empty(said.shape[1:], net.theta.dtype)
    for k in range(len(y)):
        if rule.double:
            q = forward(net.theta, layers, data.reached[k], room.kept)
            for i in range(batch):
                delta[i, 0] = behind[k, i, q[i].argmax()]
            goals(data.reward[k], data.terminated[k], delta[:, 0], rule.gamma, y[k])
        said[k] = forward(net.theta, layers, data.state[k], room.kept)
        delta[:] = 0
        for i in range(batch):
            a = data.action[k, i]
            error = said[k, i, a] - y[k, i]
            if rule.huber:
                error = min(max(error, -1.0), 1.0)
            delta[i, a] = error / batch
        backward(net.theta, layers, data.state[k], delta, room, net.gradient)
        norms[k] = length(net.gradient)
        if not math.isfinite(norms[k]):
            return k
        shrink(net.gradient, norms[k], rule.clip_norm)
        descend(net, adam, adam.taken + k + 1)
    return len(y)
