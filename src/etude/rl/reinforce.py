"""REINFORCE: ascend the expected return along the policy's own log-probabilities

Paper: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning, Machine
Learning 8, 1992; Sutton, McAllester, Singh & Mansour, Policy gradient methods, NIPS 1999. Reward-to-go: Baxter &
Bartlett, 2001. Baselines: Greensmith, Bartlett & Baxter, Variance reduction techniques, JMLR 5, 2004.

Equation: ∇J(θ) = E_τ [ Σ_t ∇log π_θ(a_t | s_t) (Q̂_t − b_t) ],    Q̂_t = Σ_{t' ≥ t} r_t' (reward-to-go) or Σ_t' r_t' (full)

Algorithm: (notes, Algorithm 10, with 7.3.4)
    1. while the budget of episodes lasts
    2.     play N episodes with π_θ
    3.     ĝ = 1/N Σ_i Σ_t ∇log π_θ(a_it | s_it) (Q̂_it − b_it)
    4.     θ ← θ + α Adam(ĝ)

Differences:
- E79 (notes 7.2, 7.3): log p(τ) = log p(s_1) + Σ_t [log π + log p]; the reward is r(s_t, a_t).
- E80 (7.3.4.1): reward-to-go is not "always better". With constant rewards −1 and +1 the full return has no variance
  at all and the reward-to-go has some (a test). On CartPole it is better; the report shows by how much.
- E81 (7.3.4.2): the notes' b, the mean of the batch, depends on the very episodes that it is subtracted from, and the
  proof for a constant b does not cover it: the expectation is (1 − 1/N) ∇J (`--baseline mean`; exact by enumeration).
  The default leaves episode i out of its own b and is unbiased. `optimal` is E[G S]/E[S²] for each parameter (S the sum of an
  episode's ∇log π, G its gradient without a baseline; E[S² r]/E[S²] for the full return), also from the other episodes.
- With the reward-to-go, b_t is the mean over the (other) episodes that are still alive at t; none: 0.
- E89: γ < 1 drops γ^(t−1) in front of ∇log π_t, as everybody does; that is not the gradient of the discounted return.
  `--exact-discount` puts it back. The default is γ = 1, as in the notes.
- There is no value function, so nothing stands for what a time limit cut off: J is the return within the limit.
- `--normalise` divides the weights Q̂ − b by their standard deviation in the batch (a step size that depends on the batch).
- Line 3 takes the gradient of every episode by itself, so its noise is known: gradient_noise is the standard error of ĝ over
  its length. variance_ratio is the variance of ĝ under the untrained policy over that of the plain estimator (full return,
  no baseline) from the same `probe_episodes`.
- The N episodes are one each of N fresh worlds, so that short episodes do not count more. Whatever the world, a resumed
  run is exact, for no episode crosses an update. Under torchrun every rank plays N episodes and gradients are averaged.
- The learning rate falls linearly to 0 and the last policy is kept: no choice among many, as rl/dqn has it.

Expect: CPU, 600 episodes in 8 s on an idle core → greedy and sampled return 500 on seeds 0-2. Algorithm 10 as it stands
(`--preset plain`) ends at 15, 189 and 438.

Command: `etude run rl/reinforce --env CartPole-v1 --baseline leave_one_out`
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, Policy, play, show
from etude.blocks.acting.memory import afford
from etude.blocks.acting.worlds import Worlds
from etude.blocks.pictures.plots import bars
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, NonNegative, Positive, Probability, Range, Whole
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim import schedules
from etude.optim.adam import Adam
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.films import films
from etude.rl.parts.policies import CategoricalPolicy
from etude.rl.parts.whole_episodes import Episodes, collect, episode_gradients, put_gradient, returns
from etude.rl.parts.whole_episodes import Policy as Stochastic

Credit = Literal["to_go", "full"]
Baseline = Literal["none", "mean", "leave_one_out", "optimal"]


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete actions: registered with Gymnasium (``module:Name-v0`` imports the module first),
    ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that makes one.
    """
    episodes: Count = 600
    """Episodes to learn from (on each rank), rounded up to whole batches."""
    batch: Copies = 8
    """Episodes in an update (N), one in each of as many worlds."""
    credit: Credit = "to_go"
    """What step t is credited with: the rewards from t on, or the full return of the episode."""
    baseline: Baseline = "leave_one_out"
    """What is subtracted from the weights: nothing, the batch's mean (biased), that of the other episodes, or for each
    parameter the value of least variance (from the other episodes)."""
    normalise: bool = False
    """Divide the weights by their standard deviation over the steps of the batch."""
    gamma: Probability = 1.0
    """Discount γ."""
    exact_discount: bool = False
    """Weigh step t by γ^(t−1) too, as the gradient of the discounted return asks (with reward-to-go)."""
    entropy_bonus: NonNegative = 0.0
    """Coefficient of the policy's entropy, summed over the steps of an episode, in the objective."""
    learning_rate: Positive = 0.02
    """Adam's α at the first update."""
    schedule: schedules.Schedule = "linear"
    """Learning rate over the run."""
    widths: tuple[Count, ...] = (64,)
    """Widths of the policy's hidden layers."""
    evaluate_every: Whole = 80
    """Episodes between greedy evaluations; 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes of each greedy evaluation along the way."""
    final_episodes: Copies = 100
    """Fresh episodes of the last evaluations, greedy and by the policy itself."""
    probe_episodes: Annotated[int, Range(0, 10_000)] = 256
    """Episodes of the untrained policy on which the variances of the estimators are compared; 0: no comparison."""


PRESETS = {
    "tiny": Config(episodes=48, widths=(16,), evaluate_every=24, evaluation_episodes=4, final_episodes=5, probe_episodes=32),
    "default": Config(),
    "plain": Config(credit="full", baseline="none"),  # Algorithm 10 as it stands, which "never works" (7.3.4)
}  # fmt: skip

SETTINGS = {
    "env": "Acrobot-v1",
    "exact_discount": {"gamma": 0.9, "exact_discount": True},
    "schedule": "constant",
    "probe_episodes": 16,
    "widths": (12,),
}

PROBE = {"episodes": 8, "probe_episodes": 1024, "final_episodes": 1}  # one update: only the probe counts

METRICS = {
    "variance_ratio": "variance of the gradient's estimate over that of the full return without a baseline",
}

EXPERIMENTS = (
    Experiment(
        "cartpole", preset="default", metric="sampled_return", bar=475.0,
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        notes="J itself: the last policy, sampling its actions, on 100 fresh episodes",
        controls=(
            Control("Algorithm 10 as it stands: full return, no baseline", {"credit": "full", "baseline": "none"}),
            Control("one update", {"episodes": 8}),
            Control("rewards before the step in place of those after it", swap={"returns": "etude.rl.parts.nulls.past_returns"}),
        ),
    ),
    Experiment(
        "causality", preset="default", metric="variance_ratio", bar=0.26, better="lower", flags=PROBE,
        notes="variance of the gradient of one batch of 8 episodes of the untrained policy, over that of Algorithm 10",
        controls=(
            Control("the full return", {"credit": "full"}),
            Control("the full return, no baseline", {"credit": "full", "baseline": "none"}),
        ),
    ),
    Experiment(
        "baseline", preset="plain", metric="variance_ratio", bar=0.45, better="lower",
        flags={**PROBE, "baseline": "leave_one_out"},
        notes="the same with the full return: what the mean of the other seven episodes takes away",
        controls=(Control("no baseline", {"baseline": "none"}),),
    ),
)  # fmt: skip

# N episodes (behind any leading dimensions *), T steps of the longest, D numbers observed, A actions, P parameters


def baseline(value: Tensor, counts: Tensor, kind: Baseline) -> Tensor:
    """b (*, N, T) for weights `value` (*, N, T) of the steps that count (bool): 0, or at each t a mean over episodes.

    `mean` is over all N that count, `leave_one_out` over the others (0 where there is none). `optimal` is not of this
    form (see `estimate`) and gives 0.
    """
    if kind in ("none", "optimal"):
        return torch.zeros_like(value)
    total, number = (value * counts).sum(-2, keepdim=True), counts.sum(-2, keepdim=True)
    if kind == "mean":
        return (total / number.clamp(min=1)).expand_as(value)
    return torch.where(number > 1, (total - value) / (number - 1).clamp(min=1), 0.0)


def step_weights(
    reward: Tensor,
    alive: Tensor,
    credit: Credit = "to_go",
    baseline_kind: Baseline = "leave_one_out",
    gamma: float = 1.0,
    exact_discount: bool = False,
) -> Tensor:
    """Q̂_t − b_t (*, N, T), 0 behind the end of an episode, from rewards (*, N, T) and `alive` (*, N, T)."""
    to_go = credit == "to_go"
    value = returns(reward, gamma, to_go)
    counts = alive if to_go else torch.ones_like(alive)
    weight = (value - baseline(value, counts, baseline_kind)) * alive
    if exact_discount and to_go:
        weight = weight * gamma ** torch.arange(weight.shape[-1]).to(weight)
    return weight


def optimal_baseline(gradient: Tensor, score: Tensor) -> Tensor:
    """b (*, N, P) = Σ_{j≠i} G_j S_j / Σ_{j≠i} S_j² of G, S (*, N, P): the variance of G − b S is least, parameter by parameter.

    S are the sums of ∇log π (mean zero), G the gradients without a baseline; of the full return, G = S r.
    """
    product, square = gradient * score, score * score
    above = product.sum(-2, keepdim=True) - product
    below = square.sum(-2, keepdim=True) - square
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(below.dtype).tiny), 0.0)


def estimate(policy: Stochastic, episodes: Episodes, config: Config) -> Tensor:
    """Line 3: what each episode adds to ĝ (*, N, P); their mean is ĝ. Nothing is recorded by autograd."""
    weight = step_weights(
        episodes.reward, episodes.alive, config.credit, config.baseline, config.gamma, config.exact_discount
    )
    if config.normalise:
        weight = weight / (weight[episodes.alive].std(unbiased=False) + 1e-8)
    bonus = config.entropy_bonus * episodes.alive
    terms = episode_gradients(policy, episodes.state, episodes.action, weight, bonus)
    if config.baseline == "optimal":
        score = episode_gradients(policy, episodes.state, episodes.action, episodes.alive.to(weight.dtype))
        terms = terms - optimal_baseline(terms, score) * score
    return terms


def noise(terms: Tensor) -> Tensor:
    """Standard error of the mean of the terms (N, P) over the length of that mean: 0-dim; 0 for one term."""
    mean = terms.mean(0)
    spread = ((terms - mean) ** 2).sum() / max(len(terms) - 1, 1) / len(terms)
    return spread.sqrt() / mean.norm().clamp(min=torch.finfo(mean.dtype).tiny)


def variances(policy: Stochastic, episodes: Episodes, config: Config) -> dict[str, float]:
    """Variance of ĝ (summed over parameters) of every estimator over the batches of N in the given episodes."""
    count = len(episodes.reward) // config.batch
    batches = Episodes(*(x[: count * config.batch].unflatten(0, (count, config.batch)) for x in episodes))
    found = {}
    for credit in ("full", "to_go"):
        for kind in ("none", "mean", "leave_one_out", "optimal"):
            plain = Config(credit=credit, baseline=kind, gamma=config.gamma, exact_discount=config.exact_discount)
            means = estimate(policy, batches, plain).double().mean(-2)  # (count, P)
            found[f"{credit}, {kind}"] = float(means.var(0).sum())
    return found


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (D) and "actions" (A)."""
    return {"model": CategoricalPolicy(spec.extra["size"], spec.extra["actions"], config.widths)}


@method("rl/reinforce", paper="Williams 1992", section="7.2, 7.3, 7.3.4.1, 7.3.4.2", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    env = environment(config.env, run.env)
    world = Worlds.make(env)
    size, actions = world.size, world.actions
    layers = (size, *config.widths, actions)
    many = max(config.batch, config.probe_episodes)
    needed = many * (2 * env.limit() * sum(layers) + 4 * sum((a + 1) * b for a, b in pairwise(layers)))
    afford(f"the gradients of {many:,} episodes (--batch, --probe-episodes)", 4.0 * needed)
    run.describe(Spec(extra={"env": config.env, "size": size, "actions": actions}))
    model = run.place(build(config, Spec(extra={"size": size, "actions": actions}))["model"])
    optimizer = Adam(model.parameters(), lr=config.learning_rate)
    box = Box(env_steps=0, recent=[], variances={})
    run.track(model=model, optimizer=optimizer, box=box)
    parameters = sum(p.numel() for p in model.parameters())
    run.say(f"{env.name}: {size} numbers observed, {actions} actions; {parameters:,} parameters")
    if env.note:
        run.say(env.note)
        run.artifact("environment", env.note)
    updates = -(-config.episodes // config.batch)
    rate = schedules.schedule(config.schedule, config.learning_rate, updates)
    greedy, final = acting(model), (config.final_episodes, run.seed)

    for step in run.steps(updates):  # line 1
        if step == 0 and config.probe_episodes >= 2 * config.batch:
            dice = run.generator("probe")
            probe = collect(env, model, config.probe_episodes, fold(run.seed, 0, 0, "probe"), dice, run.rank)
            box.variances = variances(model, probe, config)
        episodes = collect(
            env, model, config.batch, fold(run.seed, step), run.generator("act", step), run.rank
        )  # line 2
        terms = estimate(model, episodes, config)  # line 3
        put_gradient(model, -terms.mean(0))
        run.average(model)
        schedules.set_lr(optimizer, rate(step))
        optimizer.step()  # line 4
        box.env_steps += episodes.steps
        box.recent = (box.recent + episodes.returns.tolist())[-100:]
        run.log(
            training_return=episodes.returns.mean(), gradient_noise=noise(terms), env_steps=float(box.env_steps),
            episodes=float((step + 1) * config.batch),
        )  # fmt: skip
        done, every = (step + 1) * config.batch, config.evaluate_every
        if step + 1 == updates or (every and done // every > step * config.batch // every):
            score = play(env, greedy, config.evaluation_episodes, fold(run.seed, step))
            run.log(greedy_return=float(score.mean()))

    scores = play(env, greedy, *final, "final evaluation")
    sampled = play(env, acting(model, generator(run.seed, 0, 0, "final act")), *final, "final sampling")
    show(run, env, greedy)
    metrics = {
        "sampled_return": float(sampled.mean()),
        "greedy_return": float(scores.mean()),
        "greedy_return_low": float(scores.min()),
        "training_return": float(np.mean(box.recent)),
        "env_steps": float(box.env_steps),
    }
    if box.variances:
        plain, ours = box.variances["full, none"], box.variances[f"{config.credit}, {config.baseline}"]
        metrics["variance_ratio"] = ours / plain if plain else 1.0
        run.artifact("variances", _chart(box.variances), caption=CAPTION)
    return metrics


CAPTION = (
    "Variance of the gradient of one batch of N episodes under the untrained policy, over that of the full return with no "
    "baseline. The batch mean's is small because it shrinks the gradient too: by 1 − 1/N (E81)."
)


def acting(policy: CategoricalPolicy | ActorCritic, dice: torch.Generator | None = None) -> Policy:
    """The policy as a function of states: sampling by the generator, or its most probable action without one."""
    device = next(policy.parameters()).device

    def act(state: NDArray[np.float32]) -> NDArray[np.int64]:
        seen = torch.from_numpy(state).to(device)
        chosen = policy.act(seen, policy.noise(dice, len(state))) if dice else policy.best(seen)
        return chosen.cpu().numpy()

    return act


def _chart(found: dict[str, float]) -> Any:
    plain = found["full, none"] or 1.0
    words = {"full": "full return", "to_go": "reward-to-go", "none": "no baseline", "mean": "batch mean"}
    words |= {"leave_one_out": "others' mean", "optimal": "optimal"}
    names = [", ".join(words[word] for word in name.split(", ")) for name in found]
    return bars(names, [value / plain for value in found.values()])


@dataclass(frozen=True)
class Sample:
    count: Count = 3
    """Episodes to play."""
    seed: Whole = 0
    """Seed of the worlds and of the draws."""
    greedy: bool = True
    """Take the most probable action; off: sample actions from the policy."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play, write each episode as a GIF where the environment can be drawn, and return the scores."""
    dice = None if options.greedy else generator(options.seed, 0, 0, "sample")
    return films(environment(loaded.config.env), acting(loaded.model, dice), options.count, options.seed, folder)
