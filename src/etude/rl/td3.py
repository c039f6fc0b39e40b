"""TD3: the smaller of two critics, an actor that waits, a target that is smeared

Paper: Fujimoto, van Hoof & Meger, Addressing Function Approximation Error in Actor-Critic Methods, 2018, arXiv:1802.09477.

Equation: ã' = clip(μ_θ'(s') + clip(σ̃ ε, −c, c), −1, 1),  ε ~ N(0, 1)
    y = r + γ (1 − terminated) min_{i = 1, 2} Q_{φ'_i}(s', ã'),    L(φ) = Σ_i mean (Q_{φ_i}(s, u) − y)²
    every d updates: ∇_θ J = mean ∇_u Q_{φ_1}(s, u)|_{u = μ_θ(s)} ∇_θ μ_θ(s),  φ' ← φ' + τ (φ − φ'),  θ' ← θ' + τ (θ − θ')

Algorithm: (the paper's algorithm 1; K updates after every `collect` steps)
    1. while the budget of environment steps lasts
    2.     u = μ_θ(s) + σ ε, add the transitions to B
    3.     K times: draw a minibatch (s, u, r, s') from B uniformly
    4.         ã' by the target actor with clipped noise, y by the smaller target critic, a constant
    5.         φ_i ← φ_i − α Adam(∇ mean (Q_{φ_i}(s, u) − y)²), i = 1, 2
    6.         every d updates
    7.             θ ← θ + β Adam(∇_θ mean Q_{φ_1}(s, μ_θ(s)))
    8.             the targets follow

Differences:
- Actions are u ∈ [−1, 1] inside, so σ, σ̃ and c are shares of half the box in every environment.
- E93: nothing is bootstrapped behind a termination; behind a time limit the value still counts (as in the authors' code).
- Learning waits for `learning_starts` uniform steps; the authors wait 25,000 (1,000 in easy worlds) and make one update a
  step. Here K updates follow `collect` steps, and d counts updates, whatever the number of worlds.
- `--update compiled` makes the updates in machine code (`parts/replay_updates.py`), all of a round in one call, on the same
  minibatches and noise and equal but for rounding. It takes one rank and the CPU.
- The paper's networks are (400, 300) and its Adam runs at 1e-3 with batches of 100; its later code has (256, 256), 3e-4, 256.

Expect: one core, 50 s: Pendulum after 15,000 steps, seed 0: greedy return −145 (after 10,000 steps −549, −144, −131).

Command: `etude run rl/td3 --env Pendulum-v1 --seed 1`
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
from etude.core.config import Count, NonNegative, Positive, Probability, Whole
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
from etude.rl.parts.replay_updates import Steps
from etude.rl.parts.replay_updates import td3 as fused


@dataclass(frozen=True)
class Config:
    env: str = "Pendulum-v1"
    """An environment with continuous actions between bounds: registered with Gymnasium (``module:Name-v0`` imports the module
    first), ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that makes one.
    """
    steps: Count = 15_000
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
    noise: NonNegative = 0.1
    """σ of the exploration, as a share of half the box."""
    target_noise: NonNegative = 0.2
    """σ̃ of the target's actions; 0: no smearing."""
    noise_clip: NonNegative = 0.5
    """c: how far the target's noise may go."""
    delay: Count = 2
    """Updates of the critics for each one of the actor and the targets (d)."""
    clipped: bool = True
    """The smaller of two target critics; off: each critic by its own target."""
    tau: Probability = 0.01
    """τ: how far the targets go towards the networks."""
    learning_rate: Positive = 1e-3
    """α of the critics' Adam."""
    actor_learning_rate: Positive = 1e-3
    """β of the actor's Adam."""
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
    "compiled": Config(engine="compiled", update="compiled"),
    "paper": Config(
        steps=1_000_000, worlds=1, collect=50, updates=50, batch=100, buffer=1_000_000, learning_starts=25_000, gamma=0.99,
        widths=(400, 300), evaluate_every=5000,
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
    "noise_clip": 0.01,
}

METRICS = {
    "overestimation": "Q of the first states and the best actions there, less the discounted return that followed"
}

EXPERIMENTS = (
    Experiment(
        "pendulum", preset="default", metric="greedy_return", bar=-170.0,
        notes="the last actor on 50 fresh episodes",
        controls=(
            Control("an untrained network", {"updates": 0, "steps": 256}),
            Control("targets that stand still", {"tau": 0.0}),
        ),
    ),
    Experiment(
        "compiled", preset="compiled", metric="greedy_return", bar=-170.0, notes="worlds and updates in machine code",
        controls=(Control("an untrained network", {"updates": 0, "steps": 256}),),
    ),
)  # fmt: skip

# N states, A numbers in an action


def smeared(best: Tensor, noise: Tensor, sigma: float, limit: float) -> Tensor:
    """clip(u + clip(σ̃ ε, −c, c), −1, 1) (N, A) for the target actor's u and standard normal noise, (N, A) each."""
    return (best + (sigma * noise).clamp(-limit, limit)).clamp(-1, 1)


def least(values: Tensor) -> Tensor:
    """min_i Q_i for both critics: (2, N) → (2, N), equal rows."""
    return values.amin(0, keepdim=True).expand_as(values)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed), "actions" (numbers in one), "low" and "high"."""
    size, actions = spec.extra["size"], spec.extra["actions"]
    return {
        "model": DeterministicActor(size, actions, config.widths),
        "critic": Critics(2, size, actions, config.widths),
    }


@method("rl/td3", paper="arXiv:1802.09477", section="7.6.7", needs=("rl",), threads=1)
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
    assert isinstance(model, DeterministicActor)
    assert isinstance(critic, Critics)
    target_model, target_critic = frozen(model), frozen(critic)
    actor_optimizer = Adam([flatten(model)], lr=config.actor_learning_rate)
    optimizer = Adam([flatten(critic)], lr=config.learning_rate)
    learner = None
    if config.update == "compiled":
        learner = BoxLearner(model, critic, target_model, target_critic, actor_optimizer, optimizer, config.batch)
    rule = Steps(
        config.gamma, config.tau, config.target_noise, config.noise_clip, config.delay, int(config.clipped), 0.0
    )
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
                return (model(torch.from_numpy(state).to(run.device)).cpu() + config.noise * noise).numpy()

        gather(worlds, replay, reached, act)  # line 2
        if finished := worlds.drain():
            box.recent = (box.recent + finished)[-100:]
            run.log(training_return=float(np.mean(finished)))
        run.log(env_steps=float(worlds.steps))
        if reached > config.learning_starts and config.updates:
            shape = (config.updates, config.batch)
            rows = replay.gather(replay.sample(shape, run.generator("replay", step)), run.device)  # line 3
            noise = torch.randn(*shape, worlds.actions, generator=run.generator("noise", step)).to(run.device)
            if learner:  # lines 4 to 8
                losses, values, _ = learner.learn(fused, rule, rows, noise, box.updates)
                run.average(critic, model, loss=losses[-1])
                box.updates += config.updates
            else:
                names = ("state", "action", "reward", "next_state", "terminated")
                losses, values = [], []
                with torch.no_grad():  # the gradients are written out
                    for k in range(config.updates):
                        s, u, r, after, over = (rows[name][k] for name in names)
                        there = smeared(target_model(after), noise[k], config.target_noise, config.noise_clip)  # line 4
                        behind = target_critic(after, there)
                        behind = least(behind) if config.clipped else behind
                        y = td_target(r, over, behind, config.gamma)  # (2, N)
                        q, kept = critic.follow(s, u)
                        error = q - y
                        loss = error.square().mean(1).sum()
                        critic.learn(kept, error * (2 / config.batch))
                        run.average(critic, loss=loss)
                        optimizer.step()  # line 5
                        box.updates += 1
                        if box.updates % config.delay == 0:  # line 6
                            best_u, kept = model.act(s)
                            model.learn(kept, critic.slope(s, best_u) * (-1 / config.batch))
                            run.average(model)
                            actor_optimizer.step()  # line 7
                            follow_(target_critic, critic, config.tau)  # line 8
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
    """Play by the actor, write each episode as a GIF where it can be drawn, and return the scores."""
    return filmed(loaded, options, folder)
