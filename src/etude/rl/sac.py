"""SAC: act well and as randomly as that allows, at a temperature that sets itself

Paper: Haarnoja et al., Soft Actor-Critic Algorithms and Applications, 2018, arXiv:1812.05905; Soft Actor-Critic, 2018,
arXiv:1801.01290.

Equation: u ~ π_θ(·|s) = tanh of N(mean_θ(s), σ_θ(s)²),  u' ~ π_θ(·|s')
    y = r + γ (1 − terminated) (min_{i = 1, 2} Q_{φ'_i}(s', u') − α log π_θ(u' | s')),  L(φ) = Σ_i mean ½ (Q_{φ_i}(s, u) − y)²
    J(θ) = mean (min_i Q_{φ_i}(s, u_θ) − α log π_θ(u_θ | s)),  u_θ = tanh(mean_θ(s) + σ_θ(s) ε)
    J(α) = −log α · mean (log π_θ(u_θ | s) + H̄),  H̄ = entropy_target · A

Algorithm: (the paper's algorithm 1; K updates after every `collect` steps)
    1. while the budget of environment steps lasts
    2.     act by π_θ, add the transitions to B
    3.     K times: draw a minibatch (s, u, r, s') from B uniformly
    4.         y by the target critics and π_θ, a constant
    5.         φ_i ← φ_i − Adam(∇ mean ½ (Q_{φ_i}(s, u) − y)²), i = 1, 2
    6.         θ ← θ + Adam(∇_θ J(θ))
    7.         log α ← log α − Adam(∇ J(α))
    8.         φ' ← φ' + τ (φ − φ')

Differences:
- The temperature's loss has log α where the paper's equation 18 has α, as in the authors' code: the same zero and sign.
- The density is that of u ∈ [−1, 1]^A, in every environment; in the world's units log π would be less by Σ log half.
- log(1 − tanh² x) is computed from x, not from a clamped tanh x, and log σ is kept between −20 and 2.
- E93: nothing is bootstrapped behind a termination; behind a time limit the value still counts.
- `--update compiled` makes the updates in machine code (`parts/replay_updates.py`), all of a round in one call, on the same
  minibatches and noise and equal but for rounding. It takes one rank and the CPU.
- `--no-automatic` keeps α at `temperature`. There is no target actor, as in the paper.

Expect: one core, 47 s: Pendulum after 10,000 steps and 4,544 updates, seeds 0-2: greedy return −148, −149, −133.

Command: `etude run rl/sac --env Pendulum-v1 --seed 1`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford_learning
from etude.blocks.acting.returns import td_target
from etude.blocks.acting.worlds import Engine, Worlds
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Positive, Probability, Whole
from etude.core.randomness import fold
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim.adam import Adam
from etude.optim.flat import flatten
from etude.rl.parts.continuous import (
    Bounds,
    Critics,
    Sample,
    SquashedGaussian,
    about,
    acting,
    ending,
    filmed,
    follow_,
    frozen,
    gather,
    replay_of,
    room,
    sentences,
)
from etude.rl.parts.replay_fused import BoxLearner, refuse
from etude.rl.parts.replay_updates import Steps
from etude.rl.parts.replay_updates import sac as fused


@dataclass(frozen=True)
class Config:
    env: str = "Pendulum-v1"
    """An environment with continuous actions between bounds: registered with Gymnasium (``module:Name-v0`` imports the module
    first), ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that makes one.
    """
    steps: Count = 10_000
    """Environment steps in all (on each rank), rounded up to whole rounds."""
    worlds: Copies = 4
    """Copies of the environment that act together."""
    engine: Engine = "gymnasium"
    """Gymnasium's worlds, or the classic ones compiled: the same transitions, many times as fast."""
    update: Literal["torch", "compiled"] = "torch"
    """Who computes the updates: torch, or machine code on one thread of the CPU, twice as fast (one rank; equal but for
    rounding; half a minute to compile, the first time ever).
    """
    collect: Count = 64
    """Environment steps in a round, before its updates."""
    updates: Whole = 32
    """Updates in a round (K); 0 leaves the networks untrained."""
    batch: Count = 128
    """Transitions in a minibatch."""
    buffer: Count = 100_000
    """Transitions that the replay buffer holds."""
    learning_starts: Whole = 1000
    """Environment steps with uniform actions and no updates."""
    gamma: Probability = 0.98
    """Discount γ."""
    automatic: bool = True
    """Let α move so that the entropy is H̄."""
    temperature: Positive = 1.0
    """α, or where it begins."""
    entropy_target: float = -1.0
    """H̄ for each number of an action (nats of u in [−1, 1])."""
    tau: Probability = 0.01
    """τ: how far the targets go towards the networks."""
    learning_rate: Positive = 1e-3
    """Rate of the critics' Adam."""
    actor_learning_rate: Positive = 1e-3
    """Rate of the actor's Adam."""
    temperature_learning_rate: Positive = 1e-3
    """Rate of the temperature's Adam."""
    widths: tuple[Count, ...] = (256, 256)
    """Widths of the hidden layers of all networks."""
    evaluate_every: Whole = 1024
    """Environment steps between greedy evaluations (at the end of a round); 0: only the last."""
    evaluation_episodes: Copies = 10
    """Episodes of each greedy evaluation along the way."""
    final_episodes: Copies = 50
    """Fresh episodes of the last greedy evaluation."""


PRESETS = {
    "tiny": Config(
        steps=600, updates=16, batch=32, learning_starts=200, widths=(16,), evaluate_every=256, evaluation_episodes=2,
        final_episodes=2,
    ),
    "default": Config(),
    "compiled": Config(engine="compiled", update="compiled", steps=15_000),
    "paper": Config(
        steps=1_000_000, worlds=1, collect=50, updates=50, batch=256, buffer=1_000_000, learning_starts=10_000, gamma=0.99,
        learning_rate=3e-4, actor_learning_rate=3e-4, temperature_learning_rate=3e-4, evaluate_every=5000,
    ),
}  # fmt: skip

SETTINGS = {
    "update": Idle("the same numbers but for rounding, which tests compare"),
    "env": "MountainCarContinuous-v0",
    "engine": "compiled",
    "steps": 800,
    "buffer": 300,
    "learning_starts": 300,
    "widths": (12,),
}

METRICS = {
    "temperature": "α, the weight of the entropy, at the end",
    "overestimation": "Q of the first states and the best actions there, less the discounted return that followed",
}

EXPERIMENTS = (
    Experiment(
        "pendulum", preset="default", metric="greedy_return", bar=-170.0,
        notes="the last policy's means on 50 fresh episodes",
        controls=(
            Control("an untrained network", {"updates": 0, "steps": 256}),
            Control("a temperature that drowns the reward", {"automatic": False, "temperature": 100.0}),
        ),
    ),
    Experiment(
        "compiled", preset="compiled", metric="greedy_return", bar=-170.0,
        notes="worlds and updates in machine code; after 10,000 steps seed 1 had not settled (-220)",
        controls=(Control("an untrained network", {"updates": 0, "steps": 256}),),
    ),
)  # fmt: skip

# N states, A numbers in an action


def soft_value(values: Tensor, log_prob: Tensor, alpha: Tensor | float) -> Tensor:
    """min_i Q_i − α log π (N,) for Q (2, N) and log π (N,)."""
    return values.amin(0) - alpha * log_prob


class Temperature(nn.Module):
    """α = exp(log α), and log α is what moves."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(alpha).log())

    def forward(self) -> Tensor:
        """α (0-dim), a constant."""
        return self.log_alpha.detach().exp()

    def learn(self, log_prob: Tensor, target: float) -> None:
        """∇ J(α) = −mean (log π + H̄) of log π (N,) into .grad: α rises where the entropy is below H̄."""
        self.log_alpha.grad = -(log_prob.mean() + target)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed), "actions" (numbers in one), "low" and "high"."""
    size, actions = spec.extra["size"], spec.extra["actions"]
    return {
        "model": SquashedGaussian(size, actions, config.widths),
        "critic": Critics(2, size, actions, config.widths),
    }


@method("rl/sac", paper="arXiv:1812.05905", section="7.6.7", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    env = environment(config.env, run.env)
    worlds = Worlds.make(env, config.worlds, run.seed, "training", run.rank, config.engine, box=True)
    spec = Spec(extra=about(config.env, worlds))
    capacity = room(config)
    if config.update == "compiled":
        refuse(run)
    afford_learning([worlds.size + worlds.actions, *config.widths, 1], config.updates * config.batch)
    run.describe(spec)
    built = build(config, spec)
    model, critic = run.place(built["model"]), run.place(built["critic"])
    assert isinstance(model, SquashedGaussian)
    assert isinstance(critic, Critics)
    target_critic, temperature = frozen(critic), run.place(Temperature(config.temperature))
    target = config.entropy_target * worlds.actions
    actor_optimizer = Adam([flatten(model)], lr=config.actor_learning_rate)
    optimizer = Adam([flatten(critic)], lr=config.learning_rate)
    temperature_optimizer = Adam(temperature.parameters(), lr=config.temperature_learning_rate)
    learner = None
    if config.update == "compiled":
        optimizers = actor_optimizer, optimizer
        learner = BoxLearner(model, critic, None, target_critic, *optimizers, config.batch, temperature_optimizer)
    rule = Steps(config.gamma, config.tau, 0.0, 0.0, 1, int(config.automatic), target)
    replay, box = replay_of(worlds, capacity), Box(recent=[], updates=0)
    run.track(model=model, critic=critic, target_critic=target_critic, temperature=temperature, worlds=worlds)
    run.track(temperature_optimizer=temperature_optimizer)
    run.track(actor_optimizer=actor_optimizer, optimizer=optimizer, replay=replay, box=box)
    sentences(run, config, env, worlds, sum(p.numel() for net in (model, critic) for p in net.parameters()))
    best = acting(model, Bounds(worlds.low, worlds.high))
    rounds = -(-config.steps // config.collect)

    for step in run.steps(rounds):  # line 1
        reached, dice = (step + 1) * config.collect, run.generator("act", step)

        def act(state: NDArray[np.float32], dice: torch.Generator = dice) -> NDArray[np.float32]:
            if worlds.steps < config.learning_starts:
                return (torch.rand(len(state), worlds.actions, generator=dice) * 2 - 1).numpy()
            noise = torch.randn(len(state), worlds.actions, generator=dice)
            with torch.no_grad():
                return model.draw(torch.from_numpy(state).to(run.device), noise.to(run.device))[0].cpu().numpy()

        gather(worlds, replay, reached, act)  # line 2
        if finished := worlds.drain():
            box.recent = (box.recent + finished)[-100:]
            run.log(training_return=float(np.mean(finished)))
        run.log(env_steps=float(worlds.steps))
        if reached > config.learning_starts and config.updates:
            shape = (config.updates, config.batch)
            rows = replay.gather(replay.sample(shape, run.generator("replay", step)), run.device)  # line 3
            noise = torch.randn(2, *shape, worlds.actions, generator=run.generator("noise", step)).to(run.device)
            if learner:  # lines 4 to 8
                losses, values, entropies = learner.learn(fused, rule, rows, noise)
                run.average(critic, model, temperature, loss=losses[-1])
                box.updates += config.updates
            else:
                names = ("state", "action", "reward", "next_state", "terminated")
                losses, values, entropies = [], [], []
                with torch.no_grad():  # the gradients are written out
                    for k in range(config.updates):
                        s, u, r, after, over = (rows[name][k] for name in names)
                        alpha = temperature()
                        there, log_prob = model.draw(after, noise[0, k])  # line 4
                        behind = soft_value(target_critic(after, there), log_prob, alpha)
                        y = td_target(r, over, behind, config.gamma)
                        q, kept = critic.follow(s, u)
                        error = q - y
                        loss = 0.5 * error.square().mean(1).sum()
                        critic.learn(kept, error / config.batch)
                        run.average(critic, loss=loss)
                        optimizer.step()  # line 5
                        here, log_prob, kept = model.act(s, noise[1, k])
                        model.learn(kept, critic.least_slope(s, here) / -config.batch, alpha / config.batch)
                        run.average(model)
                        actor_optimizer.step()  # line 6
                        if config.automatic:
                            temperature.learn(log_prob, target)
                            run.average(temperature)
                            temperature_optimizer.step()  # line 7
                        follow_(target_critic, critic, config.tau)  # line 8
                        box.updates += 1
                        losses.append(loss)
                        values.append(q.mean())
                        entropies.append(-log_prob.mean())
            run.log(entropy=torch.stack(entropies).mean(), temperature=temperature())
            run.log(loss=torch.stack(losses).mean(), q_mean=torch.stack(values).mean())
        every = config.evaluate_every
        if step + 1 == rounds or (every and reached // every > step * config.collect // every):
            score = play(env, best, config.evaluation_episodes, fold(run.seed, step))
            run.log(greedy_return=float(score.mean()))

    @torch.no_grad()
    def value(state: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = torch.from_numpy(state).to(run.device)
        return critic(seen, model.best(seen))[0].cpu().numpy()

    worlds.close()
    show(run, env, best)
    return ending(run, env, config, box, worlds.steps, best, value) | {"temperature": float(temperature())}


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play by the means, write each episode as a GIF where it can be drawn, and return the scores."""
    return filmed(loaded, options, folder)
