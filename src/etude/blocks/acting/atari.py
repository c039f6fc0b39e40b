"""Atari games by name, through ale-py, with everything between the screen and the agent as a setting.

    atari:Pong                       as Mnih et al. (2015) have it
    atari:Breakout,repeat=2,sticky=0.25,lives=false

The options and their defaults are the fields of `Game`. What is learned in and what is scored differ where the paper's
do: rewards are clipped and a lost life ends an episode in training only; scores are those of whole games.

Against Gymnasium's ``AtariPreprocessing``: frames are resized by the same areas without OpenCV; a lost life ends the
episode but not the game, which goes on where it stands (as the authors' does); where a game ends within a repeat, its last screen
is seen alone. ale-py brings the games with it (0.9 or newer; imported when first used).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from etude.core.errors import UserError, nearest
from etude.core.extras import how

PREFIX = "atari:"


@dataclasses.dataclass(frozen=True)
class Game:
    """A game and what stands between its screen and the agent."""

    game: str
    """ale-py's name: pong, space_invaders."""
    repeat: int = 4
    """Frames for which each action is held; the pixel-wise largest of the last two screens is seen."""
    stack: int = 4
    """Screens seen at once; at the start of an episode its first one fills them all."""
    size: int = 84
    """Side of the square that the 210 × 160 screen is reduced to."""
    grey: bool = True
    """Grey screens; off: red, green and blue."""
    noops: int = 30
    """A game begins with 1 to this many frames of doing nothing."""
    lives: bool = True
    """A lost life ends an episode in training."""
    clip: bool = True
    """A reward in training is −1, 0 or 1."""
    sticky: float = 0.0
    """Probability that the machine repeats the last action instead, at each frame (Machado et al., 2018: 0.25)."""
    actions: str = "minimal"
    """"minimal", or "full" for all 18."""
    frames: int = 108_000
    """Frames after which a game is cut (30 minutes): a truncation."""

    def says(self) -> str:
        """All settings in one line."""
        fields = (f"{field.name}={_written(getattr(self, field.name))}" for field in dataclasses.fields(self)[1:])
        return f"{PREFIX}{self.game},{','.join(fields)}"


_LEAST = {"repeat": 1, "stack": 1, "size": 8, "noops": 0, "sticky": 0.0, "frames": 1}
_MOST = {"repeat": 60, "stack": 16, "size": 160, "noops": 1000, "sticky": 1.0, "frames": 10**7}


def parsed(env: str) -> Game:
    """The game that ``atari:NAME,option=value`` means; UserError for what it cannot mean, or without ale-py."""
    name, *options = env.removeprefix(PREFIX).split(",")
    known = _games(env)
    game = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).removeprefix("_")
    if game not in known:
        raise UserError(f"--env {env}: ale-py has no game {name!r}{nearest(game, known)}")
    fields = {field.name: field.default for field in dataclasses.fields(Game)[1:]}
    chosen: dict[str, Any] = {}
    for option in options:
        key, given, text = option.partition("=")
        if not given or key not in fields:
            raise UserError(f"--env {env}: {option!r} is none of its options {', '.join(fields)}{nearest(key, fields)}")
        chosen[key] = _value(env, key, text, fields[key])
    return Game(game, **chosen)


def _value(env: str, key: str, text: str, default: Any) -> Any:
    if isinstance(default, (bool, str)):
        words = {"true": True, "false": False} if isinstance(default, bool) else {"minimal": "minimal", "full": "full"}
        if text not in words:
            raise UserError(f"--env {env}: {key} must be {' or '.join(words)}, got {text!r}")
        return words[text]
    try:
        value = type(default)(text)
    except ValueError:
        value = math.nan
    if not _LEAST[key] <= value <= _MOST[key]:
        raise UserError(f"--env {env}: {key} must be a number from {_LEAST[key]} to {_MOST[key]}, got {text!r}")
    return value


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _games(env: str) -> list[str]:
    return machine(env).roms.get_all_rom_ids()


def machine(env: str) -> Any:
    """The package ale-py."""
    try:
        import ale_py
    except ImportError:
        raise UserError(f"--env {env} needs ale-py, which is not installed; run: {how('atari')}") from None
    return ale_py


@functools.cache
def facts(game: str, actions: str) -> tuple[list[Any], tuple[int, int]]:
    """(keys, shape of the screen) of a game, which has to be loaded for that: 0.1 s."""
    package = machine(PREFIX + game)
    package.ALEInterface.setLoggerMode(package.LoggerMode.Error)
    probe = package.ALEInterface()
    probe.loadROM(package.roms.get_rom_path(game))
    return probe.getMinimalActionSet() if actions == "minimal" else probe.getLegalActionSet(), probe.getScreenDims()


class Atari(gymnasium.Env):
    """One game. Observes (stack, size, size) uint8, oldest screen first (three planes a screen in colour).

    `training`: rewards clipped, episodes ended by a lost life, where `game` says so.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def __init__(self, game: Game, training: bool = False, render_mode: str | None = None) -> None:
        package = machine(PREFIX + game.game)
        self.game, self.training, self.render_mode = game, training, render_mode
        self._keys, shape = facts(game.game, game.actions)
        self._ale, self._state_type, self._loaded = package.ALEInterface(), package.ALEState, False
        self._ale.setFloat("repeat_action_probability", game.sticky)
        self.planes = 1 if game.grey else 3
        self.action_space = gymnasium.spaces.Discrete(len(self._keys))
        self._stack = np.zeros((game.stack * self.planes, game.size, game.size), np.uint8)
        self.observation_space = gymnasium.spaces.Box(0, 255, self._stack.shape, np.uint8)
        self._screen = np.zeros((2, *shape, *([] if game.grey else [3])), np.uint8)
        self._lives, self._begun, self._over, self._held = 0, 0, True, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a game; after a lost life in training, go on in the one that is running, one frame later."""
        super().reset(seed=seed)
        if seed is not None or not self._loaded:
            self._ale.setInt("random_seed", int(self.np_random.integers(2**31)))
            self._ale.loadROM(machine(self.game.game).roms.get_rom_path(self.game.game))  # with its new dice
            self._loaded = self._over = True
        if self._over or not self.training:
            self._begin()
        else:
            self._ale.act(self._keys[0])
            if self._ale.game_over():
                self._begin()
        self._lives, self._over, self._held = self._ale.lives(), False, 0
        self._look(0)
        self._screen[1] = 0
        self._push(fill=True)
        return self._stack.copy(), {}

    def _begin(self) -> None:
        self._ale.reset_game()
        for _ in range(int(self.np_random.integers(1, self.game.noops + 1)) if self.game.noops else 0):
            self._ale.act(self._keys[0])
            if self._ale.game_over():
                self._ale.reset_game()
        self._begun = self._ale.getEpisodeFrameNumber()

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Hold one of the keys for `repeat` frames."""
        key, repeat, reward, lost = self._keys[action], self.game.repeat, 0.0, False
        self._held = int(action)
        for frame in range(repeat):
            reward += self._ale.act(key)
            lost = self.training and self.game.lives and self._ale.lives() < self._lives
            self._over = self._ale.game_over()
            if lost or self._over:
                self._look(0)
                self._screen[1] = 0
                break
            if frame >= repeat - 2:
                self._look(repeat - 1 - frame)
        self._lives = self._ale.lives()
        self._push()
        truncated = not self._over and self._ale.getEpisodeFrameNumber() - self._begun >= self.game.frames
        terminated = self._over or lost
        self._over |= truncated
        if self.training and self.game.clip:
            reward = float(np.sign(reward))
        return self._stack.copy(), reward, terminated, truncated and not terminated, {}

    def render(self) -> NDArray[np.uint8]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The screen as the game shows it, (210, 160, 3) uint8."""
        return self._ale.getScreenRGB()

    def state_dict(self) -> dict[str, Any]:
        """The machine with its dice, and what has been seen of it."""
        machine = self._ale.cloneSystemState().__getstate__()
        return {
            "machine": np.frombuffer(machine, np.uint8),
            "stack": self._stack,
            "screen": self._screen,
            "counts": np.array([self._lives, self._begun, self._over, self._held]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        lives, begun, over, held = (int(value) for value in state["counts"])
        for _ in range(100 if self.game.sticky else 0):  # the key that may stick is no part of the machine's state,
            self._ale.act(self._keys[held])  # and may itself not get through at once
        machine = self._state_type.__new__(self._state_type)
        machine.__setstate__(state["machine"].tobytes())
        self._ale.restoreSystemState(machine)
        self._stack[:], self._screen[:] = state["stack"], state["screen"]
        self._lives, self._begun, self._over, self._held = lives, begun, bool(over), held

    def _look(self, place: int) -> None:
        if self.game.grey:
            self._ale.getScreenGrayscale(self._screen[place])
        else:
            self._ale.getScreenRGB(self._screen[place])

    def _push(self, fill: bool = False) -> None:
        """The newest screen comes last in the stack, or fills it."""
        largest = np.maximum(self._screen[0], self._screen[1])
        planes = largest[None] if self.game.grey else np.moveaxis(largest, -1, 0)
        small = np.stack([reduced(plane, self.game.size) for plane in planes])
        if fill:
            self._stack[:] = np.tile(small, (self.game.stack, 1, 1))
        else:
            self._stack[: -self.planes] = self._stack[self.planes :].copy()
            self._stack[-self.planes :] = small


# ------------------------------------------------------------------------------------------------ smaller pictures


class Shares(NamedTuple):
    """Which pixels of a line lie under each of the reduced line's n, and with what share of it."""

    pixel: NDArray[np.int64]
    """(most, n)"""
    share: NDArray[np.float32]
    """(most, n); 0 behind the last"""


@functools.cache
def shares(length: int, reduced_to: int) -> Shares:
    """A line of `length` pixels cut into `reduced_to` equal parts."""
    scale, sliver = length / reduced_to, 1e-3  # less than a thousandth of a pixel is nothing, as in OpenCV
    ends = [(i * scale, min((i + 1) * scale, length)) for i in range(reduced_to)]
    under = [range(math.floor(low + sliver), math.ceil(high - sliver)) for low, high in ends]
    most = max(len(pixels) for pixels in under)
    pixel, share = np.zeros((most, reduced_to), np.int64), np.zeros((most, reduced_to), np.float32)
    for i, ((low, high), pixels) in enumerate(zip(ends, under)):
        for j, place in enumerate(pixels):
            pixel[j, i], share[j, i] = place, (min(high, place + 1) - max(low, place)) / (high - low)
    return Shares(pixel, share)


def _reduce(picture, row, row_share, column, column_share, out):
    height, width = out.shape
    lines = np.zeros((picture.shape[0], width), np.float32)
    for y in range(picture.shape[0]):
        for j in range(column.shape[0]):
            for x in range(width):
                lines[y, x] += np.float32(picture[y, column[j, x]]) * column_share[j, x]
    total = np.empty(width, np.float32)
    for y in range(height):
        total[:] = 0
        for j in range(row.shape[0]):
            for x in range(width):
                total[x] += row_share[j, y] * lines[row[j, y], x]
        for x in range(width):
            out[y, x] = np.uint8(np.rint(total[x]))


@functools.cache
def _built() -> Any:
    from numba import njit

    try:
        return njit(cache=True)(_reduce)
    except RuntimeError:  # no writable place for the cache
        return njit(_reduce)


def reduced(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(H, W) uint8 → (size, size): the mean of the area under each pixel, rounded."""
    out = np.empty((size, size), np.uint8)
    rows, columns = (shares(length, size) for length in picture.shape)
    _built()(np.ascontiguousarray(picture), *rows, *columns, out)
    return out
