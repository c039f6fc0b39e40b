"""Behaviour cloning: learn to act by supervised learning on what an expert did

Paper: Pomerleau, ALVINN: An Autonomous Land Vehicle in a Neural Network, NIPS 1, 1989. The error: Ross & Bagnell,
    Efficient Reductions for Imitation Learning, AISTATS 2010. `mixture`: Bishop, Mixture Density Networks, 1994. `latent`:
    Sohn, Lee & Yan, Learning Structured Output Representation using Deep Conditional Generative Models, NIPS 2015.
    `autoregressive`: Metz, Ibarz, Jaitly & Davidson, Discrete Sequential Prediction of Continuous Actions for Deep RL,
    2017, arXiv:1705.05035.

Equation: θ* = argmax_θ Σ_i log π_θ(a_i | o_i) over the expert's steps;   with error ε on those, the cost grows as O(ε T²)
    mixture: π(a | o) = Σ_k softmax(w)_k N(a; μ_k, diag σ_k²)
    latent: −log π(a | o) ≤ E_q[−log p(a | o, z)] + KL(q(z | o, a) ‖ N(0, I))
    autoregressive: π(a | o) = Π_d softmax(f_d(o, a_<d))_bin;   history: π(a_t | o_1 … o_t) by an LSTM

Algorithm: (notes, 7.1.3 and 7.1.4)
    1. let the expert act in its world; keep what it observed and did, episode by episode
    2. draw a batch of steps (history: of episodes, padded to the longest)
    3. L ← mean of −log π_θ(a | o) over all real steps (markov, history: cross-entropy, or ½‖a − π(o)‖²)
    4. θ ← θ − α Adam(∇L), the gradient clipped; keep the θ that did best on episodes set apart
    5. let π_θ act in the world itself, where what it sees follows from what it did

Differences:
- E77 (7.1.4.2): the weights of a mixture must be a softmax, its likelihood is summed as logarithms (logsumexp), and u_i is a
  mean. σ is bounded below by --least-sigma, smoothly: recorded actions that repeat exactly have no finite likelihood.
- Observations and continuous actions are brought to mean 0 and deviation 1 by the training episodes; losses of mixture
  and latent are densities in the world's own units again, those of markov and history are not.
- latent draws z from N(0, I) as the notes write it; Sohn's prior depends on o. z and the Gaussian noise are drawn anew in
  every step, as is the component of a mixture: only the state says what was begun.
- autoregressive answers with the middle of a bin, between the smallest and the largest action of the training episodes;
  one network a number of the action, which sees the numbers before it.
- history learns on whole episodes (their first --window steps), and its state begins at 0 with each of them, acting too.
  What is behind the end of an episode is in no sum and in no denominator.
- --noise is not in the notes: in a share of the expert's steps something else is carried out, and what the expert would
  have done is recorded (DART, Laskey et al., 2017, arXiv:1703.09327). Without it an LSTM learns the expert's rhythm instead
  of its reasons, and is lost after its first error.
- Choices look at the validation episodes, and test_loss is of others again. The scores are of fresh worlds.

Expect: CPU, seeds 0-2. Obstacle, 1,000 episodes: squared error crashes in 100 % (with latent's settings in 66 to 100 %), mixture
in 0.4 to 0.7 %, autoregressive in 0.3 to 0.6 %, latent in 1.0 to 1.6 %; 5 to 20 s. CartPole from 20 episodes: 500 of 500.
Without its velocities history gets 500 (20 s), the best answer to what is seen now 42. Bishop's sinusoid: −1.08 to −1.09
nats with three Gaussians, −0.54 to −0.56 with one.

Command: `etude run imitation/behaviour_cloning --policy mixture --expert obstacle`
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from etude import optim
from etude.blocks.acting.episodes import Copies, show
from etude.blocks.acting.memory import afford_learning
from etude.blocks.acting.recording import Recording, record, written
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Few, Positive, Probability, Whole
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.data.batches import Stream
from etude.imitation.parts.experts import Expert, resolve, world_of
from etude.imitation.parts.obstacle import outcome, picture
from etude.imitation.parts.policies import (
    Autoregressive,
    Cloned,
    History,
    Kind,
    Latent,
    Markov,
    Mixture,
    actor,
    masked_mean,
    windows,
)
from etude.optim.adam import Adam
from etude.optim.clipping import clip_norm_
from etude.optim.schedules import Schedule


@dataclass(frozen=True)
class Config:
    policy: Kind = "mixture"
    """Form of π: markov (one answer to what is seen now), history (LSTM), and three that can hold several answers."""
    expert: str = "obstacle"
    """balance (CartPole), obstacle, sinusoid (no world), a file of recorded episodes (.npz), a run folder or a method name."""
    env: str = ""
    """World to act in, where it is not the expert's own: as for rl/dqn. In Python also an environment object."""
    masked: tuple[Whole, ...] = ()
    """Columns of an observation that the learner does not see (CartPole's velocities: 1 3)."""
    expert_episodes: Copies = 300
    """Episodes of the expert to learn from (half as many each for validation and test); a file has its own."""
    examples: Whole = 0
    """Learn from the first so many steps of them only; 0: all."""
    noise: Probability = 0.0
    """Share of the expert's steps in which a random action is carried out; what the expert would have done is recorded."""
    steps: Count = 3000
    """Number of parameter updates."""
    batch: Few = 128
    """Steps (history: episodes) in a minibatch, of each rank."""
    window: Count = 500
    """history learns on so many steps from the beginning of an episode."""
    learning_rate: Positive = 3e-3
    """Adam's α."""
    schedule: Schedule = "cosine"
    """Learning rate over the run."""
    clip_norm: Positive = 10.0
    """The gradient is scaled down to this norm."""
    widths: tuple[Count, ...] = (64, 64)
    """Widths of the hidden layers (not of history)."""
    width: Count = 64
    """Width of history's LSTM."""
    components: Count = 8
    """Gaussians in a mixture (K)."""
    latent: Count = 2
    """Numbers in the code z of latent."""
    bins: Count = 21
    """Bins for each number of an action in autoregressive."""
    least_sigma: Positive = 1e-3
    """Smallest σ of mixture and latent, in units of the actions' deviation."""
    evaluate_every: Whole = 100
    """Updates between looks at the validation episodes; 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes that the learner plays at each such look."""
    final_episodes: Copies = 1000
    """Fresh episodes of the learner, and of the expert, that are scored at the end."""
    keep_best: bool = True
    """End with the parameters of the smallest validation loss; off: with the last ones."""


PRESETS = {
    "tiny": Config(
        steps=60, expert_episodes=20, batch=32, widths=(16,), evaluate_every=20, evaluation_episodes=4, final_episodes=10
    ),
    "default": Config(),
    "latent": Config(policy="latent", latent=1, steps=6000, batch=256, learning_rate=5e-3),
    "pole": Config(policy="markov", expert="balance", expert_episodes=20, final_episodes=100),
    "masked_pole": Config(
        policy="history", expert="balance", expert_episodes=100, noise=0.2, final_episodes=100, masked=(1, 3), batch=8,
        steps=1200, learning_rate=1e-2, width=32,
    ),
    "sinusoid": Config(expert="sinusoid", components=3, widths=(32,), learning_rate=1e-2),
}  # fmt: skip

SETTINGS = {
    "expert": "sinusoid",
    "env": {"expert": "balance", "policy": "markov", "env": "CartPole-v0"},
    "masked": (1,),
    "examples": 50,
    "noise": 0.3,
    "window": {"policy": "history", "window": 2},
    "clip_norm": 0.1,
    "width": {"policy": "history", "width": 63},
    "latent": {"policy": "latent", "latent": 3},
    "bins": {"policy": "autoregressive", "bins": 20},
    "keep_best": {"learning_rate": 0.5, "schedule": "constant", "keep_best": False},
}

AVERAGE = Control("the average of the ways (squared error)", {"policy": "markov"})

EXPERIMENTS = (
    Experiment(
        "obstacle, mixture", preset="default", metric="crash_share", bar=0.008, better="lower", controls=(AVERAGE,),
        notes="the notes' car before a tree (7.1.4.2); no figure is published",
    ),
    Experiment(
        "obstacle, autoregressive", preset="default", metric="crash_share", bar=0.007, better="lower",
        flags={"policy": "autoregressive"}, controls=(AVERAGE,),
    ),
    Experiment("obstacle, latent", preset="latent", metric="crash_share", bar=0.019, better="lower", controls=(AVERAGE,)),
    Experiment(
        "pole", preset="pole", metric="learner_return", bar=475.0,
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        controls=(
            Control("one update", {"steps": 1}),
            Control("the velocities are hidden", {"masked": (1, 3)}),
        ),
    ),
    Experiment(
        "masked pole, history", preset="masked_pole", metric="learner_return", bar=475.0,
        notes="CartPole without its velocities; the expert sees them, and a fifth of its steps goes wrong on purpose",
        controls=(
            Control("only what is seen now", {"policy": "markov", "batch": 128, "steps": 3000}),
            Control("an expert that never errs", {"noise": 0.0}),
        ),
    ),
    Experiment(
        "Bishop's sinusoid", preset="sinusoid", metric="test_loss", bar=-0.9, better="lower",
        notes="Bishop (1994, section 5) shows the three branches and prints no number",
        controls=(Control("one Gaussian", {"components": 1}),),
    ),
)  # fmt: skip


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (D), "actions" and "discrete"."""
    size, actions, discrete = (spec.extra[name] for name in ("size", "actions", "discrete"))
    seen = size - len(set(config.masked))
    head: nn.Module
    if config.policy == "markov":
        head = Markov(seen, actions, discrete, config.widths)
    elif config.policy == "history":
        head = History(seen, actions, discrete, config.width)
    elif config.policy == "mixture":
        head = Mixture(seen, actions, config.widths, config.components, config.least_sigma)
    elif config.policy == "latent":
        head = Latent(seen, actions, config.widths, config.latent, config.least_sigma)
    else:
        head = Autoregressive(seen, actions, config.widths, config.bins)
    return {"model": Cloned(head, size, actions, discrete, config.masked)}


@torch.no_grad()
def mean_loss(model: Cloned, data: Recording, seed: int, batch: int = 4096) -> float:
    """Line 3 over a whole recording, every episode from its beginning to its end."""
    device, dice = model.centre.device, generator(seed, -1, 0, "whole recording")
    history, ends = isinstance(model.head, History), torch.from_numpy(data.ends)
    first, length = (data.first, data.longest) if history else (np.arange(len(data)), 1)
    total = 0.0
    for index in torch.from_numpy(first).split(max(1, batch // length)):
        rows, mask = windows(index, ends, length)
        found = model.losses(*_taken(data, rows, device), dice)
        total += float(torch.where(mask.to(device), found, 0.0).double().sum())
    return total / len(data)


def _taken(data: Recording, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Observations (B, L, D) and actions (B, L) or (B, L, A) of steps (B, L)."""
    number = rows.numpy()
    return torch.from_numpy(data.observations[number]).to(device), torch.from_numpy(data.actions[number]).to(device)


@method(
    "imitation/behaviour_cloning", paper="Pomerleau 1989", section="7.1.3, 7.1.4.1, 7.1.4.2", needs=("rl",), threads=1
)
def train(config: Config, run: Run) -> dict[str, float]:
    expert = resolve(run, config.expert, config.env)
    _suits(config, expert)
    told = {"size": expert.size, "actions": expert.actions, "discrete": expert.discrete}
    spec = Spec(extra={"env": expert.place, **told})
    run.describe(spec)
    afford_learning([expert.size, *config.widths, expert.actions], config.batch)
    model = run.place(build(config, spec)["model"])
    assert isinstance(model, Cloned)
    shown = expert.shows(config.expert_episodes, run.seed, config.noise)  # line 1
    data = shown["training"].head(config.examples or len(shown["training"]))
    model.measure(data)
    optimizer = Adam(model.parameters(), lr=config.learning_rate)
    box = Box(best=float("inf"), kept={name: value.clone() for name, value in model.state_dict().items()})
    run.track(model=model, optimizer=optimizer, box=box)
    run.say(f"{expert.label}: {len(data):,} steps in {len(data.first):,} episodes to learn from")
    window = min(config.window, data.longest) if config.policy == "history" else 1
    begins = torch.from_numpy(data.first if config.policy == "history" else np.arange(len(data)))
    stream, ends = Stream(len(begins), config.batch, run.seed, run.rank, run.world), torch.from_numpy(data.ends)

    rate = optim.schedule(config.schedule, config.learning_rate, config.steps)

    for step in run.steps(config.steps):
        rows, mask = windows(begins[stream.indices(step)], ends, window)  # line 2
        found = model.losses(*_taken(data, rows, run.device), run.generator("noise", step))
        loss = masked_mean(found, mask.to(run.device))  # line 3
        optimizer.zero_grad()
        loss.backward()
        run.average(model, loss=loss)
        optim.set_lr(optimizer, rate(step))
        clip_norm_(model.parameters(), config.clip_norm)
        optimizer.step()  # line 4
        run.log(loss=loss)
        if run.every(config.evaluate_every):
            value = mean_loss(model, shown["validation"], run.seed)
            run.log(validation_loss=value)
            if value < box.best:
                box.best, box.kept = value, {name: part.clone() for name, part in model.state_dict().items()}
            if expert.world is not None:  # line 5
                dice = generator(run.seed, step, 0, "evaluation")
                played = expert.play(actor(model, dice), config.evaluation_episodes, fold(run.seed, step), "evaluation")
                run.log(learner_return=float(played.returns.mean()))
        if config.keep_best and step + 1 == config.steps:
            model.load_state_dict(box.kept)
    metrics = {"test_loss": mean_loss(model, shown["test"], run.seed), "training_steps": float(len(data))}
    return metrics | (_scores(config, run, expert, model) if expert.world is not None else {})


def _suits(config: Config, expert: Expert) -> None:
    """Raise UserError where this policy cannot learn from this expert."""
    if expert.discrete and config.policy not in ("markov", "history"):
        raise UserError(
            f"--policy {config.policy} needs continuous actions, and {expert.label} has {expert.actions} discrete ones; "
            "markov and history take those"
        )
    if strange := [column for column in config.masked if column >= expert.size]:
        raise UserError(f"--masked {strange[0]}: an observation has the columns 0 to {expert.size - 1}")
    if len(set(config.masked)) == expert.size:
        raise UserError(f"--masked leaves nothing to see of {expert.size} columns")


def _scores(config: Config, run: Run, expert: Expert, model: Cloned) -> dict[str, float]:
    """Line 5 on fresh worlds, beside the expert where it can be asked, with pictures."""
    run.say(f"playing {config.final_episodes} episodes")
    played = expert.play(actor(model, run.generator("acting")), config.final_episodes, run.seed, "final evaluation")
    sides = [(config.policy, played)]
    found = {"learner_return": float(played.returns.mean()), "learner_return_low": float(played.returns.min())}
    if expert.policy is not None:
        theirs = expert.play(expert.policy(run.seed, "final"), config.final_episodes, run.seed, "final evaluation")
        sides.insert(0, ("expert", theirs))
        found["expert_return"] = float(theirs.returns.mean())
    if expert.env is None:
        found |= outcome(played)
        caption = f"Episodes of the expert and of the {config.policy} policy from the same starts; a cross is a crash."
        run.artifact("ways", picture(sides), caption)
    else:
        show(run, expert.env, actor(model, run.generator("film")))
    return found


@dataclass(frozen=True)
class Sample:
    count: Copies = 100
    """Episodes to play."""
    seed: Whole = 0
    """Seed of the worlds, and of what the policy draws."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Let the policy act and record it as episodes.npz, which `--expert` takes."""
    name = loaded.spec.extra["env"]
    if not name:
        raise UserError(
            f"{loaded.folder} learned from {loaded.config.expert} and has no world to act in; --env names one"
        )
    dice = generator(options.seed, -1, 0, "sample")
    worlds, limit = world_of(name, options.count, options.seed)
    model = loaded.model
    assert isinstance(model, Cloned)
    return written(record(worlds, actor(model, dice), limit), folder / "episodes.npz")
