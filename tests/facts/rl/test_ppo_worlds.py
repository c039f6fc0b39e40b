"""PPO with continuous actions and with images: densities, gradients by hand, whole runs replayed by torch's own parts."""

import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal

import etude
from etude.blocks.acting.environments import Environment, environment
from etude.blocks.acting.episodes import play
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.rl import ppo
from etude.rl.parts.actor_critic import ActorCritic, GaussianActorCritic
from etude.rl.parts.pixels import convolutions, flat_size
from etude.rl.parts.policies import gaussian_gradient
from etude.rl.parts.rollouts import collect
from etude.rl.ppo import Config, clipped_objective, clipped_slope

SEED = 3
SWING, GAME = "etude-test/Swing-v0", "atari:Pong,size=36,noops=3,frames=60"
if SWING not in gymnasium.registry:
    gymnasium.register(SWING, entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=13)


def test_the_gradient_of_a_gaussian_is_that_of_torchs():
    torch.manual_seed(0)
    mean, log_std = torch.randn(9, 3).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    action, slope = 2 * torch.randn(9, 3).double(), torch.randn(9).double()
    policy = Independent(Normal(mean, log_std.exp()), 1)
    value = (slope * policy.log_prob(action)).sum() + 0.7 * policy.entropy().sum()
    want = torch.autograd.grad(value, (mean, log_std))
    for one, other in zip(gaussian_gradient(mean.detach(), log_std.detach(), action, slope, 0.7), want):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["vector", "images", "dense_images", "categorical_images"])
def test_the_gradient_written_out_is_that_of_the_graph(kind, shared):
    """float64: `follow`, `slopes` and `backward` against autograd of the loss by torch's distributions."""
    torch.manual_seed(1)
    size, widths = (3, (5, 6)) if kind == "vector" else ((2, 36, 40), (7, 5) if kind == "dense_images" else (6,))
    if kind == "images":
        widths = ()
    discrete = kind == "categorical_images"
    model = (ActorCritic if discrete else GaussianActorCritic)(size, 2, widths, shared).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.grad = torch.full_like(parameter, 7.0)  # what stood there is written over
    count = 24
    state = torch.rand(count, *((size,) if isinstance(size, int) else size)).double()
    action = torch.randint(2, (count,)) if discrete else torch.randn(count, 2).double()
    said, value = model(state)
    policy = Categorical(logits=said) if discrete else Independent(Normal(said, model.log_std.exp()), 1)
    log_prob, entropy, judged = model.judge(state, action)
    torch.testing.assert_close(log_prob, policy.log_prob(action))
    torch.testing.assert_close(entropy, policy.entropy())
    torch.testing.assert_close(judged, value)
    old, advantage, returns = (torch.randn(count).double() for _ in range(3))
    old = log_prob.detach() - old
    ratio = (log_prob - old).exp()
    loss = 0.7 * 0.5 * (value - returns).square().mean() - clipped_objective(ratio, advantage, 0.2).mean()
    want = torch.autograd.grad(loss - 0.3 * policy.entropy().mean(), list(model.parameters()))
    said, found, kept = model.follow(state)
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(model.log_prob(said, action), log_prob.detach())
    torch.testing.assert_close(model.entropy(said), entropy.detach())
    slope = clipped_slope(ratio.detach(), advantage, 0.2)
    assert 0 < (slope == 0).sum() < count
    model.backward(kept, model.slopes(said, action, slope / -count, 0.3 / -count), 0.7 / count * (found - returns))
    for parameter, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_the_convolutions_are_mnihs_and_bytes_are_read_as_0_to_1():
    net = convolutions((4, 84, 84), (512,))
    kinds = [(layer.out_channels, layer.kernel_size, layer.stride) for layer in net if isinstance(layer, nn.Conv2d)]
    assert kinds == [(32, (8, 8), (4, 4)), (64, (4, 4), (2, 2)), (64, (3, 3), (1, 1))]
    assert flat_size((4, 84, 84)) == 3136 == net[-2].in_features
    screens = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(net(screens), net(screens.float() / 255), atol=1e-6, rtol=1e-5)
    model = ActorCritic((4, 84, 84), 3, (16,), True)
    torch.testing.assert_close(model.follow(screens)[0], model(screens)[0].detach())
    with pytest.raises(UserError, match="35 × 84 pixels, and the convolutions need 36"):
        convolutions((4, 35, 84), (512,))


def test_actions_are_clipped_by_the_worlds_and_kept_as_they_were_drawn():
    """Far beyond the bounds the pendulum turns as at the bound, and the segment holds what was drawn."""
    runs = []
    for strength in (2.0, 50.0):
        worlds = Worlds.make(SWING, 2, 0, box=True)
        rows = collect(worlds, lambda s, v=strength: torch.full((len(s), 1), v), 5, torch.device("cpu"))
        assert rows.action.shape == (5, 2, 1)
        assert (rows.action == strength).all()
        runs.append(rows)
    torch.testing.assert_close(runs[0].state, runs[1].state, atol=0, rtol=0)
    torch.testing.assert_close(runs[0].reward, runs[1].reward, atol=0, rtol=0)


class Net(nn.Module):
    """torch's layers with the weights that the method draws first."""

    def __init__(self, config, extra):
        super().__init__()
        drawn = ppo.build(config, Spec(extra=extra))["model"]

        def body(widths):
            if "shape" in extra:
                planes = extra["shape"][0]
                parts = [nn.Conv2d(planes, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
                parts += [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()]
                size, bend = 64, nn.ReLU
            else:
                parts, size, bend = [], extra["size"], nn.Tanh
            for width in widths:
                parts += [nn.Linear(size, width), bend()]
                size = width
            return nn.Sequential(*parts)

        last = config.widths[-1]
        if config.shared:
            self.trunk, heads = body(config.widths), [nn.Identity(), nn.Identity()]
        else:
            self.trunk, heads = nn.Identity(), [body(config.widths), body(config.widths)]
        self.pi = nn.Sequential(heads[0], nn.Linear(last, extra["actions"]))
        self.v = nn.Sequential(heads[1], nn.Linear(last, 1))
        self.discrete = extra["discrete"]
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((extra["actions"],), config.log_std))
        with torch.no_grad():
            mine, its = dict(self.named_parameters()), list(drawn.named_parameters())
            order = [name for name in mine if name != "log_std"]
            for name, (_, value) in zip(order, [pair for pair in its if pair[0] != "log_std"], strict=True):
                mine[name].copy_(value)

    def forward(self, state):
        state = state.float() / 255 if state.dtype == torch.uint8 else state
        seen = self.trunk(state)
        said = self.pi(seen)
        policy = Categorical(logits=said) if self.discrete else Independent(Normal(said, self.log_std.exp()), 1)
        return policy, self.v(seen)[:, 0]

    def draw(self, state, dice):
        with torch.no_grad():
            policy, _ = self(state)
        if self.discrete:
            rising = policy.probs.double().cumsum(-1)
            uniform = torch.rand(len(state), generator=dice, dtype=torch.float64)
            return (uniform[:, None] >= rising).sum(-1).clamp(max=rising.shape[1] - 1).numpy()
        return (
            policy.base_dist.mean + self.log_std.detach().exp() * torch.randn(len(state), 1, generator=dice)
        ).numpy()

    def best(self, state):
        with torch.no_grad():
            policy, _ = self(state)
        return (policy.logits.argmax(-1) if self.discrete else policy.base_dist.mean).numpy()


def plain(config):
    """The run written plainly: its last loss row and its network."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    worlds = Worlds.make(config.env, config.worlds, SEED, "training", 0, box=None, images=True)
    extra = {"size": worlds.size, "actions": worlds.actions, "discrete": not worlds.box}
    net = Net(config, extra | ({"shape": worlds.shape} if len(worlds.shape) == 3 else {}))
    adam = torch.optim.Adam(net.parameters(), lr=config.learning_rate, eps=1e-5)
    n, rows = config.worlds, []
    segments = math.ceil(config.steps / (n * config.segment))
    for step in range(segments):
        left = 1 - step / segments
        adam.param_groups[0]["lr"], clip = config.learning_rate * left, config.clip_ratio * left
        dice, lives = generator(SEED, step, 0, "act"), [[] for _ in range(n)]
        for _ in range(config.segment):
            action = net.draw(torch.from_numpy(worlds.observation), dice)
            row = worlds.step(action)
            for i in range(n):
                lives[i].append(
                    (row.state[i], action[i], row.reward[i], row.next_state[i], row.terminated[i], row.truncated[i])
                )
        found = []
        for t in range(config.segment):
            for i in range(n):
                total, weight = 0.0, 1.0
                for state, _, reward, reached, terminated, truncated in lives[i][t:]:
                    with torch.no_grad():
                        here, there = (float(net(torch.from_numpy(x)[None])[1]) for x in (state, reached))
                    total += weight * (reward + config.gamma * (0.0 if terminated else there) - here)
                    weight *= config.gamma * config.gae_lambda
                    if terminated or truncated:
                        break
                found.append((lives[i][t], total))
        s = torch.from_numpy(np.stack([row[0] for row, _ in found]))
        a = torch.from_numpy(np.stack([row[1] for row, _ in found]))
        advantage = torch.tensor([value for _, value in found]).float()
        with torch.no_grad():
            policy, v = net(s)
            old, returns = policy.log_prob(a), advantage + v
        order, losses = generator(SEED, step, 0, "order"), []
        for _ in range(config.passes):
            for index in torch.randperm(len(a), generator=order).split(config.batch):
                policy, v = net(s[index])
                ratio, w = (policy.log_prob(a[index]) - old[index]).exp(), advantage[index]
                w = (w - w.mean()) / (w.std() + 1e-8)
                gain = torch.min(ratio * w, ratio.clamp(1 - clip, 1 + clip) * w).mean()
                error, entropy = 0.5 * ((v - returns[index]) ** 2).mean(), policy.entropy().mean()
                loss = config.value_coefficient * error - gain - config.entropy_bonus * entropy
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
                adam.step()
                losses.append(loss.item())
        rows.append({"loss": np.mean(losses), "entropy": entropy.item(), "kl": (ratio - 1 - ratio.log()).mean().item()})
    return net, rows


def start(config, spec):
    """The weights before the first update."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    model = ppo.build(config, spec)["model"]
    return [value.detach() for name, value in model.named_parameters() if name != "log_std"]


BASE = {
    "worlds": 2,
    "passes": 2,
    "learning_rate": 0.01,
    "clip_ratio": 0.2,
    "final_episodes": 1,
    "evaluation_episodes": 1,
}
BASE |= {"evaluate_every": 0, "entropy_bonus": 0.05, "quiet": True, "seed": SEED}
RUNS = {
    "box": {"env": SWING, "steps": 90, "segment": 20, "batch": 17, "widths": (6, 5), "log_std": -0.5},
    "box_shared": {"env": SWING, "steps": 60, "segment": 20, "batch": 17, "widths": (6,), "shared": True},
    "images": {"env": GAME, "steps": 32, "segment": 8, "batch": 9, "widths": (7,), "shared": True},
    "images_apart": {"env": GAME, "steps": 16, "segment": 8, "batch": 9, "widths": (5,)},
}


@pytest.mark.parametrize(
    "name", ["box", "images", *(pytest.param(name, marks=pytest.mark.long) for name in ("box_shared", "images_apart"))]
)
def test_loop_equals_a_plain_one(name, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "show", lambda *arguments: None)
    settings = BASE | RUNS[name]
    config = Config(**{key: value for key, value in settings.items() if key not in ("quiet", "seed")})
    net, want = plain(config)
    done = etude.run("rl/ppo", out=tmp_path / "run", **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row, other in zip(rows, want, strict=True):
        for key, value in other.items():
            assert row[key] == pytest.approx(value, rel=5e-3, abs=2e-4), (key, row["step"])
    loaded = etude.load(tmp_path / "run")
    mine = dict(loaded.model.named_parameters())
    log_std = mine.pop("log_std", None)
    theirs = [value for key, value in net.named_parameters() if key != "log_std"]
    first = start(config, loaded.spec)
    for one, other, before in zip(mine.values(), theirs, first, strict=True):
        assert (one - other).norm() <= 0.02 * (other - before).norm()  # Adam makes much of gradients that are nearly 0
    if log_std is not None:
        torch.testing.assert_close(log_std, net.log_std, atol=2e-4, rtol=2e-3)
        assert (log_std - config.log_std).abs().max() > 1e-3
    env = environment(config.env)
    scores = play(env, lambda s: net.best(torch.from_numpy(s)), 1, SEED, "final evaluation")
    assert done.metrics["greedy_return"] == pytest.approx(scores.mean(), rel=1e-2)
    dice = generator(SEED, 0, 0, "final act")
    sampled = play(env, lambda s: net.draw(torch.from_numpy(s), dice), 1, SEED, "final sampling")
    assert done.metrics["sampled_return"] == pytest.approx(sampled.mean(), rel=1e-2)


@pytest.mark.long
def test_resume_is_exact_in_worlds_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "show", lambda *arguments: None)
    settings = BASE | RUNS["images"] | {"env": GAME + ",sticky=0.25", "save_every": 1}
    whole = etude.run("rl/ppo", out=tmp_path / "whole", **settings)
    real, calls = ppo.advantages, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RunError("power cut")
        return real(*arguments)

    monkeypatch.setattr(ppo, "advantages", failing)
    with pytest.raises(RunError, match="power cut"):
        etude.run("rl/ppo", out=tmp_path / "parts", **settings)
    parts = etude.resume(tmp_path / "parts")
    assert parts.metrics == whole.metrics
    for one, other in zip(*(etude.load(run.folder).model.parameters() for run in (parts, whole)), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_acted_in_is_refused(tmp_path):
    for settings, said in (
        ({"shared": True, "widths": ()}, "--shared needs a hidden layer"),
        ({"env": "atari:Pong,size=30"}, "30 × 30 pixels"),
        ({"env": "Blackjack-v1"}, "FlattenObservation"),
    ):
        with pytest.raises(UserError, match=said):
            etude.run("rl/ppo", out=tmp_path / "run", quiet=True, **settings)
        assert not (tmp_path / "run").exists()


def test_several_numbers_in_one_discrete_action_are_refused_with_what_to_do():
    class Several(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    with pytest.raises(UserError, match="number all combinations"):
        Worlds.make(Environment("Several-v0", Several), box=None)
