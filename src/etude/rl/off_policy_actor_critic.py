"""Off-policy actor-critic: climb an action value that old transitions have taught

Paper: Degris, White & Sutton, Off-Policy Actor-Critic, 2012, arXiv:1205.4839; Heess et al., Learning Continuous Control
Policies by Stochastic Value Gradients, 2015, arXiv:1510.09142 (SVG(0), reparameterised); Lillicrap et al., Continuous control
with deep reinforcement learning, 2015, arXiv:1509.02971 (DDPG: `--gradient mean`).

Equation: y = r + γ (1 − terminated) E_{a' ~ π_θ'(·|s')} Q_φ'(s', a'),    J(θ) = mean over s in B of E_{a ~ π_θ(·|s)} Q_φ(s, a)
    π_θ(·|s) = N(μ_θ(s), σ²);  a = μ_θ(s) + σ ε, ε ~ N(0, 1)
    reparameterised  ∇_θ J = E_ε ∇_a Q_φ(s, a) ∇_θ μ_θ(s)
    score            ∇_θ J = E_a (Q_φ(s, a) − Q_φ(s, μ_θ(s))) ∇_θ log π_θ(a | s)
    mean             ∇_θ J = ∇_a Q_φ(s, a)|_{a = μ_θ(s)} ∇_θ μ_θ(s),  and y = r + γ (1 − terminated) Q_φ'(s', μ_θ'(s'))

Algorithm: (notes, Algorithm 23; K updates after every `collect` steps)
    1. while the budget of environment steps lasts
    2.     act by π_θ, add the transitions to B
    3.     K times: draw a minibatch (s, a, r, s') from B uniformly
    4.         y by φ' and θ', a constant
    5.         φ ← φ − α Adam(∇_φ mean ½ (Q_φ(s, a) − y)²)
    6.         θ ← θ + β Adam(∇_θ J(θ))
    7.         every N updates φ' ← φ' + τ (φ − φ'), θ' ← θ' + τ (θ − θ')

Differences:
- E97 (notes 7.6.7): ∇_θ E_{a ~ π_θ} Q needs the reparameterisation or the score; both are here, and a test finds them equal in
  mean. The states are the buffer's, not those of π_θ: J is not the return, as in all three papers.
- E93: nothing is bootstrapped behind a termination; behind a time limit the value still counts.
- The notes copy φ' and θ' every N steps (`--tau 1 --target-every N`); by default they follow slowly, as in DDPG.
- σ is fixed, for E Q alone is largest without noise, and then nothing is tried out any more. Entropy is what `rl/sac` adds.
- Actions are clipped to the box, which is a part of the world: Q_φ(s, a) means Q_φ(s, clip(a)) everywhere.
- The expectations are means over `draws` actions. μ_θ ends in tanh; the first steps are uniform over the box.
- `--update compiled` makes the updates in machine code (`parts/replay_updates.py`), all of a round in one call, on the same
  minibatches and noise and equal but for rounding. It takes one rank and the CPU.
- Against DDPG: noise without memory in place of Ornstein-Uhlenbeck's, no batch normalisation, no weight decay, torch's initial
  weights, the action enters the critic's first layer.

Expect: one core, 34 s: Pendulum after 10,000 steps and 4,544 updates, seeds 0-2: greedy return −144, −146, −134.

Command: `etude run rl/off_policy_actor_critic --env Pendulum-v1 --seed 1`
"""

from __future__ import annotations

from collections.abc import Callable
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
from etude.core.config import Count, Few, Positive, Probability, Whole
from etude.core.randomness import fold
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim.adam import Adam
from etude.optim.flat import flatten
from etude.rl.parts.continuous import (
    Bounds,
    Critics,
    DeterministicActor,
    Sample,
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
from etude.rl.parts.replay_updates import GRADIENTS, Steps
from etude.rl.parts.replay_updates import off_policy_actor_critic as fused

Gradient = Literal["reparameterised", "score", "mean"]


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
    gradient: Gradient = "reparameterised"
    """How the actor climbs Q: through the actions drawn, by the score, or at the mean action (DDPG)."""
    draws: Few = 1
    """Actions drawn for each expectation over π."""
    noise: Positive = 0.1
    """σ of the policy, as a share of half the box."""
    tau: Probability = 0.01
    """τ: how far the targets go towards the networks; 1 copies them."""
    target_every: Count = 1
    """Updates between moves of the targets (N)."""
    learning_rate: Positive = 1e-3
    """α of the critic's Adam."""
    actor_learning_rate: Positive = 1e-3
    """β of the actor's Adam."""
    widths: tuple[Count, ...] = (256, 256)
    """Widths of the hidden layers of both networks."""
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
    "compiled": Config(engine="compiled", update="compiled"),
    "ddpg": Config(gradient="mean", actor_learning_rate=1e-4, tau=0.001, gamma=0.99, batch=64, widths=(400, 300)),
}  # fmt: skip

SETTINGS = {
    "update": Idle("the same numbers but for rounding, which tests compare"),
    "env": "MountainCarContinuous-v0",
    "engine": "compiled",
    "steps": 800,
    "buffer": 300,
    "learning_starts": 300,
    "widths": (12,),
    "gradient": "score",
    "noise": 0.3,
    "target_every": 3,
}

METRICS = {
    "overestimation": "Q of the first states and the best actions there, less the discounted return that followed"
}

EXPERIMENTS = (
    Experiment(
        "pendulum", preset="default", metric="greedy_return", bar=-170.0,
        notes="the last policy's means on 50 fresh episodes",
        controls=(
            Control("an untrained network", {"updates": 0, "steps": 256}),
            Control("a critic that never learns", {"learning_rate": 1e-12}),
        ),
    ),
    Experiment(
        "compiled", preset="compiled", metric="greedy_return", bar=-170.0, notes="worlds and updates in machine code",
        controls=(Control("an untrained network", {"updates": 0, "steps": 256}),),
    ),
)  # fmt: skip

# N states, A numbers in an action, K draws


def drawn(mean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Actions of N(mean, σ²), (K, N, A), for means (N, A) and standard normal noise (K, N, A); not clipped."""
    return mean + sigma * noise


def value_of(critic: Callable[[Tensor, Tensor], Tensor], state: Tensor, action: Tensor) -> Tensor:
    """Q(s, clip(u)) (K, N) for states (N, D) and actions (K, N, A)."""
    clipped = action.clamp(-1, 1).flatten(0, 1)
    return critic(state.expand(len(action), -1, -1).flatten(0, 1), clipped)[0].view(action.shape[:2])


def expected_value(
    critic: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    mean: Tensor,
    noise: Tensor,
    sigma: float,
    gradient: Gradient,
) -> Tensor:
    """E_{a ~ π} Q(s, a) (N,) by the draws that `noise` (K, N, A) makes, or Q(s, μ(s)) of DDPG."""
    action = mean[None] if gradient == "mean" else drawn(mean, noise, sigma)
    return value_of(critic, state, action).mean(0)


def climb(
    critic: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    mean: Tensor,
    noise: Tensor,
    sigma: float,
    gradient: Gradient,
) -> Tensor:
    """∇_μ E_{a ~ π} Q(s, a) (N, A) by the draws that `noise` (K, N, A) makes; `slope` is ∇_a Q (N, A), or DDPG's at the mean."""
    if gradient == "mean":
        return slope(state, mean)
    action = drawn(mean, noise, sigma)
    if gradient == "score":
        advantage = value_of(critic, state, action) - value_of(critic, state, mean[None])
        return (advantage[..., None] * (action - mean)).mean(0) / sigma**2  # ∇_μ log π = (a − μ) / σ²
    inside = action.abs() <= 1  # where the box cuts, moving the mean moves nothing
    slopes = slope(state.expand(len(action), -1, -1).flatten(0, 1), action.clamp(-1, 1).flatten(0, 1))
    return (slopes.view_as(action) * inside).mean(0)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed), "actions" (numbers in one), "low" and "high"."""
    size, actions = spec.extra["size"], spec.extra["actions"]
    return {
        "model": DeterministicActor(size, actions, config.widths),
        "critic": Critics(1, size, actions, config.widths),
    }


@method("rl/off_policy_actor_critic", paper="arXiv:1205.4839", section="7.6.7", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    env = environment(config.env, run.env)
    worlds = Worlds.make(env, config.worlds, run.seed, "training", run.rank, config.engine, box=True)
    spec = Spec(extra=about(config.env, worlds))
    capacity = room(config)
    if config.update == "compiled":
        refuse(run)
    afford_learning([worlds.size + worlds.actions, *config.widths, 1], config.updates * config.batch * config.draws)
    run.describe(spec)
    built = build(config, spec)
    model, critic = run.place(built["model"]), run.place(built["critic"])
    assert isinstance(model, DeterministicActor)
    assert isinstance(critic, Critics)
    target_model, target_critic = frozen(model), frozen(critic)
    actor_optimizer = Adam([flatten(model)], lr=config.actor_learning_rate)
    optimizer = Adam([flatten(critic)], lr=config.learning_rate)
    learner = None
    if config.update == "compiled":
        learner = BoxLearner(model, critic, target_model, target_critic, actor_optimizer, optimizer, config.batch)
    kind = GRADIENTS.index(config.gradient)
    rule = Steps(config.gamma, config.tau, config.noise, 0.0, config.target_every, kind, 0.0)
    replay, box = replay_of(worlds, capacity), Box(recent=[], updates=0)
    run.track(model=model, critic=critic, target_model=target_model, target_critic=target_critic, worlds=worlds)
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
                return drawn(model(torch.from_numpy(state).to(run.device)).cpu(), noise, config.noise).numpy()

        gather(worlds, replay, reached, act)  # line 2
        if finished := worlds.drain():
            box.recent = (box.recent + finished)[-100:]
            run.log(training_return=float(np.mean(finished)))
        run.log(env_steps=float(worlds.steps))
        if reached > config.learning_starts and config.updates:
            shape = (config.updates, config.batch)
            rows = replay.gather(replay.sample(shape, run.generator("replay", step)), run.device)  # line 3
            size = (config.updates, 2, config.draws, config.batch, worlds.actions)
            noise = torch.randn(size, generator=run.generator("noise", step)).to(run.device)
            if learner:  # lines 4 to 7
                losses, values, _ = learner.learn(fused, rule, rows, noise, box.updates)
                run.average(critic, model, loss=losses[-1])
                box.updates += config.updates
            else:
                names = ("state", "action", "reward", "next_state", "terminated")
                losses, values = [], []
                with torch.no_grad():  # the gradients are written out
                    for k in range(config.updates):
                        s, a, r, after, over = (rows[name][k] for name in names)
                        there = target_model(after)  # line 4
                        behind = expected_value(target_critic, after, there, noise[k, 0], config.noise, config.gradient)
                        y = td_target(r, over, behind, config.gamma)
                        q, kept = critic.follow(s, a)
                        error = q - y
                        loss = 0.5 * error.square().mean()
                        critic.learn(kept, error / config.batch)
                        run.average(critic, loss=loss)
                        optimizer.step()  # line 5
                        mean, kept = model.act(s)
                        up = climb(critic, critic.slope, s, mean, noise[k, 1], config.noise, config.gradient)
                        model.learn(kept, up * (-1 / config.batch))
                        run.average(model)
                        actor_optimizer.step()  # line 6
                        box.updates += 1
                        if box.updates % config.target_every == 0:  # line 7
                            follow_(target_critic, critic, config.tau)
                            follow_(target_model, model, config.tau)
                        losses.append(loss)
                        values.append(q.mean())
            run.log(loss=torch.stack(losses).mean(), q_mean=torch.stack(values).mean())
        every = config.evaluate_every
        if step + 1 == rounds or (every and reached // every > step * config.collect // every):
            score = play(env, best, config.evaluation_episodes, fold(run.seed, step))
            run.log(greedy_return=float(score.mean()))

    @torch.no_grad()
    def value(state: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = torch.from_numpy(state).to(run.device)
        return critic(seen, model(seen))[0].cpu().numpy()

    worlds.close()
    show(run, env, best)
    return ending(run, env, config, box, worlds.steps, best, value)


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play by the policy's means, write each episode as a GIF where it can be drawn, and return the scores."""
    return filmed(loaded, options, folder)
