"""Whole runs of DAgger against a plain one: torch's layers and Adam, worlds stepped one by one, every number again."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import etude
from etude.blocks.acting.environments import environment
from etude.core.randomness import fold
from etude.data.batches import Stream
from etude.imitation import dagger
from etude.imitation.dagger import Config
from etude.imitation.parts import experts, obstacle

SEED = 3
SMALL = {"examples": 25, "iterations": 3, "worlds": 2, "labels": 15, "updates": 6, "batch": 9, "widths": (5,)}
SMALL |= {"learning_rate": 0.03, "evaluation_episodes": 2, "final_episodes": 3}
CASES = [
    {},
    {"beta": 0.6, "keep_best": False, "updates": 3},
    {"expert": "obstacle", "widths": (4, 3)},
    {"labels": 3, "examples": 40, "updates": 3},
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A run with these settings, made once for all tests here."""
    made = {}

    def run(extra):
        key = json.dumps(extra)
        if key not in made:
            out = tmp_path_factory.mktemp("dagger") / "run"
            with pytest.MonkeyPatch.context() as patch:
                if extra:  # one film is enough
                    patch.setattr(dagger, "show", lambda *given: None)
                made[key] = etude.run("imitation/dagger", out=out, quiet=True, seed=SEED, **SMALL | extra)
        return made[key]

    return run


def expert_of(config):
    """(what knows the world, what acts for (seed, purpose), what answers)"""
    if config.expert == "obstacle":
        kind = experts.Expert("", 2, 2, False, obstacle.LIMIT, obstacle.Obstacle, obstacle.two_ways, obstacle.nearer)
        return kind, obstacle.two_ways, obstacle.nearer
    kind = experts._in_world(experts.Expert("", 4, 2, True), environment("CartPole-v1"), "")
    rule = lambda states: (states @ np.array([0.1, 0.3, 1.0, 0.5], np.float32) > 0).astype(np.int64)  # noqa: E731
    return kind, (lambda seed, purpose: rule), rule


def plain_net(widths, inputs, outputs):
    parts = []
    for width in widths:
        parts += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))


def plain(config):
    """Rows of the log, D, and per iteration what the policy does."""
    kind, expert, answer = expert_of(config)
    discrete, outputs = kind.discrete, kind.actions
    seen, said, number = np.zeros((0, kind.size), np.float32), None, 0
    while len(seen) < config.examples:
        purpose = f"first steps {number}"
        part = kind.play(expert(SEED, purpose), -(-(config.examples - len(seen)) // kind.limit), SEED, purpose)
        seen = np.concatenate([seen, part.observations])
        said = part.actions if said is None else np.concatenate([said, part.actions])
        number += 1
    seen, said = seen[: config.examples], said[: config.examples]
    rows, policies = [], []
    for step in range(config.iterations):
        mean, std = seen.astype(np.float64).mean(0), seen.astype(np.float64).std(0)
        std[std == 0] = 1
        shift, scale = (0.0, 1.0) if discrete else (said.astype(np.float64).mean(0), said.astype(np.float64).std(0))
        torch.manual_seed(fold(SEED, step, 0, "fresh weights"))
        net = plain_net(config.widths, kind.size, outputs)
        adam = torch.optim.Adam(net.parameters(), config.learning_rate)
        x = torch.tensor((seen - mean) / std).float()
        y = torch.tensor(said if discrete else (said - shift) / scale)
        y = y.long() if discrete else y.float()
        stream, losses = Stream(len(seen), config.batch, fold(SEED, step)), []
        for update in range(config.updates):
            index = stream.indices(update)
            out = net(x[index])
            loss = F.cross_entropy(out, y[index]) if discrete else 0.5 * (out - y[index]).square().sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())

        def act(states, net=net, mean=mean, std=std, shift=shift, scale=scale):
            with torch.no_grad():
                out = net(torch.tensor((states - mean) / std).float())
            return out.argmax(1).numpy() if discrete else (out.double().numpy() * scale + shift).astype(np.float32)

        returns = kind.play(act, config.evaluation_episodes, fold(SEED, step), "evaluation").returns
        rows.append((np.mean(losses[-max(1, config.updates // 10) :]), len(seen), returns.mean()))
        policies.append(act)
        if step + 1 < config.iterations:
            dice, theirs = np.random.default_rng(fold(SEED, step, purpose="rollout")), expert(SEED, f"rollout {step}")

            def both(states, act=act, dice=dice, theirs=theirs, share=config.beta ** (step + 1)):
                one, other = theirs(states), act(states)
                asked = dice.random(len(states)) < share
                return np.array([a if take else b for take, a, b in zip(asked, one, other)])

            visited = kind.play(both, config.worlds, fold(SEED, step), "rollout")
            drawn = dice.permutation(len(visited.observations))[: config.labels]
            seen = np.concatenate([seen, visited.observations[drawn]])
            said = np.concatenate([said, answer(visited.observations[drawn])])
    return rows, seen, said, policies


@pytest.mark.parametrize("extra", CASES)
def test_loop_equals_a_plain_one(extra, run_of):
    """E78: what was visited is a set of its own, D_π, that is added to D; expert and learner act by β_i."""
    done, config = run_of(extra), Config(**SMALL | extra)
    rows, seen, said, policies = plain(config)
    logged = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["labels"] for row in logged] == [count for _, count, _ in rows]
    np.testing.assert_allclose([row["loss"] for row in logged], [loss for loss, _, _ in rows], rtol=1e-4)
    np.testing.assert_allclose([row["learner_return"] for row in logged], [mean for _, _, mean in rows], rtol=1e-6)
    loaded = etude.load(done.folder)
    held = loaded.state["data"]
    np.testing.assert_allclose(held["states"], seen, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(held["actions"], said, rtol=1e-4, atol=1e-5)
    means = [mean for _, _, mean in rows]
    assert "updates" not in extra or means[-1] < max(means)  # else --keep-best could not be seen
    best = max(i for i in range(config.iterations) if means[i] == max(means)) if config.keep_best else -1
    from etude.core.randomness import generator
    from etude.imitation.parts.policies import actor

    ours, theirs = actor(loaded.model, generator(0))(seen), policies[best](seen)
    if theirs.ndim == 1:
        assert (ours == theirs).mean() > 0.97  # a state on the border may fall to either side
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("extra", CASES)
def test_reported_numbers_are_those_of_the_saved_policies(extra, run_of):
    done, config = run_of(extra), Config(**SMALL | extra)
    kind, expert, answer = expert_of(config)
    _, seen, _, policies = plain(config)
    from etude.core.randomness import generator
    from etude.imitation.parts.policies import actor

    loaded, got = etude.load(done.folder), done.metrics
    assert got["labels"] == len(seen)
    ours = actor(loaded.model, generator(0))

    def played(policy):
        return kind.play(policy, config.final_episodes, SEED, "final evaluation")

    def error(policy, states):
        a, b = policy(states), answer(states)
        return (a != b).mean() if a.ndim == 1 else np.linalg.norm(a - b, axis=1).mean()

    mine, cloned, theirs = played(ours), played(policies[0]), played(expert(SEED, "final"))
    assert got["learner_return"] == pytest.approx(mine.returns.mean())
    assert got["learner_return_low"] == mine.returns.min()
    assert got["expert_return"] == pytest.approx(theirs.returns.mean())
    assert got["own_states_error"] == pytest.approx(error(ours, mine.observations), rel=1e-5)
    assert got["cloned_return"] == pytest.approx(cloned.returns.mean(), rel=1e-3)
    assert got["cloned_own_states_error"] == pytest.approx(error(policies[0], cloned.observations), rel=1e-2, abs=1e-2)
    assert got["cloned_experts_states_error"] == pytest.approx(
        error(policies[0], theirs.observations), rel=1e-2, abs=1e-2
    )
    if config.expert == "obstacle":
        assert got["crash_share"] == (mine.returns < 0).mean()
        assert got["cloned_crash_share"] == pytest.approx((cloned.returns < 0).mean())


def test_the_worlds_are_gymnasiums(run_of):
    """One evaluation episode of the rule, stepped in a world of Gymnasium itself: 500."""
    env, (_, _, rule) = gymnasium.make("CartPole-v1"), expert_of(Config())
    state, total, over = env.reset(seed=0)[0], 0.0, False
    while not over:
        state, reward, terminated, truncated, _ = env.step(int(rule(state[None])[0]))
        total, over = total + float(reward), terminated or truncated
    assert total == 500.0 == run_of({}).metrics["expert_return"]
