"""Advantage actor-critic (A2C): n-step returns from worlds that act together

Paper: Mnih et al., Asynchronous Methods for Deep Reinforcement Learning, 2016, arXiv:1602.01783; the synchronous form is that of
    its authors' successors (OpenAI Baselines, 2017).

Equation: R_t = Σ_{k<m} γ^k r_{t+k} + γ^m V_φ(s_{t+m}), m the steps to the end of the segment or of the episode (V there 0)
    minimised: −mean Â_t log π_θ(a_t | s_t) + c_V mean (V_φ(s_t) − R_t)² − c_H mean H(π_θ(· | s_t)),  Â_t = R_t − V_φ(s_t)

Algorithm: (notes, Algorithms 11 and 12, in n worlds)
    1. while the budget of environment steps lasts
    2.     act with π_θ in n worlds for T steps
    3.     R_t and Â_t, constants, from V_φ of the states that were reached
    4.     one step of RMSProp on the loss, the gradient no longer than clip_norm

Differences:
- E90 (notes 7.4.4.3): the notes call A3C what is this method: samples of parallel workers in one batch. A3C's workers write
  their own gradients into shared weights, without waiting for each other.
- E88, E89 (7.4.4.1): the target bootstraps, `--gae-lambda 1 --segment 5`; one step (`--segment 1`, or λ = 0) is the notes' online
  actor-critic. The actor's terms are not weighted by γ^t, as everywhere.
- E93 (7.6): V is 0 behind a termination, but not behind a time limit.
- RMSProp adds ε = 1e-5 outside the root and its mean of squares begins at 0; the paper's workers share theirs.
- The value's error is not halved, as in the paper; c_V is 0.5 (0.25 in its authors' code for the halved one).
- Rows on which a world only resets are no transitions and are in no mean.
- Under torchrun every rank acts in its own n worlds, and the gradient is the mean of the ranks'.
- θ does not change while a segment is made, so what the networks computed then is what the gradient needs: it is written out
  through the layers (`parts.remembered`), and nothing is computed twice or recorded.

Expect: one core, 8 s: CartPole after 200,000 steps, seeds 0 and 1: J = 500, 500.

Command: `etude run rl/a2c --env CartPole-v1 --shared`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford_learning
from etude.blocks.acting.worlds import Engine, Worlds
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, NonNegative, Positive, Probability, Whole
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim import schedules
from etude.optim.clipping import clip_norm_
from etude.optim.flat import flatten
from etude.optim.rmsprop import RMSProp
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.films import films
from etude.rl.parts.policies import categorical_entropy, categorical_gradient, categorical_log_prob
from etude.rl.parts.remembered import Collector, advantages
from etude.rl.reinforce import Sample, acting


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete actions: registered with Gymnasium (``module:Name-v0`` imports the module first),
    ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that makes one.
    """
    steps: Count = 200_000
    """Environment steps in all (on each rank), rounded up to whole segments."""
    worlds: Copies = 8
    """Copies of the environment that act together (n)."""
    engine: Engine = "gymnasium"
    """Gymnasium's worlds, or the classic ones compiled: the same transitions, many times as fast."""
    segment: Few = 8
    """Steps of each world between updates (T)."""
    gamma: Probability = 0.99
    """Discount γ."""
    gae_lambda: Probability = 1.0
    """λ of generalised advantages: 1 is the n-step return, 0 the one-step error."""
    value_coefficient: NonNegative = 0.5
    """c_V, of the value's squared error."""
    entropy_bonus: NonNegative = 0.0
    """c_H, of the policy's entropy."""
    clip_norm: Positive = 0.5
    """The gradient is scaled down to this norm."""
    learning_rate: Positive = 3e-3
    """RMSProp's α in the first segment."""
    schedule: schedules.Schedule = "linear"
    """Learning rate over the run."""
    widths: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers."""
    shared: bool = False
    """One trunk with two heads; off: two networks."""
    log_every: Few = 20
    """Updates between two lines of the log."""
    evaluate_every: Whole = 25_000
    """Environment steps between greedy evaluations (at the end of a segment); 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes of each greedy evaluation along the way."""
    final_episodes: Copies = 100
    """Fresh episodes of the last evaluations, greedy and by the policy itself."""


PRESETS = {
    "tiny": Config(
        steps=1024, worlds=4, widths=(16,), log_every=4, evaluate_every=512, evaluation_episodes=4, final_episodes=5
    ),
    "default": Config(),
    "online": Config(worlds=1, segment=1, gae_lambda=0.0, learning_rate=3e-4),  # the notes' Algorithm 12
}  # fmt: skip

SETTINGS = {
    "env": "Acrobot-v1",
    "schedule": "constant",
    "widths": (12,),
    "shared": True,
    "gae_lambda": 0.5,
}

SEEN = ("loss", "value_loss", "entropy")

EXPERIMENTS = (
    Experiment(
        "cartpole", preset="default", metric="sampled_return", bar=475.0,
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        notes="J itself: the last policy, sampling its actions, on 100 fresh episodes",
        controls=(
            Control("one update", {"steps": 64}),
            Control("advantages whose signs are drawn", swap={"advantages": "etude.rl.parts.nulls.drawn_signs"}),
        ),
    ),
)  # fmt: skip


# N = T n rows; a row that is no transition has weight 0, the M others 1/M: means are weighted sums


def loss_of(
    logits: Tensor, action: Tensor, value: Tensor, advantage: Tensor, returns: Tensor, weight: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mean squared error of V, mean entropy), 0-dim, of logits (N, A) and actions (N,); Â and R (N,) are constants."""
    error = (weight * (value - returns).square()).sum()
    entropy = (weight * categorical_entropy(logits)).sum()
    gain = (weight * advantage * categorical_log_prob(logits, action)).sum() + config.entropy_bonus * entropy
    return config.value_coefficient * error - gain, error, entropy


def slopes_of(
    logits: Tensor, action: Tensor, value: Tensor, advantage: Tensor, returns: Tensor, weight: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """∂ loss_of / ∂ logits (N, A) and ∂ loss_of / ∂ value (N,)."""
    by_logits = categorical_gradient(logits, action, advantage, config.entropy_bonus)
    return by_logits.mul_(-weight[:, None]), (value - returns).mul_(2 * config.value_coefficient * weight)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed) and "actions"."""
    return {"model": ActorCritic(spec.extra["size"], spec.extra["actions"], config.widths, config.shared)}


@method("rl/a2c", paper="arXiv:1602.01783", section="7.4.4.1, 7.4.4.3", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    env = environment(config.env, run.env)
    worlds = Worlds.make(env, config.worlds, run.seed, "training", run.rank, config.engine)
    spec = Spec(extra={"env": config.env, "size": worlds.size, "actions": worlds.actions})
    whole = config.worlds * config.segment
    afford_learning([worlds.size, *config.widths, worlds.actions], whole)
    run.describe(spec)
    model = run.place(build(config, spec)["model"])
    assert isinstance(model, ActorCritic)
    vector = flatten(model)
    collector = Collector(model, worlds, config.segment)
    optimizer = RMSProp([vector], lr=config.learning_rate, eps=1e-5)
    box = Box(recent=[])
    run.track(model=model, optimizer=optimizer, worlds=worlds, box=box)
    parameters = sum(p.numel() for p in model.parameters())
    run.say(f"{env.name}: {worlds.size} numbers observed, {worlds.actions} actions; {parameters:,} parameters")
    for name, note in (("restarted_worlds", worlds.note), ("environment", env.note)):
        if note:
            run.say(note)
            run.artifact(name, note)
    updates = -(-config.steps // whole)
    rate = schedules.schedule(config.schedule, config.learning_rate, updates)
    greedy, final = acting(model), (config.final_episodes, run.seed)

    for step in run.steps(updates):  # line 1
        rows = collector.play(run.generator("act", step))  # line 2
        advantage, returns = advantages(rows, config.gamma, config.gae_lambda)  # line 3
        weight = (rows.real / max(rows.real.sum(), 1)).astype(np.float32)  # one world that is only reset leaves nothing
        action, *numbers = (
            torch.from_numpy(x).to(run.device).flatten() for x in (rows.action, rows.value, advantage, returns, weight)
        )
        collector.backward(*slopes_of(rows.logits, action, *numbers, config))  # line 4
        logs = (step + 1) % config.log_every == 0 or step + 1 == updates
        seen = dict(zip(SEEN, loss_of(rows.logits, action, *numbers, config))) if logs else {}
        run.average(model, **seen)
        clip_norm_([vector], config.clip_norm)
        schedules.set_lr(optimizer, rate(step))
        optimizer.step()
        if logs:
            finished = worlds.drain()
            if finished:
                box.recent = (box.recent + finished)[-100:]
                run.log(training_return=float(np.mean(finished)))
            run.log(**seen, env_steps=float(worlds.steps))
        done, every = (step + 1) * whole, config.evaluate_every
        if step + 1 == updates or (every and done // every > step * whole // every):
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
