"""Actor-critic: V is fitted to what was seen, and then judges the actions

Paper: Konda & Tsitsiklis, Actor-Critic Algorithms, NeurIPS 1999; Sutton et al., Policy Gradient Methods for Reinforcement
    Learning with Function Approximation, NeurIPS 1999.

Equation: Â(s, a) = r + γ (1 − terminated) V_φ(s') − V_φ(s),  ∇J ≈ mean of ∇_θ log π_θ(a | s) Â(s, a)
    φ ← argmin mean (V_φ(s) − y)²,  y = r + γ (1 − terminated) V_φ(s') or the sum of the rewards to come

Algorithm: (notes, Algorithm 11; `--preset online` is Algorithm 12)
    1. while the budget of environment steps lasts
    2.     act with π_θ in n worlds for T steps
    3.     fit V_φ: targets y, constants, then steps of Adam towards them; both several times
    4.     Â of every step, by the new V_φ; constants
    5.     the policy's gradient
    6.     one step of Adam on θ

Differences:
- E88 (notes 7.4.4.1): line 3 of the notes says reward sums and the text bootstraps (in "step 2", which is 3): `--target` has
  both. A reward sum ends with its segment, where V stands for the rest.
- E89 (7.4.4): γ stands in the critic and in Â only (`--discounting factor`), as everywhere. That is not the gradient of the
  discounted objective; `--discounting exact` is, up to its scale: it weights a step by γ^t, t the age of its episode.
- 7.4.4.2: `--discounting death_state` leaves γ out and ends an episode after every step with probability 1 − γ, by a coin.
  Its values are those of γ. The world goes on, and every step begins a life: the states are those of `factor`.
- E93 (7.6): V is 0 behind a termination, but not behind a time limit.
- E90 (7.4.4.3): the notes average single steps of several threads; that is n worlds of one step (`--worlds 16 --segment 1`),
  each waiting for all. n-step returns in one loss are rl/a2c.
- Â is standardised over the batch (`--no-normalise`); one step alone is left as it is.
- Rows on which a world only resets are no transitions and are in no mean. Where nothing else is left (one world, one step) the
  gradient is 0, and Adam goes on by its momentum.

Expect: CartPole-v1, 150,000 steps, three seeds: 500 on fresh episodes, played by the policy itself (about 20 s on one core);
    `--preset online`, 30,000 steps: 500, 454, 500 (about 65 s)

Command: `etude run rl/actor_critic --target monte_carlo --shared`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford_learning
from etude.blocks.acting.worlds import Engine, Worlds
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, Positive, Probability, Whole
from etude.core.errors import RunError
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim import schedules
from etude.optim.adam import Adam
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.films import films
from etude.rl.parts.policies import categorical_entropy, categorical_log_prob
from etude.rl.parts.rollouts import Segment, advantages, collect
from etude.rl.reinforce import Sample, acting


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete actions: registered with Gymnasium (``module:Name-v0`` imports the module first),
    ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that makes one.
    """
    steps: Count = 150_000
    """Environment steps in all (on each rank), rounded up to whole batches."""
    worlds: Copies = 16
    """Copies of the environment that act together (n)."""
    engine: Engine = "gymnasium"
    """Gymnasium's worlds, or the classic ones compiled: the same transitions, many times as fast."""
    segment: Few = 64
    """Steps of each world in a batch (T)."""
    target: Literal["bootstrap", "monte_carlo"] = "bootstrap"
    """y that V is fitted to: one reward and V behind it, or the rewards to the end of the episode or the segment."""
    target_updates: Few = 10
    """Times that y is computed from V in each batch."""
    critic_updates: Few = 5
    """Steps of V towards each y."""
    gamma: Probability = 0.99
    """Discount γ."""
    discounting: Literal["factor", "exact", "death_state"] = "factor"
    """γ in the critic and Â; that, and γ^t at the policy's terms; or in its place a death after each step, by a coin."""
    normalise: bool = True
    """Standardise the advantages in each batch."""
    learning_rate: Positive = 1e-2
    """Adam's α of the policy, in the first batch."""
    critic_learning_rate: Positive = 5e-3
    """Adam's α of V."""
    schedule: schedules.Schedule = "linear"
    """The policy's learning rate over the run."""
    widths: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers."""
    shared: bool = False
    """One trunk with two heads; off: two networks."""
    log_every: Few = 1
    """Batches between two lines of the log."""
    evaluate_every: Whole = 25_000
    """Environment steps between greedy evaluations (at the end of a batch); 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes of each greedy evaluation along the way."""
    final_episodes: Copies = 100
    """Fresh episodes of the last evaluations, greedy and by the policy itself."""


PRESETS = {
    "tiny": Config(
        steps=1024, worlds=4, segment=32, widths=(16,), evaluate_every=512, evaluation_episodes=4, final_episodes=5
    ),
    "default": Config(),
    "online": Config(
        steps=30_000, worlds=1, segment=1, target_updates=1, critic_updates=1, normalise=False, learning_rate=3e-4,
        critic_learning_rate=1e-3, log_every=200,
    ),
}  # fmt: skip

SETTINGS = {"env": "Acrobot-v1", "schedule": "constant", "widths": (12,), "shared": True}

EXPERIMENTS = (
    Experiment(
        "cartpole", preset="default", metric="sampled_return", bar=475.0,
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        notes="J itself: the last policy, sampling its actions, on 100 fresh episodes",
        controls=(
            Control("one batch", {"steps": 1024}),
            Control("a critic that is not fitted", {"critic_learning_rate": 1e-9}),
            Control("advantages whose signs are drawn", swap={"advantages": "etude.rl.parts.nulls.drawn_advantages"}),
        ),
    ),
    Experiment(
        "online", preset="online", metric="sampled_return", bar=375.0,
        notes="Algorithm 12: one transition an update, so it is noisy and the bar leaves room",
        controls=(Control("a critic that is not fitted", {"critic_learning_rate": 1e-9}),),
    ),
)  # fmt: skip

# T steps of n worlds, M transitions of them that are real


def with_deaths(rows: Segment, gamma: float, coin: Tensor) -> Segment:
    """The segment in which a step is also the last where its coin (T, n) in [0, 1) is γ or more (notes 7.4.4.2)."""
    return rows._replace(terminated=rows.terminated | (coin.to(rows.reward.device) >= gamma))


def ages(rows: Segment, start: Tensor) -> Tensor:
    """Steps that each episode had had before row t, (T + 1, n) int64, from `start` (n,) before the first row."""
    age = [start]
    for real, ended in zip(rows.real, rows.terminated | rows.truncated):
        age.append(torch.where(real & ~ended, age[-1] + 1, 0))
    return torch.stack(age)


def standardised(advantage: Tensor) -> Tensor:
    """(Â − mean)/(deviation + 1e-8) (M,); one step alone stays as it is."""
    if len(advantage) < 2:
        return advantage
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def mean(terms: Tensor) -> Tensor:
    """Mean of M terms (M,), 0-dim; 0 where there are none."""
    return terms.sum() / max(len(terms), 1)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed) and "actions"."""
    return {"model": ActorCritic(spec.extra["size"], spec.extra["actions"], config.widths, config.shared)}


@method("rl/actor_critic", paper="Konda & Tsitsiklis 1999", section="7.4.4", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    env = environment(config.env, run.env)
    worlds = Worlds.make(env, config.worlds, run.seed, "training", run.rank, config.engine)
    spec = Spec(extra={"env": config.env, "size": worlds.size, "actions": worlds.actions})
    whole = config.worlds * config.segment
    afford_learning([worlds.size, *config.widths, worlds.actions], whole)
    run.describe(spec)
    model = run.place(build(config, spec)["model"])
    assert isinstance(model, ActorCritic)
    actor = Adam([*model.trunk.parameters(), *model.policy.parameters()], lr=config.learning_rate)
    critic = Adam([*model.trunk.parameters(), *model.critic.parameters()], lr=config.critic_learning_rate)
    box = Box(recent=[], age=torch.zeros(config.worlds, dtype=torch.int64))
    run.track(model=model, actor=actor, critic=critic, worlds=worlds, box=box)
    parameters = sum(p.numel() for p in model.parameters())
    run.say(f"{env.name}: {worlds.size} numbers observed, {worlds.actions} actions; {parameters:,} parameters")
    if worlds.note:
        box.age.zero_()
    for name, note in (("restarted_worlds", worlds.note), ("environment", env.note)):
        if note:
            run.say(note)
            run.artifact(name, note)
    batches = -(-config.steps // whole)
    rate = schedules.schedule(config.schedule, config.learning_rate, batches)
    greedy, final = acting(model), (config.final_episodes, run.seed)
    gamma = 1.0 if config.discounting == "death_state" else config.gamma
    reach = 1.0 if config.target == "monte_carlo" else 0.0  # λ of the targets

    for step in run.steps(batches):  # line 1
        dice = run.generator("act", step)
        rows = collect(
            worlds, lambda s, d=dice: model.act(s, model.noise(d, len(s))), config.segment, run.device
        )  # line 2
        real, weight = rows.real, torch.ones_like(rows.reward)
        if config.discounting == "exact":
            age = ages(rows, box.age.to(run.device))
            weight, box.age = config.gamma ** age[:-1].float(), age[-1].cpu()
        elif config.discounting == "death_state":
            rows = with_deaths(rows, config.gamma, torch.rand(real.shape, generator=run.generator("deaths", step)))
        state, action = rows.state[:-1][real], rows.action[real]

        error = torch.zeros(())
        for _ in range(config.target_updates):  # line 3
            wanted = advantages(rows, model.value, gamma, reach)[1][real]
            for _ in range(config.critic_updates):
                error = mean((model.value(state) - wanted).square())
                critic.zero_grad()
                error.backward()
                run.average(model.trunk, model.critic, value_loss=error)
                critic.step()

        advantage = advantages(rows, model.value, gamma, 0.0)[0][real]  # line 4
        if config.normalise:
            advantage = standardised(advantage)
        logits = model.logits(state)
        loss = -mean(weight[real] * advantage * categorical_log_prob(logits, action))
        actor.zero_grad()
        loss.backward()  # line 5
        run.average(model.trunk, model.policy, loss=loss)
        schedules.set_lr(actor, rate(step))
        actor.step()  # line 6

        if (step + 1) % config.log_every == 0 or step + 1 == batches:
            finished = worlds.drain()
            if finished:
                box.recent = (box.recent + finished)[-100:]
                run.log(training_return=float(np.mean(finished)))
            if not (loss.isfinite() and error.isfinite()):
                raise RunError(
                    f"a loss is not finite after {worlds.steps:,} environment steps; lower --critic-learning-rate"
                )
            entropy = mean(categorical_entropy(logits.detach()))
            run.log(loss=loss, value_loss=error, entropy=entropy, env_steps=float(worlds.steps))
        done, every = (step + 1) * whole, config.evaluate_every
        if step + 1 == batches or (every and done // every > step * whole // every):
            score = play(env, greedy, config.evaluation_episodes, fold(run.seed, step))
            run.log(greedy_return=float(score.mean()))

    worlds.close()
    scores = play(env, greedy, *final, "final evaluation")
    sampled = play(env, acting(model, generator(run.seed, 0, 0, "final act")), *final, "final sampling")
    show(run, env, greedy)
    return {
        "sampled_return": float(sampled.mean()),
        "greedy_return": float(scores.mean()),
        "greedy_return_low": float(scores.min()),
        **({"training_return": float(np.mean(box.recent))} if box.recent else {}),  # no episode may have ended
        "env_steps": float(worlds.steps),
    }


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play, write each episode as a GIF where the environment can be drawn, and return the scores."""
    dice = None if options.greedy else generator(options.seed, 0, 0, "sample")
    return films(environment(loaded.config.env), acting(loaded.model, dice), options.count, options.seed, folder)
