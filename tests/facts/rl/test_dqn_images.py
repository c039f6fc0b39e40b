"""DQN in worlds of images and in compiled ones: what the buffer hands out, the gradient, whole runs by torch's own parts."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.blocks.acting.replay import Replay, Screens
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold, generator
from etude.optim.denormals import flushed
from etude.rl import dqn
from etude.rl.dqn import QNetwork, activations, backward, slope
from etude.rl.parts.pixels import floats

SEED = 3
GAME = "atari:Pong,size=36,noops=3,frames=40,stack=3"


class Movie:
    """Worlds whose screens are numbered: an episode of world i has 1, 2, … steps and is cut or over in turn."""

    def __init__(self, count, stack, planes=1):
        self.count, self.stack, self.planes, self.number = count, stack, planes, 0
        self.seen, self.left, self.length = [self.screens() for _ in range(count)], [1] * count, [1] * count
        self.turn = 0

    def fresh(self):
        self.number += 1
        return (
            np.full((self.planes, 2, 3), self.number % 256, np.uint8)
            + np.arange(self.planes, dtype=np.uint8)[:, None, None]
        )

    def screens(self):
        return [self.fresh()] * self.stack

    def step(self):
        rows = {name: [] for name in ("state", "action", "reward", "next_state", "terminated", "truncated")}
        for i in range(self.count):
            after = [*self.seen[i][1:], self.fresh()]
            self.left[i] -= 1
            over = self.left[i] == 0
            self.turn += over
            values = (np.concatenate(self.seen[i]), self.number, self.number / 2, np.concatenate(after))
            for name, value in zip(rows, (*values, over and self.turn % 2 == 0, over and self.turn % 2 == 1)):
                rows[name].append(value)
            self.seen[i] = after
            if over:
                self.seen[i], self.length[i] = self.screens(), self.length[i] % 7 + 1 + i
                self.left[i] = self.length[i]
        kinds = {"action": np.int64, "reward": np.float32}
        return {name: np.array(value, dtype=kinds.get(name)) for name, value in rows.items()}


@pytest.mark.parametrize(
    ("count", "stack", "planes", "room"), [(1, 4, 1, 37), (3, 4, 1, 50), (2, 3, 3, 24), (4, 1, 3, 21)]
)
def test_stacks_come_out_as_they_went_in_and_none_crosses_an_episode_or_the_end_of_the_ring(count, stack, planes, room):
    movie, screens, plain = Movie(count, stack, planes), None, []
    screens = Screens(room, count, (stack * planes, 2, 3), planes)
    wrapped = 0
    for step in range(60):
        rows = movie.step()
        screens.add(**rows)
        plain = (plain + [{name: column[i] for name, column in rows.items()} for i in range(count)])[-room:]
        assert len(screens) == len(plain)
        full = len(plain) == room
        wrapped += full
        lost = (stack - 1) * count if full else 0
        index = np.arange(lost, len(plain))
        if step == 40:  # a checkpoint in between
            other = Screens(room, count, (stack * planes, 2, 3), planes)
            other.load_state_dict(copy.deepcopy(screens.state_dict()))
            screens = other
        got = screens.gather(index.reshape(1, -1))
        for name in ("state", "action", "reward", "next_state", "terminated"):
            want = np.stack([plain[i][name] for i in index])[None]
            assert np.array_equal(got[name].numpy(), want), (name, step)
            assert got[name].dtype == torch.from_numpy(want).dtype
        drawn = screens.sample((200,), torch.Generator().manual_seed(step))
        assert lost <= drawn.min() <= drawn.max() < len(plain)
    assert wrapped > 5


def test_screens_are_kept_twice_not_eight_times():
    screens, plain = Screens(64, 2, (4, 84, 84), 1), np.zeros((4, 84, 84), np.uint8)
    whole = Replay(64, state=plain, next_state=plain, action=0, reward=0.0, terminated=False, truncated=False)
    assert screens._rows.nbytes < whole._rows.nbytes / 3.9


def test_screens_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="4 planes are no stack of screens of 3"):
        Screens(100, 2, (4, 9, 9), 3)
    with pytest.raises(ValueError, match="room for 10 rows"):
        Screens(9, 2, (4, 9, 9), 1)
    rows = Movie(3, 4).step()
    with pytest.raises(ValueError, match="one row of each of the 2 worlds"):
        Screens(100, 2, (4, 2, 3), 1).add(**rows)


def test_worlds_that_begin_anew_are_told_to_the_buffer():
    movie, screens = Movie(1, 4), Screens(50, 1, (4, 2, 3), 1)
    for _ in range(9):
        screens.add(**movie.step())
    screens.begin()
    fresh = Movie(1, 4).step()
    screens.add(**fresh)
    assert np.array_equal(screens.gather(np.array([9]))["state"], fresh["state"])


@pytest.mark.parametrize("widths", [(), (7, 5)])
def test_written_out_gradient_of_convolutions_is_that_of_autograd(widths):
    torch.manual_seed(0)
    model = QNetwork((2, 36, 44), 3, widths).double()
    state, action, y = torch.rand(6, 2, 36, 44).double(), torch.randint(3, (6,)), 2 * torch.randn(6).double()
    q = model(state).gather(1, action[:, None])[:, 0]
    (want,) = torch.autograd.grad(F.smooth_l1_loss(q, y), model.phi)
    layers = model.layers(model.phi.detach())
    kept = activations(layers, state)
    weight = torch.zeros(6, 3).double().scatter_(1, action[:, None], 1 / 6)
    got = torch.full_like(want, float("nan"))  # everything must be written
    backward(layers, kept, slope(kept[-1] - y[:, None], True) * weight, model.layers(got))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)


def network(actions, planes, config):
    """Mnih's network of torch's layers."""
    parts = [
        nn.Conv2d(planes, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
    ]
    size, parts = 64, [*parts, nn.Flatten()]
    for width in config["widths"]:
        parts += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*parts, nn.Linear(size, actions))


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_network_starts_like_torch():
    torch.manual_seed(3)
    model = QNetwork((3, 36, 36), 6, (7,))
    torch.manual_seed(3)
    plain = network(6, 3, {"widths": (7,)})
    state = torch.randint(256, (2, 3, 36, 36), dtype=torch.uint8)
    assert torch.equal(flat(model), flat(plain))
    torch.testing.assert_close(model(state), plain(state / 255), atol=1e-6, rtol=1e-5)
    assert floats(state, torch.float64).dtype == torch.float64


SMALL = {
    "env": GAME,
    "steps": 96,
    "worlds": 2,
    "collect": 16,
    "updates": 3,
    "batch": 6,
    "buffer": 40,
    "learning_starts": 20,
}
SMALL |= {"widths": (7,), "evaluate_every": 0, "evaluation_episodes": 1, "final_episodes": 1, "target_every": 40}
SMALL |= {"learning_rate": 0.003, "epsilon_fraction": 0.7}


@pytest.fixture
def no_film(monkeypatch):
    monkeypatch.setattr(dqn, "show", lambda *arguments: None)


@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.long)])
def test_loop_equals_a_plain_one_that_keeps_whole_stacks(double, no_film, tmp_path):
    config = SMALL | {"double": double}
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    worlds = Worlds.make(GAME, 2, SEED, "training", 0, images=True)
    net = network(worlds.actions, 3, config)
    first, target = flat(net), copy.deepcopy(net)
    adam = torch.optim.Adam(net.parameters(), lr=config["learning_rate"])
    memory, taken, copied, rows = [], 0, 0, []
    for step in range(6):
        dice = generator(SEED, step, 0, "explore")
        while taken < (step + 1) * 16:
            epsilon = 1 - 0.96 * min(1.0, taken / 96 / 0.7)
            with torch.no_grad():
                best = net(torch.from_numpy(worlds.observation) / 255).argmax(1).tolist()
            actions = []
            for u, greedy in zip(torch.rand(2, generator=dice, dtype=torch.float64).tolist(), best):
                share = np.full(worlds.actions, 1 / worlds.actions)
                if taken >= 20:
                    share = epsilon * share + (1 - epsilon) * np.eye(worlds.actions)[greedy]
                actions.append(min(int((u >= share.cumsum()).sum()), worlds.actions - 1))
            seen = worlds.step(np.array(actions))
            taken += 2
            memory = (memory + [tuple(row) for row in zip(*seen[:5])])[-40:]
        if taken <= 20:
            continue
        if taken // 40 > copied:
            target.load_state_dict(net.state_dict())
            copied = taken // 40
        lost = 4 if len(memory) == 40 else 0  # two worlds, two older screens
        index = torch.randint(lost, len(memory), (3, 6), generator=generator(SEED, step, 0, "replay"))
        losses = []
        for batch in index.tolist():
            s, a, r, n, over = (torch.from_numpy(np.stack(column)) for column in zip(*(memory[i] for i in batch)))
            with torch.no_grad():
                behind = target(n / 255)
                choice = (net if double else target)(n / 255).argmax(1, keepdim=True)
                y = torch.where(over, r, r + 0.99 * behind.gather(1, choice)[:, 0])
            loss = F.smooth_l1_loss(net(s / 255).gather(1, a[:, None])[:, 0], y)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            adam.step()
            losses.append(loss.item())
        rows.append(np.mean(losses))
    etude.run("rl/dqn", out=tmp_path / "run", seed=SEED, quiet=True, **config)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in log if "loss" in row] == pytest.approx(rows, rel=5e-3, abs=1e-6)
    model = etude.load(tmp_path / "run").model
    moved = (flat(net) - first).norm()
    assert moved > 0.1
    assert (flat(model) - flat(net)).norm() < 0.02 * moved


@pytest.mark.long
def test_resume_is_exact_with_a_buffer_of_screens(no_film, tmp_path, monkeypatch):
    settings = SMALL | {"seed": SEED, "quiet": True, "save_every": 1}
    whole = etude.run("rl/dqn", out=tmp_path / "whole", **settings)
    calls, real = [], Screens.sample

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RunError("power cut")
        return real(self, *arguments)

    monkeypatch.setattr(Screens, "sample", fail)
    with pytest.raises(RunError, match="power cut"):
        etude.run("rl/dqn", out=tmp_path / "parts", **settings)
    parts = etude.resume(tmp_path / "parts")
    assert parts.metrics == whole.metrics
    assert torch.equal(etude.load(parts.folder).model.phi, etude.load(whole.folder).model.phi)


def test_compiled_worlds_are_learned_in(no_film, tmp_path, monkeypatch):
    settings = {"preset": "tiny", "steps": 512, "seed": 1, "quiet": True, "evaluate_every": 0, "final_episodes": 2}
    asked, real = [], Worlds.make

    def spy(env, count=1, seed=0, purpose="training", rank=0, engine="gymnasium", **more):
        asked.append((purpose, engine))
        return real(env, count, seed, purpose, rank, engine, **more)

    monkeypatch.setattr(dqn.Worlds, "make", spy)
    one = etude.run("rl/dqn", engine="compiled", out=tmp_path / "one", **settings)
    assert one.metrics["env_steps"] == 512
    assert [engine for purpose, engine in asked if purpose == "training"] == ["compiled"]
    with pytest.raises(UserError, match="none of the compiled worlds"):
        etude.run("rl/dqn", engine="compiled", env="FrozenLake-v1", out=tmp_path / "none", quiet=True)


def test_what_cannot_be_looked_at_is_refused(tmp_path):
    for settings, said in (
        ({"env": GAME, "worlds": 1, "action_outputs": False}, "leave --action-outputs on"),
        ({"env": "atari:Pong,size=20", "worlds": 1}, "20 × 20 pixels"),
        ({"env": GAME, "worlds": 3, "collect": 3, "buffer": 3}, "--buffer"),
    ):
        with pytest.raises(UserError, match=said):
            etude.run("rl/dqn", out=tmp_path / "run", quiet=True, **settings)
        assert not (tmp_path / "run").exists()


def test_subnormal_numbers_are_flushed_meanwhile_and_only_then():
    tiny = torch.full((16,), 1e-30)
    assert (tiny * 1e-10 > 0).all()
    with flushed():
        assert (tiny * 1e-10 == 0).all() or not torch.set_flush_denormal(True)
        with flushed():
            pass
        assert (tiny * 1e-10 == 0).all() or not torch.set_flush_denormal(True)
    assert (tiny * 1e-10 > 0).all()
    with pytest.raises(RuntimeError, match="x"), flushed():
        raise RuntimeError("x")
    assert (tiny * 1e-10 > 0).all()
    assert math.isclose(float(tiny.sum()), 1.6e-29, rel_tol=1e-5)
