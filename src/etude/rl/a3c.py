"""A3C: workers act in their own worlds and write into shared weights, nobody waits

Paper: Mnih et al., Asynchronous Methods for Deep Reinforcement Learning, 2016, arXiv:1602.01783, algorithm S3; without locks:
    Niu, Recht, Ré & Wright, Hogwild!, 2011, arXiv:1106.5730.

Equation: with the weights θ' that a worker copied from θ before it acted, and R, Â of its own segment
    d = ∇_θ' (c_V mean (V_θ'(s) − R)² − mean Â log π_θ'(a | s) − c_H mean H(π_θ'(· | s))),  scaled down to length c
    g ← β g + (1 − β) d²,   θ ← θ − α_t d / √(g + ε),   θ and g shared by all workers

Algorithm: (the paper's, every worker for itself)
    1. repeat until all workers together have taken the environment steps
    2.     θ' ← θ
    3.     take T steps in the worker's n worlds by π_θ'
    4.     R and Â by V_θ', without a bootstrap behind a termination
    5.     d ← the gradient with respect to θ'
    6.     update g and θ by d where they lie: others may have moved them since line 2

Differences:
- E90 (notes 7.4.4.3): where all wait for each other it is A2C (`rl/a2c`); here nobody waits. A gradient is that of weights which
  others have moved meanwhile, and two workers may write over each other: both are so in the paper.
- Nothing repeats with `workers` > 1: equal seeds do not give equal numbers, and a resumed run goes on from the saved θ and g in
  fresh episodes. One worker is a plain loop in this process: it repeats, and is resumed exactly.
- A worker has n worlds, the paper's has one (`--worlds 1`); means are over n T steps where the paper has sums.
- Shared RMSProp as in the paper, with ε inside the root; α falls to 0 over the run, by the steps that all have taken together.
- A worker that is killed is replaced; what it had seen in its last segment is lost.
- It is a method for processors: the networks stay in the machine's memory, whatever `--device` says.

Expect: CartPole after 200,000 steps by 2 workers, seeds 0-2: J = 500, 500, 496; 17 CPU seconds with `--engine compiled`.

Command: `etude run rl/a3c --workers 2 --env CartPole-v1`
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford_learning
from etude.blocks.acting.worlds import Engine, Worlds
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, NonNegative, Positive, Probability, Range, Whole
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim import schedules
from etude.optim.clipping import clip_norm_
from etude.optim.flat import Vector, flatten
from etude.rl.a2c import loss_of, slopes_of
from etude.rl.parts.actor_critic import ActorCritic
from etude.rl.parts.films import films
from etude.rl.parts.remembered import Collector, advantages
from etude.rl.parts.workers import Crew
from etude.rl.reinforce import Sample, acting


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete actions: registered with Gymnasium (``module:Name-v0`` imports the module first),
    ``file.py:Name`` of your own (the file is run), or in Python an environment, its class or a function that makes one.
    """
    steps: Count = 200_000
    """Environment steps of all workers together, rounded up to whole segments."""
    workers: Annotated[int, Range(1, 256)] = 2
    """Processes that act and learn at the same time; 1 is a plain loop, which repeats exactly."""
    worlds: Copies = 8
    """Copies of the environment of each worker (n)."""
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
    """The gradient is scaled down to this norm (c)."""
    learning_rate: Positive = 3e-3
    """α of the shared RMSProp at the beginning."""
    schedule: schedules.Schedule = "linear"
    """Learning rate over the run."""
    widths: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers."""
    shared: bool = False
    """One trunk with two heads; off: two networks."""
    collect: Count = 2000
    """Environment steps of all workers together between two lines of the log: a step of the run's clock."""
    evaluate_every: Whole = 25_000
    """Environment steps between greedy evaluations (at the end of a round); 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes of each greedy evaluation along the way."""
    final_episodes: Copies = 100
    """Fresh episodes of the last evaluations, greedy and by the policy itself."""


PRESETS = {
    "tiny": Config(
        steps=1024, workers=1, worlds=4, widths=(16,), collect=128, evaluate_every=512, evaluation_episodes=4, final_episodes=5
    ),
    "default": Config(),
    "paper": Config(workers=16, worlds=1, segment=5, entropy_bonus=0.01, clip_norm=40.0, learning_rate=1e-3),
}  # fmt: skip

SETTINGS = {
    "env": "Acrobot-v1",
    "schedule": "constant",
    "widths": (12,),
    "shared": True,
    "gae_lambda": 0.5,
    "steps": 1500,
    "workers": 2,
}

METRICS = {
    "updates": "updates by all workers together",
    "least_share": "the smallest share that a worker had in the environment steps of this session",
    "replaced": "workers that died and were replaced in this session",
}

EXPERIMENTS = (
    Experiment(
        "cartpole", preset="default", metric="sampled_return", bar=475.0,
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        notes="J itself by two workers, on 100 fresh episodes; nothing of it repeats digit for digit",
        controls=(
            Control("one round", {"steps": 64}),
            Control("advantages whose signs are drawn", swap={"advantages": "etude.rl.parts.nulls.drawn_signs"}),
        ),
    ),
)  # fmt: skip

SEEN = ("loss", "value_loss", "entropy")
NOTE = (
    "workers write into the shared weights without waiting for each other: equal seeds do not give equal numbers, and a resumed "
    "run goes on from the saved weights in fresh episodes (--workers 1 repeats exactly)"
)

# P numbers in θ, g and d; the memory of θ and g is shared


@torch.no_grad()
def shared_rmsprop_(
    theta: Tensor, square: Tensor, slope: Tensor, rate: float, decay: float = 0.99, eps: float = 1e-5
) -> None:
    """g ← β g + (1 − β) d², θ ← θ − α d / √(g + ε), (P,) each, in place and without a lock."""
    square.mul_(decay).addcmul_(slope, slope, value=1 - decay)
    theta.addcdiv_(slope, (square + eps).sqrt_(), value=-rate)


def gradient_of(
    collector: Collector, vector: Vector, dice: torch.Generator, config: Config, tell: bool
) -> dict[str, Tensor]:
    """Lines 3 to 5: one segment, and its clipped gradient in `vector.grad` (P,); the losses, if they are to be told.

    Raises RunError where the gradient is not finite.
    """
    rows = collector.play(dice)  # line 3
    advantage, returns = advantages(rows, config.gamma, config.gae_lambda)  # line 4
    weight = (rows.real / max(rows.real.sum(), 1)).astype(np.float32)  # a row that only resets is no transition
    action, *numbers = (torch.from_numpy(x).flatten() for x in (rows.action, rows.value, advantage, returns, weight))
    collector.backward(*slopes_of(rows.logits, action, *numbers, config))  # line 5  # pyright: ignore[reportArgumentType]
    if not math.isfinite(clip_norm_([vector], config.clip_norm)):
        raise RunError(
            f"the gradient is not finite after {collector.worlds.steps:,} environment steps of a worker; lower --learning-rate"
        )
    return dict(zip(SEEN, loss_of(rows.logits, action, *numbers, config))) if tell else {}  # pyright: ignore[reportArgumentType]


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (numbers observed) and "actions"."""
    return {"model": ActorCritic(spec.extra["size"], spec.extra["actions"], config.widths, config.shared)}


@method("rl/a3c", paper="arXiv:1602.01783", section="7.4.4.3", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    alone = config.workers == 1
    if run.world > 1 and not alone:
        raise UserError(
            "the workers of rl/a3c share the memory of one machine; start it without torchrun, with more --workers"
        )
    env = environment(config.env, run.env)
    worlds = Worlds.make(env, config.worlds, run.seed, "training", run.rank, config.engine)
    spec = Spec(extra={"env": config.env, "size": worlds.size, "actions": worlds.actions})
    afford_learning([worlds.size, *config.widths, worlds.actions], config.workers * config.worlds * config.segment)
    run.describe(spec)
    model = build(config, spec)["model"]
    vector = flatten(model)
    theta = vector.data if alone else vector.data.clone().share_memory_()
    square = torch.zeros_like(theta) if alone else torch.zeros_like(theta).share_memory_()
    taken, updates = (torch.zeros(config.workers, dtype=torch.int64).share_memory_() for _ in range(2))
    box = Box(square=square, taken=taken, updates=updates, recent=[])
    run.track(model=model, box=box, **({"worlds": worlds} if alone else {}))
    theta.copy_(vector.data)  # what a checkpoint held
    begun, rounds = taken.clone(), -(-config.steps // config.collect)
    rate = schedules.schedule(config.schedule, config.learning_rate, config.steps)
    parameters = sum(p.numel() for p in model.parameters())
    run.say(f"{env.name}: {worlds.size} numbers observed, {worlds.actions} actions; {parameters:,} parameters")
    notes = {
        "restarted_worlds": worlds.note if alone else "",
        "environment": env.note,
        "asynchronous": "" if alone else NOTE,
    }
    for name, note in notes.items():
        if note:
            run.say(note)
            run.artifact(name, note)

    def segments(worker: int, mine: Worlds, local: nn.Module, weights: Vector) -> Callable[[bool], dict[str, Tensor]]:
        """A function that does lines 2 to 6 once for a worker, whose own networks are flat in `weights`."""
        assert isinstance(local, ActorCritic)
        collector, before = Collector(local, mine, config.segment), int(taken[worker]) - mine.steps

        def segment(tell: bool) -> dict[str, Tensor]:
            if weights.data_ptr() != theta.data_ptr():
                weights.data.copy_(theta)  # line 2
            dice = generator(run.seed, int(updates[worker]), run.rank, f"worker {worker}")
            seen = gradient_of(collector, weights, dice, config, tell)
            if run.world > 1:  # ranks of one worker each
                run.average(local)
            shared_rmsprop_(theta, square, weights.grad, rate(min(int(taken.sum()), config.steps - 1)))  # line 6
            taken[worker] = before + mine.steps
            updates[worker] += 1
            return seen

        return segment

    def work(worker: int, tell: Callable[[Any], None], stopped: Callable[[], bool]) -> None:
        mine = Worlds.make(env, config.worlds, run.seed, f"worker {worker} from {int(taken[worker])}", 0, config.engine)
        local = build(config, spec)["model"]
        segment, told = segments(worker, mine, local, flatten(local)), int(taken[worker])
        while not stopped() and int(taken.sum()) < config.steps:  # line 1
            speak = int(taken[worker]) - told >= config.collect // config.workers
            seen = segment(speak)
            if speak:
                told = int(taken[worker])
                tell([mine.drain(), {name: float(number) for name, number in seen.items()}])
        mine.close()

    own = segments(0, worlds, model, vector) if alone else None
    crew = Crew(0 if alone else config.workers, work)
    with crew:
        for step in run.steps(rounds):
            goal, finished, seen = min((step + 1) * config.collect, config.steps), [], {}
            while int(taken.sum()) < goal:
                if own:
                    seen = {name: float(number) for name, number in own(True).items()}
                else:
                    time.sleep(0.002)
                    for _, (returns, losses) in crew.hear():
                        finished += returns
                        seen = losses
            if step + 1 == rounds:
                crew.end()
            vector.data.copy_(theta)
            if finished := finished + (worlds.drain() if own else []):
                box.recent = (box.recent + finished)[-100:]
                run.log(training_return=float(np.mean(finished)))
            run.log(env_steps=float(taken.sum()), **seen)
            done, every = (step + 1) * config.collect, config.evaluate_every
            if step + 1 == rounds or (every and done // every > step * config.collect // every):
                score = play(env, acting(model), config.evaluation_episodes, fold(run.seed, step))
                run.log(greedy_return=float(score.mean()))

    worlds.close()
    if crew.replaced:
        run.say(
            f"{crew.replaced} worker{'s' * (crew.replaced > 1)} died and {'were' if crew.replaced > 1 else 'was'} replaced"
        )
    final, share = (config.final_episodes, run.seed), (taken - begun).double()
    scores = play(env, acting(model), *final, "final evaluation")
    sampled = play(env, acting(model, generator(run.seed, 0, 0, "final act")), *final, "final sampling")
    show(run, env, acting(model))
    return {
        "sampled_return": float(sampled.mean()),
        "greedy_return": float(scores.mean()),
        "greedy_return_low": float(scores.min()),
        **({"training_return": float(np.mean(box.recent))} if box.recent else {}),  # no episode may have ended
        "env_steps": float(taken.sum()),
        "updates": float(updates.sum()),
        "least_share": float(share.min() / share.sum().clamp(min=1)),
        "replaced": float(crew.replaced),
    }


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play, write each episode as a GIF where the environment can be drawn, and return the scores."""
    dice = None if options.greedy else generator(options.seed, 0, 0, "sample")
    return films(environment(loaded.config.env), acting(loaded.model, dice), options.count, options.seed, folder)
