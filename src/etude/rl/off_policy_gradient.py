"""Off-policy policy gradient: several updates a batch, by importance weights

Paper: Precup, Sutton & Singh, Eligibility traces for off-policy policy evaluation, ICML 2000; Jie & Abbeel, On a
connection between importance sampling and the likelihood ratio policy gradient, NIPS 2010. First order: Schulman et al.,
Trust region policy optimization, 2015, arXiv:1502.05477. Importance sampling: Kahn & Marshall, 1953.

Equation: E_p[f] = E_q[(p/q) f]. With ρ_t = π_θ'(a_t | s_t)/π_θ(a_t | s_t) and τ drawn by π_θ,
    ∇J(θ') = E [ Σ_t ∇log π_θ'(a_t | s_t) Π_{t' ≤ t} ρ_t' Σ_{t' ≥ t} r_t' Π_{t < t'' ≤ t'} ρ_t'' ]    (per decision)
           ≈ E [ Σ_t ∇log π_θ'(a_t | s_t) ρ_t Q̂_t ]                                                   (first order)

Algorithm: (notes, 7.3.5)
    1. while the budget of episodes lasts
    2.     play N episodes with π_θ, keep log π_θ(a_t | s_t); θ' = θ
    3.     K times: w_t from the ratios by --correction;  θ' ← θ' + α Adam(1/N Σ_i Σ_t w_it ∇log π_θ'(a_it | s_it))
    4.     θ = θ'

Differences:
- E82 (notes 7.3.5.2): the notes' second product begins at t'' = t, which counts ρ_t twice; it must begin at t + 1. So
  the two products are one, and w_t = Σ_{t' ≥ t} r_t' Π_{u ≤ t'} ρ_u. `--correction notes` is the form as printed: wrong
  unless θ' = θ (a test).
- E83: without the future ratios (`future_dropped`) it is not ∇J any more except at θ' = θ, and its left side should be a
  gradient. It is Σ_t E_{s_t ~ θ'}[Σ_a ∇π_θ'(a | s_t) Q_θ(s_t, a)]: the way to improve on the old policy's Q (a test).
- E84 (7.3.5.3): what is approximated is a ratio of marginals p_θ'(s_t, a_t). With the states' part left out it is
  Σ_t E_{s_t ~ θ}[Σ_a ∇π_θ'(a | s_t) Q_θ(s_t, a)] (a test): exact at θ' = θ, its error grows with θ' − θ.
- `trajectory` is the notes' line "by causality", Π_{u ≤ T} ρ_u Q̂_t, exact too. `none` repeats the on-policy gradient.
- Ratios are summed as logarithms in float64, and log π_θ is that of the actions taken, kept before the first update.
- The baseline b_it is the weighted mean of the other episodes that are alive at t: Σ_{j≠i} w_jt / Σ_{j≠i} m_jt, with m the
  ratios that multiply ∇log π_t; what is used is w − m b. It changes no expectation (a test), unlike that of E81.
- `--self-normalised` divides m_t by its mean in the batch: a little biased, less noise.
- γ < 1 drops γ^(t−1) as everybody does (E89, see rl/reinforce). There is no value function, so J is the return within the
  time limit. Episodes are one each of N fresh worlds, and a resumed run is exact in any world, as in rl/reinforce.
- effective_share is the effective sample size (Σw)²/Σw² of the whole episodes' weights, over N, at the last of the K
  updates; the report draws it over t, where it falls exponentially ("degenerate", says 7.3.5.3).
- steps_to_target counts the environment steps until the mean of the last 20 training episodes first reached
  `target_return`; the most that the budget could take where it never did.

Expect: one core, 15 s on CartPole, seeds 0-2: J = 500, 500, 499.7 after 320 episodes; a training return of 450 after 25,053,
    23,397 and 57,562 environment steps (on-policy: 81,158 and 94,530 on seeds 0 and 1). Ten updates a batch: seed 1 ends at 50.

Command: `etude run rl/off_policy_gradient --correction per_decision --updates 3`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford
from etude.blocks.acting.worlds import Worlds
from etude.blocks.pictures.plots import curves
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, Positive, Probability, Range, Whole
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim import schedules
from etude.optim.adam import Adam
from etude.rl.parts.films import films
from etude.rl.parts.policies import CategoricalPolicy
from etude.rl.parts.whole_episodes import collect, returns
from etude.rl.reinforce import Sample, acting

Correction = Literal["first_order", "per_decision", "trajectory", "future_dropped", "notes", "none"]
LATELY = 20
"""Training episodes over which `target_return` must be reached."""


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete actions: registered with Gymnasium (``module:Name-v0`` imports the module first),
    ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that makes one.
    """
    episodes: Count = 320
    """Episodes to learn from (on each rank), rounded up to whole batches."""
    batch: Annotated[int, Range(1, 1000)] = 8
    """Episodes played between updates (N), one in each of as many worlds."""
    updates: Few = 4
    """Updates from each batch (K); 1 is on-policy."""
    correction: Correction = "first_order"
    """What makes up for the actions being the old policy's."""
    baseline: bool = True
    """Subtract the weighted mean of the other episodes."""
    self_normalised: bool = False
    """Divide the ratios at each t by their mean in the batch."""
    gamma: Probability = 1.0
    """Discount γ."""
    learning_rate: Positive = 0.01
    """Adam's α in the first round."""
    schedule: schedules.Schedule = "linear"
    """Learning rate over the run."""
    widths: tuple[Count, ...] = (64,)
    """Widths of the policy's hidden layers."""
    target_return: float = 450.0
    """Training return whose first reaching is timed (steps_to_target)."""
    evaluate_every: Whole = 80
    """Episodes between greedy evaluations; 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes of each greedy evaluation along the way."""
    final_episodes: Copies = 100
    """Fresh episodes of the last evaluations, greedy and by the policy itself."""


PRESETS = {
    "tiny": Config(
        episodes=48, updates=4, widths=(16,), target_return=20.0, evaluate_every=24, evaluation_episodes=4, final_episodes=5
    ),
    "default": Config(),
    "per_decision": Config(episodes=600, updates=3, correction="per_decision"),
}  # fmt: skip

SETTINGS = {
    "env": "Acrobot-v1",
    "schedule": "constant",
    "widths": (12,),
    "target_return": 1000.0,
}

METRICS = {
    "steps_to_target": "environment steps until the mean of 20 training returns reached --target-return; else the most possible",
    "effective_share": "effective sample size of whole episodes' weights over their number, at the last update of a batch",
}

EXPERIMENTS = (
    Experiment(
        "cartpole", preset="default", metric="sampled_return", bar=475.0,
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        notes="J itself: the last policy, sampling its actions, on 100 fresh episodes",
        controls=(
            Control("ten updates without weights", {"correction": "none", "updates": 10}),
            Control("one round", {"episodes": 8}),
        ),
    ),
    Experiment(
        "reuse", preset="default", metric="steps_to_target", bar=62_000.0, better="lower",
        notes="environment steps until the training return is 450",
        controls=(
            Control("on-policy: one update a batch, as many episodes as it needs", {"updates": 1, "episodes": 600}),
            Control("ten updates without weights", {"correction": "none", "updates": 10}),
        ),
    ),
    Experiment(
        "exact", preset="per_decision", metric="sampled_return", bar=475.0,
        notes="the unbiased weights are good for three updates a batch",
        controls=(Control("one round", {"episodes": 8}),),
    ),
)  # fmt: skip

# N episodes (behind any leading dimensions *), T steps of the longest


def effective_sample_size(log_weight: Tensor, dim: int = -1) -> Tensor:
    """(Σ w)²/Σ w² along `dim`, from log w: between 1 and the number of weights, and free of under- and overflow."""
    return (2 * log_weight.logsumexp(dim) - (2 * log_weight).logsumexp(dim)).exp()


def importance_mean(value: Tensor, log_weight: Tensor, self_normalised: bool = False) -> Tensor:
    """E_p[f] from draws of q (*, N): mean of (p/q) f, or Σ (p/q) f / Σ (p/q), which asks for p/q up to a factor only."""
    if self_normalised:
        return (log_weight.softmax(-1) * value).sum(-1)
    return (log_weight.exp() * value).mean(-1)


def log_multiplier(log_ratio: Tensor, alive: Tensor, correction: Correction, self_normalised: bool = False) -> Tensor:
    """log m_t (*, N, T), m the ratios in front of ∇log π_t, from log ρ_t (0 behind the end) of steps `alive`; else −∞."""
    up_to = log_ratio.cumsum(-1)
    if correction == "none":
        log_m = torch.zeros_like(log_ratio)
    elif correction == "first_order":
        log_m = log_ratio
    elif correction == "trajectory":
        log_m = up_to[..., -1:].expand_as(up_to)
    else:  # ρ_1 … ρ_t
        log_m = up_to
    log_m = log_m.masked_fill(~alive, -math.inf)
    if self_normalised:
        mean = log_m.logsumexp(-2, keepdim=True) - alive.sum(-2, keepdim=True).to(log_m.dtype).log()
        log_m = torch.where(alive, log_m - mean, -math.inf)
    return log_m


def step_weights(
    log_ratio: Tensor,
    reward: Tensor,
    alive: Tensor,
    correction: Correction = "first_order",
    baseline: bool = True,
    self_normalised: bool = False,
    gamma: float = 1.0,
) -> Tensor:
    """w_t (*, N, T) in front of ∇log π_θ'(a_t | s_t), 0 behind the end, from log ρ, rewards and `alive` (*, N, T)."""
    m = log_multiplier(log_ratio, alive, correction, self_normalised).exp()
    if correction in ("per_decision", "notes"):
        weight = returns(reward * m, gamma)  # Σ_{t' ≥ t} r_t' ρ_1 … ρ_t': both products in one
        if correction == "notes":
            weight = weight * log_ratio.exp()  # E82: ρ_t once more
    else:
        weight = m * returns(reward, gamma)
    weight = weight * alive
    if baseline:
        others = 1 - torch.eye(m.shape[-2], dtype=m.dtype, device=m.device)  # no differences of sums: m may be huge
        below = others @ m
        b = torch.where(below > 0, (others @ weight) / below.clamp(min=torch.finfo(m.dtype).tiny), 0.0)
        weight = weight - m * b
    return weight


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed) and "actions"."""
    return {"model": CategoricalPolicy(spec.extra["size"], spec.extra["actions"], config.widths)}


@method("rl/off_policy_gradient", paper="Jie & Abbeel 2010", section="7.3.5", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    env = environment(config.env, run.env)
    world = Worlds.make(env)
    size, actions, limit = world.size, world.actions, env.limit()
    afford(
        f"{config.batch:,} episodes (--batch)",
        4.0 * config.batch * limit * (16 + 2 * (size + sum(config.widths) + actions)),
    )
    run.describe(Spec(extra={"env": config.env, "size": size, "actions": actions}))
    model = run.place(build(config, Spec(extra={"size": size, "actions": actions}))["model"])
    optimizer = Adam(model.parameters(), lr=config.learning_rate)
    rounds = -(-config.episodes // config.batch)
    most = rounds * config.batch * limit
    box = Box(env_steps=0, recent=[], reached=most, share=0.0, fall=np.zeros((3, limit)))
    run.track(model=model, optimizer=optimizer, box=box)
    run.say(f"{env.name}: {size} numbers observed, {actions} actions; {config.updates} updates a batch")
    if env.note:
        run.say(env.note)
        run.artifact("environment", env.note)
    rate = schedules.schedule(config.schedule, config.learning_rate, rounds)
    greedy, final = acting(model), (config.final_episodes, run.seed)
    form = (config.correction, config.baseline, config.self_normalised, config.gamma)

    for step in run.steps(rounds):  # line 1
        dice = run.generator("act", step)
        episodes = collect(env, model, config.batch, fold(run.seed, step), dice, run.rank)  # line 2
        alive, reward = episodes.alive, episodes.reward.double()
        state, action = episodes.state[alive], episodes.action[alive]  # (M, …), the steps of all episodes
        schedules.set_lr(optimizer, rate(step))
        log_ratio = torch.zeros_like(reward)
        old = torch.empty(0)
        for k in range(config.updates):  # line 3
            log_prob, _ = model.judge(state, action)
            if k == 0:
                old = log_prob.detach()
            log_ratio[alive] = (log_prob.detach() - old).double()
            weight = step_weights(log_ratio, reward, alive, *form)[alive].to(log_prob.dtype)
            objective = (weight * log_prob).sum() / config.batch
            optimizer.zero_grad()
            (-objective).backward()
            run.average(model)
            optimizer.step()
        box.env_steps += episodes.steps
        box.recent = (box.recent + episodes.returns.tolist())[-100:]
        if box.reached == most and len(box.recent) >= LATELY and np.mean(box.recent[-LATELY:]) >= config.target_return:
            box.reached = box.env_steps
        share = effective_sample_size(log_ratio.sum(1)) / config.batch
        box.share += float(share)
        _watch(box.fall, log_ratio, alive)
        run.log(
            training_return=episodes.returns.mean(), effective_share=share, env_steps=float(box.env_steps),
            episodes=float((step + 1) * config.batch),
        )  # fmt: skip
        done, every = (step + 1) * config.batch, config.evaluate_every
        if step + 1 == rounds or (every and done // every > step * config.batch // every):
            score = play(env, greedy, config.evaluation_episodes, fold(run.seed, step))
            run.log(greedy_return=float(score.mean()))

    scores = play(env, greedy, *final, "final evaluation")
    sampled = play(env, acting(model, generator(run.seed, 0, 0, "final act")), *final, "final sampling")
    show(run, env, greedy)
    seen = box.fall[2] > 0
    if seen.any():
        time, (whole, single, count) = np.arange(limit)[seen] + 1, box.fall[:, seen]
        lines = {"ρ_1 … ρ_t": (time, whole / count), "ρ_t": (time, single / count)}
        run.artifact(
            "effective", curves(lines, "step t of an episode", "effective share of the episodes"), caption=CAPTION
        )
    return {
        "sampled_return": float(sampled.mean()),
        "greedy_return": float(scores.mean()),
        "greedy_return_low": float(scores.min()),
        "training_return": float(np.mean(box.recent)),
        "env_steps": float(box.env_steps),
        "steps_to_target": float(box.reached),
        "effective_share": box.share / rounds,
    }


CAPTION = (
    "Effective sample size over the number of episodes alive at t, at the last update from a batch; mean over batches"
)


def _watch(fall: np.ndarray, log_ratio: Tensor, alive: Tensor) -> None:
    """Add to (3, limit): the effective share at each t of the products and of the single ratios, and a count of one."""
    many = alive.sum(0) > 1
    for row, log_m in enumerate((log_ratio.cumsum(1), log_ratio)):
        kept = log_m.masked_fill(~alive, -math.inf)[:, many]
        share = effective_sample_size(kept, 0) / alive[:, many].sum(0)
        fall[row, : len(many)][many.cpu().numpy()] += share.cpu().numpy()
    fall[2, : len(many)] += many.cpu().numpy()


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play, write each episode as a GIF where the environment can be drawn, and return the scores."""
    dice = None if options.greedy else generator(options.seed, 0, 0, "sample")
    return films(environment(loaded.config.env), acting(loaded.model, dice), options.count, options.seed, folder)
