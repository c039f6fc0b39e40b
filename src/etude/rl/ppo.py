"""Proximal policy optimisation: several passes, near the policy that acted

Paper: Schulman et al., Proximal Policy Optimization Algorithms, 2017, arXiv:1707.06347. Advantages: Schulman et al.,
High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2015, arXiv:1506.02438.

Equation: ρ_t = π_θ(a_t | s_t)/π_old(a_t | s_t),  L^{CLIP}(θ) = mean of min(ρ_t Â_t, clip(ρ_t, 1 − ε, 1 + ε) Â_t)
    Â_t = Σ_k (γλ)^k δ_{t+k},  δ_t = r_t + γ (1 − terminated) V(s_{t+1}) − V(s_t)
    minimised: −L^{CLIP} + c_V ½ mean (V_θ(s_t) − R̂_t)² − c_H mean H(π_θ(· | s_t)),  R̂_t = Â_t + V_old(s_t)

Algorithm: (the paper's algorithm 1)
    1. while the budget of environment steps lasts
    2.     act with π_θ in n worlds for T steps
    3.     Â and R̂ by V_θ, log π_old of what was done: constants from here on
    4.     for each of K passes, for each minibatch of the n T steps
    5.         step on the loss by Adam, the gradient no longer than clip_norm

Differences:
- The notes end before PPO (their 7.3.5.3 has its first-order weights, without the clip); it is what one asks for next.
- E93 (7.6): V(s_{t+1}) is 0 behind a termination, but not behind a time limit, where it is V of the state that was reached.
- Advantages are standardised in each minibatch, as in the authors' code (`--no-normalise`); the paper says nothing. A
  minibatch of one step is left as it is.
- The value's error is not clipped; the authors' code does, the paper does not.
- `--target-kl` ends the passes over a segment where the policy has moved further; the paper has a penalty for that instead.
- Continuous actions have a Gaussian with one log σ for each number, the same in every state (the paper's section 6.1). The worlds
  clip an action at its bounds; ρ and log π are those of the action that was drawn.
- Images go through the convolutions of Mnih et al. (2015), whose gradient is written out too; the authors' code does the
  same. Observations are not standardised along the way, which its MuJoCo settings do.
- Rows on which a world only resets are no transitions and are in no mean.
- `--update compiled` acts and learns in machine code (`parts/kernels.py`), all minibatches of a segment in one call, on torch's
  random numbers and equal but for rounding. It takes discrete actions, states that are numbers, one rank and the CPU.
- Under torchrun every rank acts in its own n worlds; gradients are means over the ranks, Â is standardised on each.

Expect: one core, 25 s: CartPole after 100,000 steps, seeds 0-2: J = 500, 500, 500 (`--preset compiled`, 5 s: the same); 20 s:
MuJoCo's InvertedPendulum after 60,000 steps: 1000, 1000, 1000 (`--preset cart`); 25 s: Pendulum after 200,000 steps: −183, −169,
−186 (`--preset pendulum`).

Command: `etude run rl/ppo --env CartPole-v1 --seed 1`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford_learning
from etude.blocks.acting.worlds import Engine, Worlds
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, NonNegative, Positive, Probability, Range, Whole
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim import schedules
from etude.optim.adam import Adam
from etude.optim.clipping import clip_norm_
from etude.optim.flat import flatten
from etude.rl.parts.actor_critic import ActorCritic, GaussianActorCritic
from etude.rl.parts.films import films
from etude.rl.parts.fused import Fused, refuse
from etude.rl.parts.kernels import Rule
from etude.rl.parts.rollouts import advantages, collect
from etude.rl.reinforce import Sample, acting


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete or continuous actions: registered with Gymnasium (``module:Name-v0`` imports the
    module first), an Atari game with its settings (``atari:Pong,repeat=4``), ``file.py:Name`` of your own (the file is
    run), or in Python an environment, its class or a function that makes one.
    """
    steps: Count = 100_000
    """Environment steps in all (on each rank), rounded up to whole segments."""
    worlds: Copies = 8
    """Copies of the environment that act together (n)."""
    engine: Engine = "gymnasium"
    """Gymnasium's worlds, or the classic ones compiled: the same transitions, many times as fast."""
    update: Literal["torch", "compiled"] = "torch"
    """Who computes actions and updates: torch, or machine code on one thread of the CPU, several times as fast (discrete
    actions, states that are numbers, one rank; equal but for rounding; some ten seconds to compile, the first time ever).
    """
    segment: Few = 32
    """Steps of each world between updates (T)."""
    passes: Few = 20
    """Passes over each segment (K)."""
    batch: Count = 256
    """Steps in a minibatch, of each rank."""
    gamma: Probability = 0.98
    """Discount γ."""
    gae_lambda: Probability = 0.8
    """λ of the advantages: 0 is the one-step error, 1 the return of the segment."""
    clip_ratio: Positive = 0.2
    """ε: how far the ratio may go before its gradient ends, in the first segment."""
    value_coefficient: NonNegative = 0.5
    """c_V, of the value's squared error (halved)."""
    entropy_bonus: NonNegative = 0.0
    """c_H, of the policy's entropy."""
    normalise: bool = True
    """Standardise the advantages in each minibatch."""
    target_kl: Annotated[float, Range(0)] = 0.0
    """End the passes over a segment where the mean of ρ − 1 − log ρ in a minibatch is larger; 0: never."""
    clip_norm: Positive = 0.5
    """The gradient is scaled down to this norm."""
    learning_rate: Positive = 1e-3
    """Adam's α in the first segment."""
    schedule: schedules.Schedule = "linear"
    """Learning rate, and ε with it, over the run."""
    widths: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers, of images those behind the convolutions."""
    shared: bool = False
    """One trunk with two heads; off: two networks."""
    log_std: Annotated[float, Range(-20, 5)] = 0.0
    """log σ of continuous actions, in their own units, to begin with."""
    evaluate_every: Whole = 10_240
    """Environment steps between greedy evaluations (at the end of a segment); 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes of each greedy evaluation along the way."""
    final_episodes: Copies = 100
    """Fresh episodes of the last evaluations, greedy and by the policy itself."""


PRESETS = {
    "tiny": Config(
        steps=1024, worlds=4, segment=16, passes=4, batch=24, widths=(16,), evaluate_every=512, evaluation_episodes=4,
        final_episodes=5,
    ),
    "default": Config(),
    "compiled": Config(engine="compiled", update="compiled"),  # the same in 5 s
    "acrobot": Config(env="Acrobot-v1", steps=200_000, worlds=16, segment=64, passes=4, gamma=0.99, gae_lambda=0.94),
    "pendulum": Config(
        env="Pendulum-v1", engine="compiled", steps=200_000, worlds=16, segment=128, passes=10, batch=128, gamma=0.95,
        gae_lambda=0.95,
    ),
    "cart": Config(
        env="InvertedPendulum-v5", steps=60_000, segment=64, passes=10, batch=64, gamma=0.99, gae_lambda=0.95,
        final_episodes=20, evaluation_episodes=5,
    ),
    "mujoco": Config(  # the paper's table 3; 1 M steps
        env="HalfCheetah-v5", steps=1_000_000, worlds=1, segment=2048, passes=10, batch=64, gamma=0.99, gae_lambda=0.95,
        learning_rate=3e-4, evaluate_every=102_400, evaluation_episodes=5, final_episodes=20,
    ),
    "pong": Config(  # the paper's table 5; 40 M frames, for large hardware
        env="atari:Pong", steps=10_000_000, segment=128, passes=3, gamma=0.99, gae_lambda=0.95, clip_ratio=0.1,
        entropy_bonus=0.01, learning_rate=2.5e-4, widths=(512,), shared=True, evaluate_every=1_000_000,
        evaluation_episodes=3, final_episodes=10,
    ),
}  # fmt: skip

SETTINGS = {
    "update": Idle("the same numbers but for rounding, which tests compare"),
    "log_std": {"env": "Pendulum-v1", "log_std": -1.0},
    "env": "Acrobot-v1",
    "schedule": "constant",
    "widths": (12,),
    "target_kl": 1e-4,
    "clip_ratio": 1e-3,
    "shared": True,
}

METRICS = {
    "explained_variance": "share of the variance of the returns that V explained in the last segment; 1 is best",
    "clip_fraction": "share of the ratios beyond 1 ± ε, mean over the updates of the last segment",
    "kl": "mean of ρ − 1 − log ρ in the last minibatch, which estimates KL(π_old ‖ π_θ) (nats)",
}

EXPERIMENTS = (
    Experiment(
        "cartpole", preset="default", metric="sampled_return", bar=475.0,
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        notes="J itself: the last policy, sampling its actions, on 100 fresh episodes",
        controls=(
            Control("one segment", {"steps": 256}),
            Control("advantages whose signs are drawn", swap={"advantages": "etude.rl.parts.nulls.drawn_advantages"}),
        ),
    ),
    Experiment(
        "compiled", preset="compiled", metric="sampled_return", bar=475.0,
        notes="worlds and updates in machine code",
        controls=(Control("one segment", {"steps": 256}),),
    ),
    Experiment(
        "pendulum", preset="pendulum", metric="sampled_return", bar=-210.0,
        notes="continuous actions in compiled worlds; an untrained policy has about −1,200",
        controls=(Control("one segment", {"steps": 2048}),),
    ),
    Experiment(
        "mujoco", preset="cart", metric="sampled_return", bar=950.0,
        published="solved means 950 (Gymnasium's reward_threshold of InvertedPendulum-v5)",
        notes="a MuJoCo task of which 1,000 is the most; needs the extra mujoco",
        controls=(Control("one segment", {"steps": 512}),),
    ),
)  # fmt: skip

# n worlds, T steps, M steps of a minibatch


def clipped(ratio: Tensor, clip: float) -> Tensor:
    """ρ (M,), kept between 1 − ε and 1 + ε."""
    return ratio.clamp(1 - clip, 1 + clip)


def clipped_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â) of each step (M,): no gradient where ρ is beyond the clip to the better side."""
    return torch.minimum(ratio * advantage, clipped(ratio, clip) * advantage)


def clipped_slope(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """∂ clipped_objective / ∂ log π (M,): ρ Â, and 0 where ρ is beyond the clip to the better side."""
    plain = ratio * advantage
    return plain * (plain <= clipped(ratio, clip) * advantage)


def standardised(advantage: Tensor) -> Tensor:
    """(Â − mean)/(deviation + 1e-8) (M,); one step alone stays as it is."""
    if len(advantage) < 2:
        return advantage
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def minibatches(order: Tensor, batch: int, count: int = 0) -> tuple[Tensor, ...]:
    """Rows (M,) in parts of `batch`, the last one smaller; where that is not `count` parts, in `count` of nearly one size.

    Ranks must take equally many, and resets leave some of them fewer rows; fewer than `count` are taken more than once.
    """
    found = order.split(batch)
    if not count or len(found) == count:
        return found
    return order.repeat(max(1, -(-count // len(order)))).tensor_split(count)


def explained_variance(value: Tensor, returns: Tensor) -> Tensor:
    """1 − Var(R − V)/Var(R), 0-dim; 0 where the returns do not vary."""
    spread = returns.var(unbiased=False)
    return torch.where(spread > 0, 1 - (returns - value).var(unbiased=False) / spread, 0.0)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed) or "shape" (of images), "actions", and "discrete"."""
    extra = spec.extra
    size = tuple(extra["shape"]) if "shape" in extra else extra["size"]
    if extra.get("discrete", True):
        return {"model": ActorCritic(size, extra["actions"], config.widths, config.shared)}
    return {"model": GaussianActorCritic(size, extra["actions"], config.widths, config.shared, config.log_std)}


@method("rl/ppo", paper="arXiv:1707.06347", section="7.3.5.3, 7.4.4.3, 7.4.4.4", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    env = environment(config.env, run.env)
    worlds = Worlds.make(env, config.worlds, run.seed, "training", run.rank, config.engine, box=None, images=True)
    extra = {"env": config.env, "size": worlds.size, "actions": worlds.actions, "discrete": not worlds.box}
    images = len(worlds.shape) == 3
    if config.shared and not config.widths and not images:
        raise UserError("--shared needs a hidden layer to share, and --widths names none")
    spec = Spec(extra=extra | ({"shape": list(worlds.shape)} if images else {}))
    whole = config.worlds * config.segment
    if whole < 2:  # of which a reset may be one
        raise UserError("--worlds times --segment is 1, and PPO learns from two steps or more at a time")
    if config.update == "compiled":
        refuse(run, worlds)
    afford_learning([worlds.size, *config.widths, worlds.actions], whole)
    run.describe(spec)
    model = run.place(build(config, spec)["model"])
    assert isinstance(model, ActorCritic)
    vector = flatten(model)
    optimizer = Adam([vector], lr=config.learning_rate, eps=1e-5)
    fused = None
    if config.update == "compiled":
        rule = Rule(
            min(config.batch, whole), config.clip_ratio, config.value_coefficient, config.entropy_bonus, config.normalise,
            config.target_kl, config.clip_norm,
        )  # fmt: skip
        fused = Fused(model, vector, optimizer, rule, config.worlds)
    actor, estimate = (fused, fused.advantages) if fused else (model, advantages)
    box = Box(recent=[], seen={})
    run.track(model=model, optimizer=optimizer, worlds=worlds, box=box)
    parameters = sum(p.numel() for p in model.parameters())
    seen_as = " × ".join(map(str, worlds.shape)) + " bytes" if images else f"{worlds.size} numbers"
    acts = f"{worlds.actions} numbers in an action" if worlds.box else f"{worlds.actions} actions"
    run.say(f"{env.name}: {seen_as} observed, {acts}; {parameters:,} parameters")
    for name, note in (("restarted_worlds", worlds.note), ("environment", env.note), ("game", env.about)):
        if note:
            run.say(note)
            run.artifact(name, note)
    segments, parts = -(-config.steps // whole), -(-whole // config.batch) if run.world > 1 else 0
    rate = schedules.schedule(config.schedule, config.learning_rate, segments)
    greedy, final = acting(model), (config.final_episodes, run.seed)
    seen: dict[str, Tensor] = {}

    for step in run.steps(segments):  # line 1
        alpha = rate(step)
        schedules.set_lr(optimizer, alpha)
        clip = config.clip_ratio * alpha / config.learning_rate
        dice = run.generator("act", step)
        rows = collect(
            worlds, lambda s, d=dice: actor.act(s, model.noise(d, len(s))), config.segment, run.device
        )  # line 2
        advantage, returns = estimate(rows, actor.value, config.gamma, config.gae_lambda)  # line 3
        state, action = rows.state[:-1][rows.real], rows.action[rows.real]  # (M', …), the transitions of all worlds
        advantage, returns = advantage[rows.real], returns[rows.real]
        with torch.no_grad():
            old, _, value = actor.judge(state, action)
        seen = {"explained_variance": explained_variance(value, returns)}
        order = run.generator("order", step)
        orders = (torch.randperm(len(action), generator=order) for _ in range(config.passes))
        if fused:  # lines 4 and 5, for the whole segment
            losses, found = fused.learn(clip, orders, state, action, old, advantage, returns)
            run.average(model, loss=losses[-1])
            seen |= found
        else:
            losses, beyond = [], []
            for drawn in orders:  # line 4
                for index in minibatches(drawn.to(run.device), config.batch, parts):
                    chosen, count = action[index], len(index)
                    said, value, kept = model.follow(state[index])
                    log_ratio = model.log_prob(said, chosen) - old[index]
                    ratio, entropy, over = log_ratio.exp(), model.entropy(said), value - returns[index]
                    wanted = standardised(advantage[index]) if config.normalise else advantage[index]
                    objective, error = clipped_objective(ratio, wanted, clip).mean(), 0.5 * over.square().mean()
                    loss = config.value_coefficient * error - objective - config.entropy_bonus * entropy.mean()
                    slope = clipped_slope(ratio, wanted, clip)
                    by_said = model.slopes(said, chosen, slope / -count, config.entropy_bonus / -count)
                    model.backward(kept, by_said, config.value_coefficient / count * over)  # line 5
                    run.average(model, loss=loss)
                    clip_norm_([vector], config.clip_norm)
                    optimizer.step()
                    beyond.append((ratio - 1).abs() > clip)
                    losses.append(loss)
                    seen |= {"kl": (ratio - 1 - log_ratio).mean(), "entropy": entropy.mean(), "value_loss": error}
                if config.target_kl:
                    run.average(kl=seen["kl"])  # all ranks go on or none
                    if float(seen["kl"]) > config.target_kl:
                        break
            seen["clip_fraction"] = torch.cat(beyond).double().mean()
        loss = torch.stack(losses).mean()
        if not loss.isfinite():
            raise RunError(f"the loss is not finite after {worlds.steps:,} environment steps; lower --learning-rate")
        finished = worlds.drain()
        if finished:
            box.recent = (box.recent + finished)[-100:]
            run.log(training_return=float(np.mean(finished)))
        run.log(loss=loss, env_steps=float(worlds.steps), **seen)
        done, every = (step + 1) * whole, config.evaluate_every
        if step + 1 == segments or (every and done // every > step * whole // every):
            score = play(env, greedy, config.evaluation_episodes, fold(run.seed, step))
            run.log(greedy_return=float(score.mean()))
        box.seen = {name: float(value) for name, value in seen.items()}

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
        **{name: box.seen[name] for name in ("explained_variance", "clip_fraction", "kl")},
    }


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play, write each episode as a GIF where the environment can be drawn, and return the scores."""
    dice = None if options.greedy else generator(options.seed, 0, 0, "sample")
    return films(environment(loaded.config.env), acting(loaded.model, dice), options.count, options.seed, folder)
