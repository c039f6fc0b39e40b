"""A plain run of what learns to act in a box from a buffer: a list of transitions, torch's layers, every draw made again.

It shares with the methods only `Worlds` (tests of its own) and the documented random streams. A test takes it by
``box = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("boxes.py"))))``.
"""

import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

import etude
from etude.blocks.acting.worlds import Worlds
from etude.core.randomness import fold, generator

SEED = 3


class Slide(gymnasium.Env):
    """A point is pushed along a line, in [−1, 3]; beyond 1.5 it falls off, and the time limit cuts at 6."""

    observation_space = spaces.Box(-9, 9, (2,), np.float32)
    action_space = spaces.Box(np.float32([-1]), np.float32([3]))
    metadata: ClassVar = {"render_modes": []}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2)
        return self.x.astype(np.float32), {}

    def step(self, action):
        reward = float(-(self.x[0] ** 2) - 0.1 * action[0] ** 2)
        self.x = np.array([self.x[0] + 0.3 * self.x[1], 0.8 * self.x[1] + 0.3 * (action[0] - 0.5)])
        return self.x.astype(np.float32), reward, bool(self.x[0] > 1.5), False, {}

    def state_dict(self):
        return {"x": self.x.copy()}

    def load_state_dict(self, state):
        self.x = state["x"].copy()


if "etude-test/Slide-v0" not in gymnasium.registry:
    gymnasium.register("etude-test/Slide-v0", entry_point=Slide, max_episode_steps=6)

SMALL = {"env": "etude-test/Slide-v0", "steps": 160, "worlds": 2, "collect": 32, "updates": 5, "batch": 8}
SMALL |= {"buffer": 96, "learning_starts": 40, "widths": (6, 5), "evaluate_every": 64, "evaluation_episodes": 3}
SMALL |= {"final_episodes": 4, "learning_rate": 0.02, "actor_learning_rate": 0.01, "tau": 0.1, "gamma": 0.9}


def mlp(sizes):
    return nn.Sequential(*[part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())][:-1])


def pair(sizes):
    """Two MLPs, one drawn after the other."""
    return [mlp(sizes) for _ in range(2)]


def q(net, state, u):
    """Q(s, clip(u)) (N,)."""
    return net(torch.cat([state, u.clamp(-1, 1)], -1))[..., 0]


def chase(targets, sources, tau):
    """Every target net goes its τ towards its source."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            for p, new in zip(target.parameters(), source.parameters()):
                p += tau * (new - p)


def climb(adam, gain):
    adam.zero_grad()
    (-gain).backward()
    adam.step()


def episodes(best, count, seed, purpose, gamma=1.0):
    """Returns of episodes by `best` (states → u), one in each world, and the states in which they begin."""
    returns, begun = np.zeros(count), []
    for i in range(count):
        env = gymnasium.make("etude-test/Slide-v0")
        state, _ = env.reset(seed=fold(seed, 0, 0, f"{purpose}/{i}"))
        begun.append(state)
        for t in range(6):
            with torch.no_grad():
                u = best(torch.from_numpy(state)[None])[0].numpy()
            state, reward, terminated, truncated, _ = env.step(1 + 2 * u)
            returns[i] += gamma**t * np.float32(reward)
            if terminated or truncated:
                break
    return returns, torch.from_numpy(np.stack(begun))


def plain(config, agent):
    """The run written plainly: its rows and its numbers.

    `agent` has act(state, noise) → u, best(state) → u, value(state, u), and learn(step, draw) → what a round logs, where
    draw(k) is the k-th minibatch (s, u, r, s', terminated).
    """
    worlds = Worlds.make(config.env, config.worlds, SEED, "training", 0, box=True)
    memory, sums, ended, rows, taken, updates = [], np.zeros(config.worlds), [], [], 0, 0
    rounds = math.ceil(config.steps / config.collect)
    for step in range(rounds):
        dice, finished, row = generator(SEED, step, 0, "act"), [], {"step": step + 1}
        while taken < (step + 1) * config.collect:
            if taken < config.learning_starts:
                u = torch.rand(config.worlds, 1, generator=dice) * 2 - 1
            else:
                noise = torch.randn(config.worlds, 1, generator=dice)
                with torch.no_grad():
                    u = agent.act(torch.from_numpy(worlds.observation), noise)
            u = u.clamp(-1, 1).numpy()
            seen = worlds.step(1 + 2 * u)
            taken += len(seen.reward)
            for s, r, n, over, cut, world in zip(*seen[:1], *seen[2:]):
                memory.append((s, u[world], r, n, over))
                sums[world] += r
                if over or cut:
                    finished.append(sums[world])
                    sums[world] = 0.0
        memory = memory[-config.buffer :]
        ended += finished
        row |= {"training_return": np.mean(finished)} if finished else {}
        row["env_steps"] = taken
        if (step + 1) * config.collect > config.learning_starts:
            shape = (config.updates, config.batch)
            index = torch.randint(len(memory), shape, generator=generator(SEED, step, 0, "replay")).tolist()

            def draw(k, index=index, memory=memory):
                return [torch.from_numpy(np.stack([np.asarray(memory[i][j]) for i in index[k]])) for j in range(5)]

            row |= agent.learn(step, draw)
            updates += config.updates
        done, every = (step + 1) * config.collect, config.evaluate_every
        if step + 1 == rounds or (every and done // every > step * config.collect // every):
            scores, _ = episodes(agent.best, config.evaluation_episodes, fold(SEED, step), "evaluation")
            row["greedy_return"] = scores.mean()
        rows.append(row)
    return rows, {"training_return": np.mean(ended[-100:]), "env_steps": taken, "updates": updates} | final(
        config, agent
    )


def final(config, agent):
    """The numbers of the last episodes."""
    fresh = (agent.best, config.final_episodes, SEED, "final evaluation")
    (scores, begun), (discounted, _) = episodes(*fresh), episodes(*fresh, gamma=config.gamma)
    with torch.no_grad():
        promised = agent.value(begun, agent.best(begun)).numpy()
    overestimation = (promised - discounted).mean()
    return {"greedy_return": scores.mean(), "greedy_return_low": scores.min(), "overestimation": overestimation}


def flat(net):
    """One vector: layer by layer the weights as (in, out), then the biases."""
    parts = [p.detach() for p in net.parameters()]
    return torch.cat([p.t().flatten() if p.dim() == 2 else p.flatten() for p in parts])


def flat_state(state):
    return torch.cat([p.t().flatten() if p.dim() == 2 else p.flatten() for p in state.values()])


def saved(loaded, name):
    """The network of that name from the checkpoint, in the order of `flat`; of critics (n, parameters)."""
    state = loaded.state[name] if name in loaded.state else loaded.modules[name].state_dict()
    if "critic" not in name:
        return flat_state(state)
    nets = sorted({key.split(".")[1] for key in state})
    return torch.stack([flat_state({k: p for k, p in state.items() if k.startswith(f"nets.{i}.")}) for i in nets])


def ours(name, settings, folder):
    """(numbers, rows, what was saved) of a run of the method."""
    result = etude.run(name, out=folder, seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(numbers=result.metrics, rows=rows, loaded=etude.load(folder))
