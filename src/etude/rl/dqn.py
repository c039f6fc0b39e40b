"""Deep Q-network: Q-learning with a replay buffer and a target network

Paper: Mnih et al., Playing Atari with Deep Reinforcement Learning, 2013, arXiv:1312.5602; Human-level control through
deep reinforcement learning, Nature 518, 2015 (target network, error clipping). Replay: Lin, Self-improving reactive
agents, 1992. `double`: van Hasselt, Guez & Silver, 2015, arXiv:1509.06461.

Equation: y = r + γ (1 − terminated) max_a' Q_φ'(s', a'),    L(φ) = mean Huber₁(Q_φ(s, a) − y),    y constant

Algorithm: (notes, Algorithm 22, with the K updates a round of Algorithm 21)
    1. while the budget of environment steps lasts
    2.     act ε-greedily (or by Boltzmann) in n worlds, add the transitions to B
    3.     copy φ' ← φ when N environment steps have passed
    4.     draw K minibatches from B uniformly; y = r + γ (1 − terminated) max_a' Q_φ'(s', a')
    5.     K times: φ ← φ − α Adam(∇ mean Huber(Q_φ(s, a) − y))

Differences:
- E93 (notes 7.6.1-7.6.5): every target in the notes lacks the terminal mask. Here nothing is bootstrapped behind a
  termination; behind a truncation (time limit) the value still counts. y is a constant.
- E94 (7.6.2): the notes' ε-greedy gives the others ε/(|A|−1); the standard form spreads ε over all actions. Both are
  here (`--exploration notes_epsilon_greedy`); Boltzmann has a temperature.
- E96 (7.6.5): Nature's DQN on Atari also stacks 4 frames, repeats actions, clips rewards to ±1, uses RMSProp and a
  buffer of 1 M. Here that is the world's (`--env atari:Pong,repeat=4,stack=4,clip=true`, its defaults) and the convolutions are
  Nature's, but Adam takes the steps. Other rewards are as they are. Huber is the error clipping.
- Line 5 writes the gradient out (backpropagation is a few lines) instead of recording a graph, and all parameters are one
  vector φ; a test holds it against autograd. As φ' does not change in line 5 the targets of all K minibatches are
  computed at once. Adam's subnormal averages are flushed to 0 (`optim.denormals`), which halves the time.
- ε falls from 1: all actions are drawn uniformly to begin with.
- Against Stable-Baselines3 2.9 at equal hyperparameters: n = 8 worlds (its default is 1) at the same number of updates
  per environment step; ε decides for each world by itself; the target is copied at the start of a round's learning,
  which is the same when N is at most a round. Default init, Adam, Huber and gradient clipping at 10 are the same.
- The score is GREEDY evaluation in worlds of its own; the training return includes the exploration. The network swings
  between good and bad to the end, so by default the one that did best in the evaluations is kept and scored on fresh
  episodes (greedy_return); last_greedy_return is the last one's score. overestimation is max Q of the states in which
  those fresh episodes began, minus their discounted returns.
- `--engine compiled_update` makes line 5 in machine code (`parts/replay_updates.py`), all of a round in one call, on the same
  minibatches and equal but for rounding; `compiled_whole` (`--preset compiled`) compiles the worlds too.
- Under torchrun every rank has its own worlds and buffer, which a checkpoint holds too, and gradients are averaged.

Expect: CPU, 50,000 steps → greedy return 500 on seeds 0-4 with the kept network, 29 to 66 s on a busy core. The last
network gave 66, 226, 500, 29, 500; Stable-Baselines3's last gave 19, 500, 500, 192, 500 and its kept one 500 on all.

Command: `etude run rl/dqn --env CartPole-v1 --steps 50000`
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etude.blocks.acting.environments import environment
from etude.blocks.acting.episodes import Copies, play, show
from etude.blocks.acting.memory import afford_learning
from etude.blocks.acting.replay import Replay, Screens
from etude.blocks.acting.returns import td_target
from etude.blocks.acting.worlds import Engine, Worlds
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, NonNegative, Positive, Probability, Whole
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold
from etude.core.run import Loaded, Run
from etude.core.spec import Spec
from etude.optim.adam import Adam
from etude.optim.denormals import flushed
from etude.rl.parts.films import films
from etude.rl.parts.mlp import activations, backward
from etude.rl.parts.pixels import CONVOLUTIONS, flat_size
from etude.rl.parts.replay_fused import ValueLearner, refuse
from etude.rl.parts.replay_updates import Choices
from etude.rl.q_learning import boltzmann, draw, epsilon_greedy, linear, spread


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """An environment with discrete actions: registered with Gymnasium (``module:Name-v0`` imports the module first),
    an Atari game with its settings (``atari:Pong,repeat=4``), ``file.py:Name`` of your own (the file is run), or in Python
    an environment, its class or a function that makes one.
    """
    steps: Count = 50_000
    """Environment steps in all (on each rank), rounded up to whole rounds."""
    worlds: Copies = 8
    """Copies of the environment that act together."""
    engine: Literal["gymnasium", "compiled", "compiled_update", "compiled_whole"] = "gymnasium"
    """Gymnasium's worlds and torch's updates; the classic worlds compiled (the same transitions, many times as fast); the updates
    in machine code on one thread of the CPU (twice as fast; states that are numbers, one rank; equal but for rounding; half a
    minute to compile, the first time ever); or both.
    """
    collect: Count = 256
    """Environment steps in a round, before its updates."""
    updates: Whole = 128
    """Updates of φ in a round (K); 0 leaves the network untrained."""
    batch: Count = 64
    """Transitions in a minibatch."""
    buffer: Count = 100_000
    """Transitions that the replay buffer holds."""
    learning_starts: Whole = 1000
    """Environment steps with uniform actions and no updates."""
    target_every: Count = 10
    """Environment steps between copies φ' ← φ (at the next round's learning)."""
    gamma: Probability = 0.99
    """Discount γ."""
    learning_rate: Positive = 2.3e-3
    """Adam's α."""
    clip_norm: Positive = 10.0
    """The gradient is scaled down to this norm."""
    widths: tuple[Count, ...] = (256, 256)
    """Widths of the hidden layers, of images those behind the convolutions."""
    action_outputs: bool = True
    """One output for each action; off: the action is an input and Q(s, a) the one output (7.6.6)."""
    double: bool = False
    """Choose a' by φ and value it by φ' (double DQN)."""
    huber: bool = True
    """Huber loss; off: ½(Q − y)² as in the notes."""
    exploration: Literal["epsilon_greedy", "notes_epsilon_greedy", "boltzmann"] = "epsilon_greedy"
    """How actions are tried out."""
    epsilon_end: Probability = 0.04
    """ε after its descent from 1."""
    epsilon_fraction: NonNegative = 0.16
    """Share of the steps over which ε falls linearly."""
    temperature: Positive = 1.0
    """τ of Boltzmann exploration."""
    evaluate_every: Whole = 2560
    """Environment steps between greedy evaluations (at the end of a round); 0: only the last."""
    evaluation_episodes: Copies = 20
    """Episodes of each greedy evaluation along the way, of at most 1000 steps if the environment sets no limit."""
    final_episodes: Copies = 100
    """Fresh episodes of the last greedy evaluation, which gives greedy_return."""
    keep_best: bool = True
    """End with the network that did best in the evaluations along the way; off: with the last one."""


PRESETS = {
    "tiny": Config(
        steps=2000, updates=32, learning_starts=300, epsilon_fraction=0.6, widths=(32,), evaluate_every=512,
        evaluation_episodes=5, final_episodes=5,
    ),
    "default": Config(),
    "compiled": Config(engine="compiled_whole"),
    "lake": Config(  # 4 s; values of a start state from which at most 1 can be earned: 4.0, with --double 0.1
        env="FrozenLake-v1", steps=20_000, collect=64, updates=32, batch=32, target_every=64, learning_rate=0.1,
        widths=(), epsilon_end=0.5, epsilon_fraction=0.3, evaluate_every=0, final_episodes=400, keep_best=False,
    ),
    "sb3": Config(  # Stable-Baselines3's own defaults, with which nothing is solved in 50,000 steps
        collect=32, updates=8, batch=32, buffer=1_000_000, learning_starts=100, target_every=10_000, learning_rate=1e-4,
        widths=(64, 64), epsilon_end=0.05, epsilon_fraction=0.1, evaluate_every=3200,
    ),
    "pong": Config(  # Nature's table 1 with Adam; 40 M frames and 15 GB of memory, for large hardware
        env="atari:Pong", steps=10_000_000, collect=32, updates=8, batch=32, buffer=1_000_000, learning_starts=50_000,
        target_every=10_000, learning_rate=1e-4, widths=(512,), epsilon_end=0.1, epsilon_fraction=0.1,
        evaluate_every=500_000, evaluation_episodes=3, final_episodes=10,
    ),
}  # fmt: skip

SETTINGS = {
    "env": "Acrobot-v1",
    "buffer": 1000,
    "learning_starts": 600,
    "target_every": 600,
    "clip_norm": 0.1,
    "widths": (24,),
    "double": {"double": True, "target_every": 600},
    "temperature": {"exploration": "boltzmann", "temperature": 0.05},
    "evaluate_every": 1024,
    "keep_best": {"steps": 3000, "updates": 100, "evaluate_every": 256, "keep_best": False},
}

METRICS = {
    "last_greedy_return": "mean return of the last network's greedy policy; greedy_return is the best one's with --keep-best",
    "overestimation": "max Q of the first states less the discounted return that followed",
}

EXPERIMENTS = (
    Experiment(
        "cartpole", preset="default", metric="greedy_return", bar=475.0, seeds=(0, 1, 2),
        published="solved means 475 (Gymnasium's reward_threshold of CartPole-v1)",
        notes="network chosen by 20-episode greedy evaluations every 2,560 steps, scored on 100 fresh episodes",
        controls=(
            Control("an untrained network", {"updates": 0, "steps": 256}),
            Control("the notes' target, unmasked (E93)", swap={"td_target": "etude.rl.parts.nulls.unmasked_target"}),
        ),
    ),
    Experiment(
        "compiled", preset="compiled", metric="greedy_return", bar=475.0, notes="worlds and updates in machine code",
        controls=(Control("an untrained network", {"updates": 0, "steps": 256}),),
    ),
    Experiment(
        "double", preset="lake", metric="overestimation", bar=0.15, better="lower", flags={"double": True},
        published="less overestimation than DQN in 6 of 6 Atari games (van Hasselt 2015, fig. 3)",
        notes="a table (one-hot states, no hidden layer) with steps so large that its values are noise for the maximum to "
        "pick from; no value of this world is above 1",
        controls=(Control("plain DQN", {"double": False}),),
    ),
)  # fmt: skip


FIELDS = ("state", "action", "reward", "next_state", "terminated", "truncated")
PIECE = 512
"""States whose targets are computed together: activations of more leave the processor's cache."""

# B minibatch, S state, A actions, D input of the network (S, or S + A without action outputs)


class QNetwork(nn.Module):
    """Q_φ(s, ·), (N, S) → (N, A): an MLP with ReLU whose parameters are one vector φ: one kernel updates them all.

    `state` is S, or (C, H, W) of images, which go through the convolutions of `rl.parts.pixels` first.
    """

    def __init__(
        self, state: int | tuple[int, ...], actions: int, widths: tuple[int, ...], action_outputs: bool = True
    ) -> None:
        super().__init__()
        self.actions, self.action_outputs = actions, action_outputs
        planes = 0 if isinstance(state, int) else state[0]
        size = state if isinstance(state, int) else flat_size(state)
        self.widths = (size, *widths, actions) if action_outputs else (size + actions, *widths, 1)
        layers: list[nn.Conv2d | nn.Linear] = []
        for out, kernel, stride in CONVOLUTIONS if planes else ():
            layers.append(nn.Conv2d(planes, out, kernel, stride))
            planes = out
        layers += [nn.Linear(a, b) for a, b in pairwise(self.widths)]
        parts = [part.detach() for layer in layers for part in layer.parameters()]
        self.shapes = [part.shape for part in parts]
        self.phi = nn.Parameter(torch.cat([part.flatten() for part in parts]))

    def layers(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of a vector of φ's length as (weight (out, in), bias (out,)) of each layer; convolutions (out, in, k, k)."""
        pieces = [part.view(shape) for part, shape in zip(vector.split([s.numel() for s in self.shapes]), self.shapes)]
        return list(zip(pieces[::2], pieces[1::2]))

    def inputs(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Network input (*, D) and output column (*, 1) whose value is Q(s, a), for states (*, S), actions (*,)."""
        if self.action_outputs:
            return state, action[..., None]
        one_hot = nn.functional.one_hot(action, self.actions).to(state)
        return torch.cat([state, one_hot], -1), torch.zeros_like(action)[..., None]

    def forward(self, state: Tensor) -> Tensor:
        return self.values(self.layers(self.phi), state)

    def values(self, layers: list[tuple[Tensor, Tensor]], state: Tensor) -> Tensor:
        """Q(s, ·) (N, A) under the given layers."""
        if self.action_outputs:
            return activations(layers, state)[-1]
        every = torch.arange(self.actions, device=state.device).repeat(len(state))
        x, _ = self.inputs(state.repeat_interleave(self.actions, 0), every)
        return activations(layers, x)[-1].view(-1, self.actions)


def slope(error: Tensor, huber: bool) -> Tensor:
    """Derivative of Huber₁ (error clipped to ±1) or of ½ error²; (*,)."""
    return error.clamp(-1.0, 1.0) if huber else error


def loss(error: Tensor, huber: bool) -> Tensor:
    """Mean of Huber₁ or of ½ error² over everything: 0-dim."""
    size = error.abs()
    return torch.where(size < 1, 0.5 * error * error, size - 0.5).mean() if huber else 0.5 * (error * error).mean()


def act(q: NDArray, uniform: NDArray, config: Config, epsilon: float) -> NDArray[np.int64]:
    """Actions (n,) for values (n, A) and uniform numbers (n,) by the configured exploration."""
    if config.exploration == "boltzmann":
        return draw(boltzmann(q, config.temperature), uniform)
    return draw(epsilon_greedy(q, epsilon, config.exploration == "notes_epsilon_greedy"), uniform)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """`spec.extra` holds "size" (S) or "shape" (of images), and "actions" (A)."""
    size = tuple(spec.extra["shape"]) if "shape" in spec.extra else spec.extra["size"]
    return {"model": QNetwork(size, spec.extra["actions"], config.widths, config.action_outputs)}


@method("rl/dqn", paper="arXiv:1312.5602", section="7.6.3, 7.6.4, 7.6.5, 7.6.6, 7.6.8", needs=("rl",), threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if config.worlds > config.collect or config.collect > config.buffer:
        raise UserError("--worlds, --collect and --buffer must not fall: worlds <= collect <= buffer")
    env = environment(config.env, run.env)
    engine: Engine = "compiled" if config.engine in ("compiled", "compiled_whole") else "gymnasium"
    machine = config.engine in ("compiled_update", "compiled_whole")
    worlds = Worlds.make(env, config.worlds, run.seed, "training", run.rank, engine, images=True)
    images = len(worlds.shape) == 3
    if images and not config.action_outputs:
        raise UserError(
            f"--env {env.name} observes images, beside which an action is no input: leave --action-outputs on"
        )
    if machine:
        numbers = images, f"learns from numbers, and {worlds.name} shows images"
        outputs = not config.action_outputs, "has one output for each action, and --no-action-outputs none"
        refuse(run, numbers, outputs, flag=f"--engine {config.engine}")
    extra = {"env": config.env, "size": worlds.size, "actions": worlds.actions}
    spec = Spec(extra=extra | ({"shape": list(worlds.shape)} if images else {}))
    if config.exploration == "notes_epsilon_greedy":
        spread(0.0, worlds.actions)
    afford_learning([worlds.size + worlds.actions, *config.widths, worlds.actions], config.updates * config.batch)
    run.describe(spec)
    model = run.place(build(config, spec)["model"])
    target = copy.deepcopy(model)
    optimizer = Adam(model.parameters(), lr=config.learning_rate)
    choices = Choices(config.gamma, config.clip_norm, config.huber, config.double)
    learner = ValueLearner(optimizer, list(pairwise(model.widths)), config.batch) if machine else None
    rounds = -(-config.steps // config.collect)
    room = min(config.buffer, rounds * config.collect + config.worlds)  # more would stay empty
    if images and room < (least := (worlds.shape[0] // worlds.planes + 1) * config.worlds):
        raise UserError(
            f"--buffer must hold {least} transitions at least, from which stacks of screens can be put together"
        )
    if images:
        replay: Replay = Screens(room, config.worlds, worlds.shape, worlds.planes)
    else:
        one = np.zeros(worlds.size, np.float32)
        replay = Replay(
            room, state=one, action=np.int64(0), reward=np.float32(0), next_state=one, terminated=False, truncated=False
        )
    box = Box(copied=0, updates=0, recent=[], best=-float("inf"), best_phi=model.phi.detach().clone(), last=0.0)
    run.track(model=model, target=target, optimizer=optimizer, replay=replay, worlds=worlds, box=box)
    if worlds.note and isinstance(replay, Screens):
        replay.begin()
    for name, note in _notes(config, rounds, worlds.note, env.note, env.about).items():
        run.say(note)
        run.artifact(name, note)
    seen_as = " × ".join(map(str, worlds.shape)) + " bytes" if images else f"{worlds.size} numbers"
    run.say(f"{env.name}: {seen_as} observed, {worlds.actions} actions; {model.phi.numel():,} parameters")

    # views of φ, φ' and the gradient: nothing below is recorded by autograd
    gradient = model.phi.grad = torch.zeros_like(model.phi)
    online, frozen, slopes = model.layers(model.phi.detach()), model.layers(target.phi.detach()), model.layers(gradient)

    def q_of(state: NDArray[Any]) -> NDArray[np.float32]:
        return model.values(online, torch.from_numpy(state).to(run.device)).cpu().numpy()

    def greedy(state: NDArray[Any]) -> NDArray[np.int64]:
        return q_of(state).argmax(1)

    even = np.full((config.worlds, worlds.actions), 1 / worlds.actions)
    for step in run.steps(rounds):  # line 1
        begun, reached = step * config.collect, (step + 1) * config.collect  # equal on every rank
        dice = run.generator("explore", step)
        while worlds.steps < reached:  # line 2; some worlds may be a few steps further
            waiting = worlds.steps < config.learning_starts
            progress = worlds.steps / config.steps
            epsilon = linear(1.0, config.epsilon_end, config.epsilon_fraction, progress)
            uniform = torch.rand(config.worlds, generator=dice, dtype=torch.float64).numpy()
            action = draw(even, uniform) if waiting else act(q_of(worlds.observation), uniform, config, epsilon)
            row = worlds.step(action)
            replay.add(**{name: getattr(row, name) for name in FIELDS})
        finished = worlds.drain()
        if finished:
            box.recent = (box.recent + finished)[-100:]
            run.log(training_return=float(np.mean(finished)))
        run.log(env_steps=float(worlds.steps))
        if config.exploration != "boltzmann":
            run.log(epsilon=1.0 if waiting else epsilon)

        if reached > config.learning_starts and config.updates:
            if reached // config.target_every > box.copied:  # line 3
                target.load_state_dict(model.state_dict())
                box.copied = reached // config.target_every
            index = replay.sample((config.updates, config.batch), run.generator("replay", step))  # line 4
            rows = replay.gather(index, run.device)
            x, column = model.inputs(rows["state"], rows["action"])
            pieces = rows["next_state"].flatten(0, 1).split(PIECE)
            behind = torch.cat([model.values(frozen, piece) for piece in pieces]).view(*index.shape, -1)  # (K, B, A)
            y = td_target(rows["reward"], rows["terminated"], behind.amax(-1), config.gamma)  # (K, B)
            said = y.new_empty(*y.shape, 1 if not config.action_outputs else worlds.actions)  # Q_φ(s, ·)
            weight = torch.zeros_like(said).scatter_(2, column, 1 / config.batch)  # of each of them in the loss
            if learner:  # line 5, K times
                said, norms = learner.learn(choices, rows, behind, y)
                run.average(gradient_norm=norms[-1])
            else:
                with flushed():
                    for k, (x_k, y_k, said_k, weight_k) in enumerate(zip(x, y[..., None], said, weight)):  # line 5
                        if config.double:
                            best = model.values(online, rows["next_state"][k]).argmax(1, keepdim=True)
                            chosen = behind[k].gather(1, best)[:, 0]
                            y[k] = td_target(rows["reward"][k], rows["terminated"][k], chosen, config.gamma)
                        kept = activations(online, x_k, said_k)
                        backward(online, kept, slope(said_k - y_k, config.huber).mul_(weight_k), slopes)
                        if run.world > 1:
                            run.average(model)
                        norm = torch.linalg.vector_norm(gradient)
                        run.average(
                            gradient_norm=norm
                        )  # finite exactly when the gradient is, and much cheaper to look at
                        gradient.mul_((config.clip_norm / (norm + 1e-6)).clamp_(max=1.0))
                        optimizer.step()
            error = said.gather(2, column)[..., 0] - y
            if not model.phi.isfinite().all():
                raise RunError(f"the weights are no longer finite in round {step + 1}; lower --learning-rate")
            box.updates += config.updates
            run.log(loss=loss(error, config.huber), q_mean=(error + y).mean())
        last = step + 1 == rounds
        if last or (config.evaluate_every and reached // config.evaluate_every > begun // config.evaluate_every):
            returns = play(env, greedy, config.evaluation_episodes, fold(run.seed, step))
            run.log(greedy_return=float(returns.mean()))
            if returns.mean() >= box.best:
                box.best = float(returns.mean())
                box.best_phi.copy_(model.phi.detach())
        if last:  # the last network is scored too, then the best one is put back
            box.last = float(play(env, greedy, config.final_episodes, run.seed, "last evaluation").mean())
            if config.keep_best:
                model.phi.detach().copy_(box.best_phi)

    fresh = (config.final_episodes, run.seed, "final evaluation")
    returns, discounted = play(env, greedy, *fresh), play(env, greedy, *fresh, gamma=config.gamma)
    value = q_of(Worlds.make(env, *fresh, images=True).observation).max(1)
    show(run, env, greedy)
    worlds.close()
    lately = {"training_return": float(np.mean(box.recent))} if box.recent else {}  # no episode may have ended
    return {
        "greedy_return": float(returns.mean()),
        "greedy_return_low": float(returns.min()),
        "last_greedy_return": box.last,
        "overestimation": float((value - discounted).mean()),
        **lately,
        "env_steps": float(worlds.steps),
        "updates": float(box.updates),
    }


def _notes(config: Config, rounds: int, *said: str) -> dict[str, str]:
    """What a reader of this run must know, by the name of its artifact."""
    notes = dict(zip(("restarted_worlds", "environment", "game"), said))
    most = rounds * config.collect
    if not config.updates or most <= config.learning_starts:
        why = f"--learning-starts is {config.learning_starts:,} and the run takes {most:,} environment steps"
        notes["no_updates"] = f"no update will be made, for {why if config.updates else '--updates is 0'}"
        notes["no_updates"] += "; the scores are those of an untrained network"
    return {name: note for name, note in notes.items() if note}


@dataclass(frozen=True)
class Sample:
    count: Count = 3
    """Episodes to play."""
    seed: Whole = 0
    """Seed of the worlds."""


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """Play greedily, write each episode as a GIF where the environment can be drawn, and return the scores."""
    model = loaded.model

    def greedy(state: NDArray[Any]) -> NDArray[np.int64]:
        with torch.no_grad():
            return model(torch.from_numpy(state)).argmax(1).numpy()

    return films(environment(loaded.config.env), greedy, options.count, options.seed, folder)
