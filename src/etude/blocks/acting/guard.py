"""What stands round an environment that is not Gymnasium's own: its mistakes are answered with their file and line."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from etude.blocks.acting.environments import boxed, discrete, encoder, is_boxed, spot
from etude.core.errors import RunError, UserError

if TYPE_CHECKING:
    from etude.blocks.acting.environments import Environment


LARGEST = 1e30
"""A reward beyond this would leave float32 within an episode."""
TRIED = 8
"""At most this many actions are tried before a run begins."""


class Guard(gymnasium.Wrapper):
    """Passes everything through unchanged and holds no state.

    An exception inside the environment, an observation of another shape or not finite, an answer in the form of another
    interface: each becomes a RunError of one sentence.
    """

    def __init__(self, env: Any, name: str) -> None:
        super().__init__(env)
        self.name = name

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        answer = self._asked("reset", lambda: self.env.reset(seed=seed, options=options))
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            raise RunError(f"--env {self.name}: reset must return (observation, info), it returns {_form(answer)}")
        self._look("reset", answer[0])
        return answer

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        answer = self._asked("step", lambda: self.env.step(action))
        if not (isinstance(answer, tuple) and len(answer) == 5):
            form = "(observation, reward, terminated, truncated, info)"
            raise RunError(f"--env {self.name}: step must return {form}, it returns {_form(answer)}")
        self._look("step", answer[0])
        try:
            finite = math.isfinite(answer[1]) and abs(answer[1]) <= LARGEST
        except TypeError:
            finite = False
        if not finite:
            raise RunError(
                f"--env {self.name}: step gives the reward {answer[1]!r}; it must be a number of at most 1e30"
            )
        return answer

    def _asked(self, what: str, call: Any) -> Any:
        try:
            return call()
        except (UserError, RunError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit, too, would end the run without a word
            raise RunError(f"--env {self.name} failed in {what}: {spot(error)}") from error

    def _look(self, what: str, observed: Any) -> None:
        space = self.observation_space
        try:
            value = np.asarray(observed, dtype=np.float64)
        except (TypeError, ValueError):
            raise RunError(f"--env {self.name}: {what} observes {_form(observed)}; its space is {space}") from None
        if value.shape != space.shape:
            raise RunError(f"--env {self.name}: {what} observes the shape {value.shape}; its space is {space}")
        if isinstance(space, gymnasium.spaces.Discrete):
            if not space.start <= value < space.start + space.n:
                raise RunError(f"--env {self.name}: {what} observes {observed}, which is not in its space {space}")
        elif not np.isfinite(value).all():
            raise RunError(f"--env {self.name}: {what} observes a number that is not finite ({observed})")


def examine(env: Environment) -> str:
    """Make one copy, begin an episode and try the actions: UserError for what cannot work, else a note, mostly empty."""
    one = env.make()
    for name in ("observation_space", "action_space"):
        if getattr(one.unwrapped, name, None) is None:
            raise UserError(f"--env {env.name} has no {name}; its __init__ must set one of gymnasium.spaces")
    encoder(one.observation_space, env.name)
    if is_boxed(one.action_space):
        boxed(one.action_space, env.name)
        tried = [one.action_space.low, one.action_space.high]
    else:
        count, first = discrete(one.action_space, env.name)
        tried = list(range(first, first + min(count, TRIED)))
    taken = inspect.signature(one.unwrapped.reset).parameters
    if not any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in taken.values()):
        missing = [name for name in ("seed", "options") if name not in taken]
        if missing:
            raise UserError(
                f"--env {env.name}: its reset takes no {' and no '.join(missing)}, so its episodes cannot be repeated; "
                "it must begin with def reset(self, *, seed=None, options=None): super().reset(seed=seed)"
            )
    try:
        before, again = np.asarray(one.reset(seed=0)[0]), np.asarray(one.reset(seed=0)[0])
        for action in tried:
            _, _, terminated, truncated, _ = one.step(action)
            if terminated or truncated:
                one.reset(seed=0)
    except RunError as error:
        raise UserError(str(error)) from error
    one.close()
    if not np.array_equal(before, again):
        return f"{env.name} does not begin alike from equal seeds, so two runs with one seed will differ"
    return ""


def _form(answer: Any) -> str:
    return f"a tuple of {len(answer)}" if isinstance(answer, tuple) else f"one {type(answer).__name__}"
