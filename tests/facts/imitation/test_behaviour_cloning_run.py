"""Whole runs of behaviour cloning against plain ones: torch's own layers, distributions and optimizer, every number again.

The plain run shares with the method the recorded episodes, the order of the batches and the documented random streams.
"""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence
from torch.nn import functional as F

import etude
from etude.blocks.acting.environments import environment
from etude.core.errors import RunError
from etude.core.randomness import fold, generator
from etude.data.batches import Stream
from etude.imitation.behaviour_cloning import Config
from etude.imitation.parts import experts, obstacle
from etude.imitation.parts import policies as p

SEED = 5
SMALL = {"steps": 7, "expert_episodes": 8, "batch": 10, "widths": (6, 5), "evaluate_every": 3, "evaluation_episodes": 3}
SMALL |= {"final_episodes": 5, "learning_rate": 0.02, "components": 3, "bins": 6, "clip_norm": 2.0}


def net(inputs, widths, outputs):
    parts = [part for a, b in pairwise((inputs, *widths, outputs)) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


class Plain(nn.Module):
    """One of the five, written with torch's own parts; `loss` (episodes of unequal length come one by one)."""

    def __init__(self, config, size, actions, discrete):
        super().__init__()
        self.c, self.discrete, self.numbers = config, discrete, actions
        widths, k, z = config.widths, config.components, config.latent
        if config.policy == "markov":
            self.net = net(size, widths, actions)
        elif config.policy == "history":
            self.lstm, self.head = nn.LSTM(size, config.width), nn.Linear(config.width, actions)
        elif config.policy == "mixture":
            self.net = net(size, widths, k * (1 + 2 * actions))
        elif config.policy == "latent":
            self.encoder, self.decoder = net(size + actions, widths, 2 * z), net(size + z, widths, actions)
            self.log_std = nn.Parameter(torch.full((actions,), -1.0))
        else:
            self.nets = nn.ModuleList(net(size + d, widths, config.bins) for d in range(actions))

    def fit(self, output, a):
        return F.cross_entropy(output, a, reduction="none") if self.discrete else 0.5 * ((a - output) ** 2).sum(-1)

    def loss(self, x, a, noise, range_):
        """Per step, (T,) of what is seen (T, S) and done (T,) or (T, A), standardised."""
        c, count = self.c, self.numbers
        if c.policy == "markov":
            return self.fit(self.net(x), a)
        if c.policy == "history":
            return self.fit(self.head(self.lstm(x)[0]), a)
        if c.policy == "mixture":
            logits, mean, log_std = self.net(x).split([c.components, c.components * count, c.components * count], -1)
            mean, sigma = (y.view(-1, c.components, count) for y in (mean, log_std.exp() + c.least_sigma))
            return -MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, sigma), 1)).log_prob(a)
        if c.policy == "latent":
            m, s = self.encoder(torch.cat([x, a], -1)).chunk(2, -1)
            q = Normal(m, s.exp())
            made = Normal(self.decoder(torch.cat([x, m + s.exp() * noise], -1)), self.log_std.exp() + c.least_sigma)
            return kl_divergence(q, Normal(torch.zeros_like(m), torch.ones_like(s))).sum(-1) - made.log_prob(a).sum(-1)
        low, high = range_
        index = ((a - low) / (high - low) * c.bins).long().clamp(0, c.bins - 1)
        middle = low + (index + 0.5) * (high - low) / c.bins
        logits = [part(torch.cat([x, middle[:, :d]], -1)) for d, part in enumerate(self.nets)]
        return sum(F.cross_entropy(logits[d], index[:, d], reduction="none") for d in range(count))


def recorded(config):
    if config.expert == "sinusoid":
        return experts.Expert("", 1, 1, False, given=experts._points).shows(config.expert_episodes, SEED)
    if config.expert == "obstacle":
        expert = experts.Expert("", 2, 2, False, obstacle.LIMIT, obstacle.Obstacle, obstacle.two_ways)
        return expert.shows(config.expert_episodes, SEED, config.noise)
    expert = experts._in_world(experts.Expert("", 4, 2, True), environment("CartPole-v1"), "")
    expert.policy = lambda seed, purpose: experts.balance
    return expert.shows(config.expert_episodes, SEED, config.noise)


def rate(config, step):
    return config.learning_rate * (
        0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.schedule == "cosine" else 1
    )


def plain(config):
    """The run written plainly: rows, test loss, the weights kept, the weights at the end."""
    data = recorded(config)
    train = data["training"]
    rows = slice(0, config.examples or len(train))
    seen = [c for c in range(train.observations.shape[1]) if c not in config.masked]
    discrete = train.actions.ndim == 1
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    model = Plain(config, len(seen), 2 if discrete else train.actions.shape[1], discrete)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    x, a = train.observations[rows][:, seen].astype(np.float64), train.actions[rows]
    mean, std = x.mean(0), x.std(0)
    shift, scale = (0, np.ones(1)) if discrete else (a.astype(np.float64).mean(0), a.astype(np.float64).std(0))
    span = None
    if not discrete:
        units = torch.tensor((a - shift) / scale).float()
        span = units.amin(0), units.amax(0)
    extra = float(np.log(scale).sum()) if config.policy in ("mixture", "latent") else 0.0

    def tensors(part):
        x = torch.tensor((part.observations[:, seen] - mean) / std).float()
        return x, torch.tensor(part.actions if discrete else (part.actions - shift) / scale).to(
            torch.int64 if discrete else torch.float32
        )

    def episodes(part, length=None):
        bounds = [*part.first.tolist(), len(part)]
        return [slice(b, min(e, b + length) if length else e) for b, e in pairwise(bounds)]

    def whole(part):
        x, a = tensors(part)
        noise = torch.randn(len(x), config.latent, generator=generator(SEED, -1, 0, "whole recording"))
        pieces = episodes(part) if config.policy == "history" else [slice(None)]
        with torch.no_grad():
            return float(sum(model.loss(x[s], a[s], noise[s], span).double().sum() for s in pieces) / len(x)) + extra

    x, a = tensors(train.head(rows.stop))
    history = config.policy == "history"
    pieces = episodes(train.head(rows.stop), config.window) if history else [slice(i, i + 1) for i in range(len(x))]
    stream, log, best, kept = Stream(len(pieces), config.batch, SEED), [], math.inf, None
    for step in range(config.steps):
        chosen = [pieces[i] for i in stream.indices(step)]
        noise = torch.randn(len(chosen), config.latent, generator=generator(SEED, step, 0, "noise"))
        losses = torch.cat([model.loss(x[s], a[s], noise[i], span) for i, s in enumerate(chosen)])
        loss = losses.mean() + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate(config, step)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        row = {"step": step + 1, "loss": loss.item()}
        if (config.evaluate_every and (step + 1) % config.evaluate_every == 0) or step + 1 == config.steps:
            row["validation_loss"] = whole(data["validation"])
            if row["validation_loss"] < best:
                best, kept = row["validation_loss"], [q.detach().clone() for q in model.parameters()]
        log.append(row)
    last = [q.detach().clone() for q in model.parameters()]
    if config.keep_best:
        for q, value in zip(model.parameters(), kept):
            q.data.copy_(value)
    return log, whole(data["test"]), [q.detach() for q in model.parameters()], last


CHANGES = (
    {},
    {"policy": "markov"},
    {"policy": "history", "width": 5},
    {"policy": "history", "width": 5, "window": 3, "batch": 3},
    {"policy": "latent", "latent": 3},
    {"policy": "autoregressive"},
    {"policy": "markov", "expert": "balance", "expert_episodes": 2, "masked": (1, 3)},
    {
        "policy": "history",
        "expert": "balance",
        "expert_episodes": 3,
        "noise": 0.6,
        "batch": 2,
        "examples": 900,
        "width": 4,
        "steps": 3,
    },
    {"expert": "sinusoid", "components": 2},
    {"noise": 0.4},
    {"masked": (1,)},
    {"examples": 17},
    {"schedule": "constant"},
    {"clip_norm": 0.05},
    {"least_sigma": 0.3},
    {"keep_best": False, "learning_rate": 0.4, "evaluate_every": 1, "schedule": "constant"},
    {"keep_best": True, "learning_rate": 0.4, "evaluate_every": 1, "schedule": "constant"},
)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: "-".join(map(str, c.values())) or "base")
def test_loop_equals_a_plain_one_for_every_policy_and_setting(changes, tmp_path, monkeypatch):
    from etude.imitation import behaviour_cloning

    monkeypatch.setattr(behaviour_cloning, "show", lambda *given: None)
    monkeypatch.setattr(behaviour_cloning, "picture", lambda *given: "no picture")
    settings = SMALL | changes
    want, test_loss, kept, last = plain(Config(**settings))
    result = etude.run("imitation/behaviour_cloning", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    got = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(got) == len(want)
    for one, other in zip(got, want):
        assert one.pop("learner_return", None) is None or "validation_loss" in other
        assert one == pytest.approx(other, rel=2e-4, abs=2e-4)
    weights = list(etude.load(result.folder).model.parameters())
    for one, other in zip(weights, kept, strict=True):
        torch.testing.assert_close(one.detach(), other, atol=2e-4, rtol=2e-3)
    assert result.metrics["test_loss"] == pytest.approx(test_loss, rel=1e-3, abs=1e-3)
    moved = max(float((a - b).abs().max()) for a, b in zip(kept, last))
    if settings["learning_rate"] == 0.4:
        assert moved > 0.01 if settings.get("keep_best", True) else moved == 0


def test_reported_numbers_are_those_of_the_saved_policy(tmp_path):
    settings = SMALL | {"steps": 40, "evaluate_every": 20, "final_episodes": 30}
    result = etude.run("imitation/behaviour_cloning", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    loaded = etude.load(result.folder)
    world, act = (
        obstacle.Obstacle(30, SEED, "final evaluation"),
        p.actor(loaded.model, generator(SEED, -1, 0, "acting")),
    )
    total, going, last = np.zeros(30), np.ones(30, bool), np.zeros(30)
    for _ in range(obstacle.LIMIT):
        row = world.step(act(world.observation))
        total += going * row.reward
        last = np.where(going, row.next_state[:, 0], last)
        going &= ~(row.terminated | row.truncated)
    m = result.metrics
    assert m["learner_return"] == pytest.approx(total.mean())
    assert m["learner_return_low"] == total.min()
    assert m["crash_share"] == pytest.approx((total < 0).mean())
    sides = [((total > 0) & (s * last > 0)).mean() for s in (-1, 1)]
    assert m["rarer_side_share"] == pytest.approx(min(sides))
    assert m["expert_return"] == 1
    assert m["training_steps"] == len(recorded(Config(**settings))["training"])
    assert m["crash_share"] > 0  # something to count
    assert (result.folder / "artifacts" / "ways.png").is_file()
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert loaded.state["box"]["best"] == pytest.approx(
        min(r["validation_loss"] for r in rows if "validation_loss" in r)
    )
    drawn = loaded.sample(count=7, seed=2)
    assert "7 episodes" in drawn.text
    again = loaded.sample(tmp_path / "again", count=7, seed=2)
    other = loaded.sample(tmp_path / "other", count=7, seed=3)
    kept = [np.load(s.folder / "episodes.npz")["actions"] for s in (drawn, again, other)]
    assert np.array_equal(kept[0], kept[1])
    assert kept[0].shape != kept[2].shape or not np.array_equal(kept[0], kept[2])


def test_reported_curve_is_of_episodes_on_the_way(tmp_path):
    settings = SMALL | {"steps": 4, "evaluate_every": 2, "keep_best": False}
    result = etude.run("imitation/behaviour_cloning", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "learner_return" in r] == [2, 4]
    model = etude.load(result.folder).model
    expert = experts.Expert("", 2, 2, False, obstacle.LIMIT, obstacle.Obstacle, obstacle.two_ways)
    played = expert.play(p.actor(model, generator(SEED, 3, 0, "evaluation")), 3, fold(SEED, 3), "evaluation")
    assert rows[-1]["learner_return"] == pytest.approx(played.returns.mean())


def test_loop_resumes_exactly_with_the_best_policy_so_far(tmp_path, monkeypatch):
    settings = SMALL | {"seed": SEED, "quiet": True, "steps": 9, "learning_rate": 0.4, "evaluate_every": 1}
    whole = etude.run("imitation/behaviour_cloning", out=tmp_path / "whole", **settings)
    calls, real = [], p.Mixture.losses

    def fail(self, *given):
        calls.append(1)
        if len(calls) == 12:  # a batch and a look at the validation episodes in each step
            raise RunError("power cut")
        return real(self, *given)

    monkeypatch.setattr(p.Mixture, "losses", fail)
    with pytest.raises(RunError, match="power cut"):
        etude.run("imitation/behaviour_cloning", out=tmp_path / "parts", save_every=1, **settings)
    monkeypatch.setattr(p.Mixture, "losses", real)
    parts = etude.resume(tmp_path / "parts")
    assert parts.metrics == whole.metrics
    assert (parts.folder / "metrics.jsonl").read_text() == (whole.folder / "metrics.jsonl").read_text()
