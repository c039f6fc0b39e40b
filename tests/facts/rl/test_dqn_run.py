"""Whole runs of DQN against a plain one: torch's own parts, a list as buffer, every draw made again, every number counted.

The plain run shares with the method only `Worlds` (tests of its own) and the documented random streams.
"""

import copy
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.blocks.acting.worlds import Worlds
from etude.core.randomness import fold, generator
from etude.rl import dqn
from etude.rl.dqn import Config

SEED = 3
SMALL = {"steps": 160, "worlds": 2, "collect": 16, "updates": 4, "batch": 8, "buffer": 96, "learning_starts": 20}
SMALL |= {"widths": (6, 5), "evaluate_every": 48, "evaluation_episodes": 3, "final_episodes": 3, "clip_norm": 0.5}
SMALL |= {"learning_rate": 0.01, "epsilon_fraction": 0.7}


class Scalar(nn.Module):
    """Q(s, a) as the one output of an MLP with the action beside the state."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, state):
        columns = [self.mlp(torch.cat([state, one.expand(len(state), 2)], 1)) for one in torch.eye(2)]
        return torch.cat(columns, 1)


def network(config):
    widths = (4, *config.widths, 2) if config.action_outputs else (6, *config.widths, 1)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    mlp = nn.Sequential(*layers[:-1])
    return mlp if config.action_outputs else Scalar(mlp)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def probabilities(q, config, epsilon):
    """π(· | s) of one state, written out as the notes and Sutton & Barto have it."""
    best, actions = int(np.argmax(q)), len(q)
    if config.exploration == "boltzmann":
        weights = [math.exp((float(v) - float(max(q))) / config.temperature) for v in q]
        return [w / sum(weights) for w in weights]
    if config.exploration == "notes_epsilon_greedy":
        return [1 - epsilon if a == best else epsilon / (actions - 1) for a in range(actions)]
    return [(1 - epsilon) * (a == best) + epsilon / actions for a in range(actions)]


def episodes(net, count, seed, purpose, gamma=1.0):
    """Returns of greedy episodes, one in each world, and the value of the state in which each begins."""
    env = gymnasium.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
    state, _ = env.reset(seed=fold(seed, 0, 0, purpose))
    with torch.no_grad():
        value = net(torch.from_numpy(state)).max(1).values.double().numpy()
        returns, going = np.zeros(count), np.ones(count, bool)
        for t in range(500):
            state, reward, terminated, truncated, _ = env.step(net(torch.from_numpy(state)).argmax(1).numpy())
            returns += going * gamma**t * reward
            going &= ~(terminated | truncated)
            if not going.any():
                break
    return returns, value


def plain(config):
    """The run written plainly. Gives its rows, its numbers and its networks."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    net = network(config)
    target, optimizer = copy.deepcopy(net), torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    worlds = Worlds.make("CartPole-v1", config.worlds, SEED, "training", 0)
    memory, sums, ended, rows = [], np.zeros(config.worlds), [], []
    taken = copied = updates = 0
    best, kept = -math.inf, None
    rounds = math.ceil(config.steps / config.collect)
    for step in range(rounds):
        dice, finished, row = generator(SEED, step, 0, "explore"), [], {"step": step + 1}
        while taken < (step + 1) * config.collect:
            waiting = taken < config.learning_starts
            done = min(1.0, taken / config.steps / config.epsilon_fraction)
            epsilon = 1 + (config.epsilon_end - 1) * done
            with torch.no_grad():
                q = net(torch.from_numpy(worlds.observation)).numpy()
            actions = []
            for u, values in zip(torch.rand(config.worlds, generator=dice, dtype=torch.float64).tolist(), q):
                left, right = [0.5, 0.5] if waiting else probabilities(values, config, epsilon)
                actions.append(int(u * (left + right) >= left))
            seen = worlds.step(np.array(actions))
            taken += len(seen.reward)
            for s, a, r, n, over, cut, world in zip(*seen):
                memory.append((s, a, r, n, over))
                sums[world] += r
                if over or cut:
                    finished.append(sums[world])
                    sums[world] = 0.0
        memory = memory[-config.buffer :]
        ended += finished
        row |= {"training_return": np.mean(finished)} if finished else {}
        row |= {"env_steps": taken} | (
            {} if config.exploration == "boltzmann" else {"epsilon": 1 if waiting else epsilon}
        )
        if (step + 1) * config.collect > config.learning_starts:
            if (step + 1) * config.collect // config.target_every > copied:
                target.load_state_dict(net.state_dict())
                copied = (step + 1) * config.collect // config.target_every
            drawn = torch.randint(
                len(memory), (config.updates, config.batch), generator=generator(SEED, step, 0, "replay")
            )
            losses, means = [], []
            for k in range(config.updates):
                s, a, r, n, over = (torch.from_numpy(np.array(x)) for x in zip(*(memory[i] for i in drawn[k])))
                with torch.no_grad():
                    behind = target(n)
                    choice = (net(n) if config.double else behind).argmax(1)
                    y = r + config.gamma * behind[torch.arange(len(r)), choice] * (1 - over.float())
                q = net(s)[torch.arange(len(r)), a]
                value = F.smooth_l1_loss(q, y) if config.huber else 0.5 * F.mse_loss(q, y)
                losses.append(value.item())
                means.append(q.mean().item())
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
                optimizer.step()
                updates += 1
            row |= {"loss": np.mean(losses), "q_mean": np.mean(means)}
        crossed = (step + 1) * config.collect // config.evaluate_every - step * config.collect // config.evaluate_every
        if crossed or step + 1 == rounds:
            score = episodes(net, config.evaluation_episodes, fold(SEED, step), "evaluation")[0].mean()
            row |= {"greedy_return": score}
            if score >= best:
                best, kept = score, copy.deepcopy(net)
        rows.append(row)
    final = kept if config.keep_best else net
    returns, value = episodes(final, config.final_episodes, SEED, "final evaluation")
    discounted, _ = episodes(final, config.final_episodes, SEED, "final evaluation", config.gamma)
    numbers = {
        "greedy_return": returns.mean(),
        "greedy_return_low": returns.min(),
        "last_greedy_return": episodes(net, config.final_episodes, SEED, "last evaluation")[0].mean(),
        "overestimation": (value - discounted).mean(),
        "training_return": np.mean(ended[-100:]),
        "env_steps": taken,
        "updates": updates,
    }
    return SimpleNamespace(rows=rows, numbers=numbers, last=flat(net), final=flat(final), target=flat(target))


def ours(settings, folder):
    result = etude.run("rl/dqn", out=folder, seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result.metrics, rows, etude.load(folder)


def agree(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-4, abs=2e-5), (name, other["step"])


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(dqn, "show", lambda *arguments: None)


CHANGES = (
    {},
    {"double": True, "target_every": 64, "learning_rate": 0.05},
    {"target_every": 64},
    {"action_outputs": False, "huber": False},
    {"huber": False},
    {"updates": 7},
    {"batch": 5},
    {"buffer": 32},
    {"gamma": 0.8},
    {"clip_norm": 100.0},
    {"learning_rate": 0.003},
    {"learning_starts": 70},
    {"collect": 24, "worlds": 3},
    {"exploration": "notes_epsilon_greedy", "epsilon_end": 0.3},
    {"exploration": "boltzmann", "temperature": 0.05},
    {"epsilon_end": 0.2, "epsilon_fraction": 0.4},
    {"keep_best": False, "evaluate_every": 16},
)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_equals_a_plain_one_under_every_setting(changes, base, no_film, tmp_path):
    settings = SMALL | changes
    want = plain(Config(**settings))
    metrics, rows, loaded = ours(settings, tmp_path / "run")
    agree(rows, want.rows)
    torch.testing.assert_close(loaded.model.phi.detach(), want.final, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.as_tensor(loaded.state["target"]["phi"]), want.target, atol=2e-5, rtol=1e-4)
    assert metrics == pytest.approx(want.numbers, rel=2e-4, abs=2e-5)
    if "double" in changes:
        base = plain(Config(**settings | {"double": False}))
    if changes.keys() - {"keep_best", "evaluate_every"}:  # what is tested must matter, far beyond rounding
        assert len(want.last) != len(base.last) or (want.last - base.last).abs().max() > 1e-3


def test_loop_ends_with_the_best_network_only_if_told(no_film, tmp_path):
    settings = SMALL | {"evaluate_every": 16, "evaluation_episodes": 2}
    kept, last = (plain(Config(**settings, keep_best=keep)) for keep in (True, False))
    scores = [row["greedy_return"] for row in kept.rows]
    assert max(scores) > scores[-1]
    assert (kept.final - last.final).abs().max() > 1e-2
    for keep, want in ((True, kept), (False, last)):
        metrics, _, loaded = ours(settings | {"keep_best": keep}, tmp_path / str(keep))
        torch.testing.assert_close(loaded.model.phi.detach(), want.final, atol=2e-5, rtol=1e-4)
        assert metrics == pytest.approx(want.numbers, rel=2e-4, abs=2e-5)
        assert loaded.state["box"]["best"] == pytest.approx(max(scores))


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    metrics, rows, loaded = ours(SMALL, tmp_path / "run")
    returns, value = episodes(loaded.model, 3, SEED, "final evaluation")
    discounted, _ = episodes(loaded.model, 3, SEED, "final evaluation", 0.99)
    assert metrics["greedy_return"] == returns.mean()
    assert metrics["greedy_return_low"] == returns.min()
    assert metrics["overestimation"] == pytest.approx((value - discounted).mean(), rel=1e-5)
    assert metrics["env_steps"] == rows[-1]["env_steps"] == loaded.state["worlds"]["steps"]
    assert metrics["updates"] == 9 * 4  # rounds 2 to 10
    assert loaded.state["optimizer"]["state"]
    assert metrics["training_return"] == pytest.approx(np.mean(loaded.state["box"]["recent"]))


def test_reported_training_return_is_of_the_last_hundred_episodes(no_film, tmp_path):
    settings = SMALL | {"steps": 4000, "collect": 500, "buffer": 500, "learning_starts": 4000, "evaluate_every": 0}
    metrics, rows, _ = ours(settings, tmp_path / "run")
    want = plain(Config(**settings | {"evaluate_every": 10**9}))
    agree(rows, want.rows)
    assert metrics["training_return"] == want.numbers["training_return"]
    assert metrics["updates"] == 0


def test_reported_zero_updates_are_said(no_film, tmp_path, capsys):
    settings = {"steps": 200, "evaluation_episodes": 1, "final_episodes": 1}
    result = etude.run("rl/dqn", out=tmp_path / "short", **settings)
    sentence = "no update will be made, for --learning-starts is 1,000 and the run takes 256 environment steps"
    assert sentence in capsys.readouterr().err
    assert sentence in (result.folder / "artifacts" / "no_updates.txt").read_text()
    assert "untrained network" in (result.folder / "report.html").read_text()
    assert result.metrics["updates"] == 0
    model = etude.load(result.folder).model
    torch.manual_seed(fold(0, 0, 0, "init"))
    assert torch.equal(flat(model), flat(network(Config())))
    etude.run("rl/dqn", out=tmp_path / "off", updates=0, **settings)
    assert "--updates is 0" in capsys.readouterr().err
    etude.run("rl/dqn", out=tmp_path / "enough", **settings | {"learning_starts": 255, "updates": 1})
    assert "no update" not in capsys.readouterr().err
