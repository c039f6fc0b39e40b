"""The expert that `--expert` names: whom a policy learns from, and the world in which both act

    balance           a rule of one line that balances CartPole's pole for all 500 steps
    obstacle          a point that passes an obstacle on either side (`etude.imitation.parts.obstacle`)
    sinusoid          no world: Bishop's inverse problem, where one number is seen and up to three are right
    episodes.npz      recorded episodes in the form of `etude.blocks.acting.recording` (`etude sample` leaves such a file)
    a run             a run folder or a method's name (its latest run): what its policy does

The first, second and last can be asked about any observation; a file and the sinusoid cannot.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting import recording as files
from etude.blocks.acting.environments import Environment, environment
from etude.blocks.acting.recording import Policy, Recording, Stepped, policy_of, record
from etude.blocks.acting.worlds import Worlds
from etude.core import launch
from etude.core.checkpoint import Box
from etude.core.errors import UserError
from etude.core.folder import read_bytes
from etude.core.randomness import fold
from etude.core.run import Run
from etude.core.trust import granted, is_granted
from etude.imitation.parts.obstacle import Obstacle, nearer, two_ways

PUSH = np.array([0.1, 0.3, 1.0, 0.5], np.float32)
"""The expert of CartPole pushes right where PUSH · (x, ẋ, θ, θ̇) is positive."""
SPLITS = ("training", "validation", "test")


@dataclass
class Expert:
    """Someone to learn from."""

    label: str
    """In words, for captions."""
    size: int
    """Numbers in an observation."""
    actions: int
    """Discrete actions, or numbers in a continuous one."""
    discrete: bool
    limit: int = 0
    """Steps after which an episode is left."""
    world: Callable[[int, int, str, int], Stepped] | None = None
    """(count, seed, purpose, rank) → that many worlds at the beginning of an episode; None: there is no world."""
    policy: Callable[[int, str], Policy] | None = None
    """(seed, purpose) → what acts in one set of episodes; None: it cannot be asked."""
    answer: Policy | None = None
    """What it says of any observations, whoever came to them; None: it cannot be asked."""
    given: Callable[[int], dict[str, Recording]] | None = None
    """What was recorded instead, by split, for a seed."""
    env: Environment | None = None
    """What can be filmed."""

    @property
    def place(self) -> str:
        """The name by which `world_of` finds the world again; "" where there is none."""
        return self.env.name if self.env else "obstacle" if self.world else ""

    def worlds(self, count: int, seed: int, purpose: str, rank: int = 0) -> Any:
        """Worlds at the beginning of an episode. Raises UserError where there is none to act in."""
        if self.world is None:
            raise UserError(f"{self.label}: name the world to act in with --env")
        return self.world(count, seed, purpose, rank)

    def play(self, policy: Policy, count: int, seed: int, purpose: str, rank: int = 0) -> Recording:
        """One whole episode of a policy (not of the expert's) in each of `count` worlds."""
        worlds = self.worlds(count, seed, purpose, rank)
        try:
            return record(worlds, policy, self.limit)
        finally:
            getattr(worlds, "close", lambda: None)()

    def shows(self, episodes: int, seed: int, noise: float = 0.0) -> dict[str, Recording]:
        """Episodes of the expert by split: `episodes` to learn from, and half as many each to choose and to score by.

        In a share `noise` of the steps something else is carried out than what the expert says, and what it says is
        recorded. A file, and points without a world, are as they are.
        """
        if self.given is not None:
            return self.given(seed)
        counts = dict(zip(SPLITS, (episodes, -(-episodes // 2), -(-episodes // 2))))
        return {split: self._shown(count, seed, f"expert {split}", noise) for split, count in counts.items()}

    def _shown(self, count: int, seed: int, purpose: str, noise: float) -> Recording:
        assert self.policy is not None
        policy, said = self.policy(seed, purpose), []
        dice = np.random.default_rng(fold(seed, purpose=f"{purpose} noise"))

        def disturbed(state: NDArray[np.float32]) -> NDArray[Any]:
            action = policy(state)
            said.append(action)
            other, swapped = self.random(dice, action), dice.random(len(action)) < noise
            return np.where(swapped.reshape(-1, *[1] * (action.ndim - 1)), other, action)

        done = self.play(disturbed, count, seed, purpose)
        lengths = np.diff(np.append(done.first, len(done)))
        world, step = np.repeat(np.arange(count), lengths), np.arange(len(done)) - np.repeat(done.first, lengths)
        return dataclasses.replace(done, actions=np.stack(said)[step, world])

    def random(self, dice: np.random.Generator, like: NDArray[Any]) -> NDArray[Any]:
        """Any actions of the world, as many as `like`: uniform over the discrete ones, or over the range of `like`."""
        if self.discrete:
            return dice.integers(0, self.actions, len(like))
        low, high = like.min(0), like.max(0)
        return (low + (high - low) * dice.random(like.shape)).astype(np.float32)


def balance(state: NDArray[np.float32]) -> NDArray[np.int64]:
    """The rule: CartPole's state (n, 4) → left (0) or right (1)."""
    return (state @ PUSH > 0).astype(np.int64)


def sinusoid(seed: int, count: int = 1000) -> Recording:
    """x = t + 0.3 sin 2πt + U(−0.1, 0.1), t uniform in [0, 1]: x is observed, t is to be said (Bishop, 1994, section 5)."""
    dice = np.random.default_rng(seed)
    t = dice.uniform(0, 1, count)
    x = t + 0.3 * np.sin(2 * np.pi * t) + dice.uniform(-0.1, 0.1, count)
    nothing = np.zeros(count, np.float32)
    return Recording(x[:, None].astype(np.float32), t[:, None].astype(np.float32), np.ones(count, bool), nothing)


def split(recording: Recording, seed: int) -> dict[str, Recording]:
    """Four fifths of the episodes to learn from, a tenth each (at least one) to choose and to score by, drawn by `seed`.

    Fewer than ten episodes are first cut into ten of about equal length, so that no step is in two splits.
    """
    if len(recording) < 10:
        raise UserError(f"{len(recording)} recorded steps are too few to split; at least 10 are needed")
    if len(recording.first) < 10:
        starts = recording.starts.copy()
        starts[np.arange(10) * len(recording) // 10] = True
        recording = Recording(recording.observations, recording.actions, starts, recording.rewards)
    order = np.random.default_rng(fold(seed, purpose="split")).permutation(len(recording.first))
    tenth = len(order) // 10
    parts = (order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth])
    return {name: recording.episodes(np.sort(part)) for name, part in zip(SPLITS, parts)}


def resolve(run: Run, expert: str, env: str = "") -> Expert:
    """The expert that ``--expert`` names; tracks which one it is, so call it once, before `run.steps`.

    `env` names the world, or is "" for the expert's own. Raises UserError when there is no such expert, it cannot be
    asked in that world, or (on a resumed run) it is no longer the one that the run began with.
    """
    held = Box(place="", mark="")
    run.track(expert=held)
    worldly = bool(env) or run.env is not None
    if expert in ("obstacle", "sinusoid") and worldly:
        raise UserError(f"--expert {expert} has a world of its own; leave out --env")
    if expert == "obstacle":
        return Expert("the two-way expert", 2, 2, False, Obstacle.limit, Obstacle, two_ways, nearer)
    if expert == "sinusoid":
        return Expert("Bishop's sinusoid", 1, 1, False, given=_points)
    if expert == "balance":
        found = _in_world(Expert("the balancing rule", 4, 2, True), environment(env or "CartPole-v1", run.env), expert)
        found.policy, found.answer = (lambda seed, purpose: balance), balance
        return found
    path = Path(held.place or expert)
    if path.suffix == ".npz" or path.is_file():
        return _file(run, held, path, env if worldly else "")
    return _run(run, held, expert, env if worldly else "")


def _points(seed: int) -> dict[str, Recording]:
    return {name: sinusoid(fold(seed, purpose=f"sinusoid {name}"), 1000 if name != "test" else 4000) for name in SPLITS}


def _file(run: Run, held: Box, path: Path, env: str) -> Expert:
    """Recorded episodes; the world, if it is named, must observe and act as they do."""
    found = files.load(path)
    mark = hashlib.sha256(read_bytes(path, files.LARGEST)).hexdigest()
    if held.mark and held.mark != mark:
        raise UserError(f"{path} is not the file that this run began with; start a new run")
    held.place, held.mark = str(path.resolve()), mark
    discrete = found.actions.ndim == 1
    actions = int(found.actions.max()) + 1 if discrete else found.actions.shape[1]
    expert = Expert(
        f"{path.name}", found.observations.shape[1], actions, discrete, given=lambda seed: split(found, seed)
    )
    return _in_world(expert, environment(env, run.env), str(path)) if env or run.env is not None else expert


def _run(run: Run, held: Box, expert: str, env: str) -> Expert:
    """The policy of a finished run, in the world in which it learned."""
    try:
        folder = Path(held.place) if held.place else launch.find_run(expert, but=run.folder)
    except UserError as error:
        raise UserError(
            f"--expert {expert}: {error}; or take one that needs no run: balance, obstacle, sinusoid"
        ) from error
    if folder.resolve() == run.folder.resolve():
        raise UserError(
            f"--expert {expert} is the folder of this run itself; name a method or the folder of an earlier run"
        )
    loaded = launch.load(folder)
    if held.place and str(loaded.step) != held.mark:
        raise UserError(
            f"{folder} was at step {held.mark} when this run began and is at {loaded.step} now; start a new run"
        )
    held.place, held.mark = str(folder.resolve()), str(loaded.step)
    act = policy_of(loaded)
    extra = loaded.spec.extra
    size, actions = int(extra.get("size", extra.get("states", 0))), int(extra.get("actions", 0))
    found = Expert(f"{loaded.name} ({folder})", size, actions, bool(extra.get("discrete", True)))
    if not env and extra["env"] == "obstacle":
        found.world, found.limit = Obstacle, Obstacle.limit
    else:
        with granted(
            is_granted() and (bool(env) or run.env is not None)
        ):  # what a run folder names is not the user's word
            found = _in_world(found, environment(env or str(extra["env"]), run.env), str(folder))
    found.policy, found.answer = (lambda seed, purpose: act), act
    return found


def _in_world(expert: Expert, env: Environment, name: str) -> Expert:
    """The expert with worlds of this environment, in which it must know what it sees and does."""
    probe = Worlds.make(env, box=None)
    probe.close()
    expert.discrete = not probe.box
    if (probe.size, probe.actions) != (expert.size, expert.actions):
        raise UserError(
            f"--expert {name} observes {expert.size} numbers and has {expert.actions} actions; {env.name} has {probe.size} "
            f"and {probe.actions}"
        )
    expert.world = lambda count, seed, purpose, rank: Worlds.make(env, count, seed, purpose, rank, box=None)
    expert.env, expert.limit = env, env.limit()
    return expert


def world_of(name: str, count: int, seed: int) -> tuple[Any, int]:
    """(worlds, steps after which an episode is left) of a finished run, by the "env" of its spec."""
    if name == "obstacle":
        return Obstacle(count, seed, "sample"), Obstacle.limit
    env = environment(name)
    return Worlds.make(env, count, seed, "sample", box=None), env.limit()
