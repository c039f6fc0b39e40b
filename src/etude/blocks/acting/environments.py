"""Which environment is meant, and how one copy of it is made.

    CartPole-v1           registered with Gymnasium
    module:Name-v0        the same once the module has been imported (from the working folder too)
    atari:Pong            an Atari game and its settings (`etude.blocks.acting.atari`)
    path/to/file.py:Name  an environment class, or a function that makes one, in a file of your own (which is run)
    an object             in Python: a class, a function that makes one, or an environment (of which copies are made)

`environment` turns any of these into an `Environment`. What is not Gymnasium's own is tried once before a run begins and
stands behind a `Guard` from then on, so that a mistake in it is answered with its file and line.
Needs gymnasium ≥ 1.1 (imported when first used).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.machinery
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.blocks.acting.memory import afford
from etude.core import launch
from etude.core.errors import UserError, nearest
from etude.core.extras import how
from etude.core.folder import read_bytes
from etude.core.trust import is_granted, permit

LONGEST = 1000
"""Steps after which an episode that is looked at is left, where nothing else says when."""


@dataclass(frozen=True)
class Environment:
    """One kind of environment, of which any number of copies can be made."""

    name: str
    """As the user wrote it; every message says it."""
    entry: Callable[..., Any] | None = None
    """Makes one copy; None: it is registered under its name."""
    own: bool = False
    """Not part of Gymnasium, so every copy is guarded."""
    note: str = ""
    """One sentence on what will not work with it, or empty."""
    training: Callable[..., Any] | None = None
    """Makes one copy to learn in, where that is another one (Atari: rewards clipped, a life for an episode)."""
    longest: int | None = None
    """Steps after which the environment itself ends an episode, where no registration says so."""
    about: str = ""
    """Its settings in one line, where it has any."""

    @property
    def spec(self) -> Any:
        """Gymnasium's registration, or None."""
        import gymnasium

        return None if self.entry else gymnasium.registry[self.name.rpartition(":")[2]]

    def make(self, training: bool = False, **options: Any) -> Any:
        """One copy, to learn in or to be scored in, with UserError in place of every exception."""
        import gymnasium

        entry = self.training if training and self.training else self.entry
        try:
            if entry:
                env = entry(**options)
            else:
                env = gymnasium.make(self.name.rpartition(":")[2], disable_env_checker=True, **options)
        except Exception as error:
            raise refusal(self.name, error) from error
        if not isinstance(env, gymnasium.Env):
            raise UserError(f"--env {self.name} gives a {type(env).__name__}, which is not a gymnasium.Env")
        if not self.own:
            return env
        from etude.blocks.acting.guard import Guard

        return Guard(env, self.name)

    def limit(self, most: int | None = None) -> int:
        """Steps after which an episode is left: its own time limit or `most`, the smaller; 1000 without either."""
        registered = self.spec.max_episode_steps if self.spec else self.longest
        return min([int(limit) for limit in (registered, most) if limit is not None], default=LONGEST)


def refusal(name: str, error: Exception) -> UserError:
    """What is said where a copy could not be made."""
    import gymnasium

    if isinstance(error, UserError):
        return error
    if isinstance(error, (gymnasium.error.DependencyNotInstalled, ImportError)):
        if "mujoco" in str(error).lower():
            return UserError(f"--env {name} needs MuJoCo, which is not installed; run: {how('mujoco')}")
        return UserError(f"--env {name} needs a package that is not installed ({error})")
    return UserError(
        f"--env {name} cannot be made: {error if isinstance(error, gymnasium.error.Error) else spot(error)}"
    )


def environment(env: str | Environment, given: Any = None) -> Environment:
    """What `env` names, or the object `given` in Python under that name.

    The one place where an environment's code is imported or run. Code that lies in a file of its own or in the working
    folder is run only with `etude.core.trust.permit`, for a run folder that may come from anywhere names it too. Raises
    UserError: an unknown name (with the nearest), no such file, module or name in it, a missing package, or a
    first episode that goes wrong.
    """
    if isinstance(env, Environment):
        return env
    if given is not None:
        return _tried(Environment(env, _entry(given, env), own=True))
    if env.startswith(launch.OBJECTS["env"]):
        raise UserError(f"the run acts in {env}, which ended with its Python session; start it again with env=…")
    place, _, name = env.rpartition(":")
    if place.endswith(".py") or env.endswith(".py"):
        if not place.endswith(".py"):
            raise UserError(f"--env {env} names a file; name the environment class in it too, as in {env}:MyEnv")
        return _tried(Environment(env, _entry(_from_file(env, Path(place), name), env), own=True))
    if env.startswith("atari:"):
        from etude.blocks.acting import atari

        game = atari.parsed(env)
        about, longest = game.says(), -(-game.frames // game.repeat)
        learning = partial(atari.Atari, game, True)
        return Environment(env, partial(atari.Atari, game), training=learning, longest=longest, about=about)
    import gymnasium

    if place:
        _import(env, place)
    if name.startswith("ALE/") and name not in gymnasium.registry:
        from etude.blocks.acting.atari import machine

        machine(env)  # whose import registers them
    if name not in gymnasium.registry:
        raise UserError(f"--env {env} is not a registered Gymnasium environment{nearest(name, gymnasium.registry)}")
    maker = gymnasium.registry[name].entry_point
    origin = maker if isinstance(maker, str) else getattr(maker, "__module__", "")
    own = not origin.startswith("gymnasium.")
    return _tried(Environment(env, own=True)) if own else Environment(env)


def _tried(env: Environment) -> Environment:
    """The environment with its note, after a first step in it has gone well."""
    from etude.blocks.acting.guard import examine

    return dataclasses.replace(env, note=examine(env))


def _entry(thing: Any, name: str) -> Callable[..., Any]:
    """A function that makes one copy of what was given: a class, a function, or an environment to be copied."""
    import gymnasium

    if isinstance(thing, gymnasium.Env):
        return lambda render_mode=None: _copied(thing, name, render_mode)
    if not callable(thing):
        raise UserError(
            f"--env {name} has the type {type(thing).__name__}; it must be an environment class, a function that makes one, or "
            "a gymnasium.Env"
        )
    return thing


def _copied(env: Any, name: str, render_mode: str | None) -> Any:
    if render_mode and env.render_mode != render_mode:
        raise UserError(f"{name} was made without render_mode='{render_mode}'")
    try:
        return copy.deepcopy(env)
    except Exception as error:
        raise UserError(
            f"--env {name} cannot be copied ({type(error).__name__}: {error}); give its class or a function that makes one"
        ) from error


def _from_file(env: str, path: Path, name: str) -> Any:
    """`name` from the Python file at `path`, which is run."""
    if not path.is_file():
        raise UserError(f"--env {env}: there is no file {path}")
    module = _run(env, path, f"etude_user_{path.stem}")
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"--env {env}: {path} has no '{name}'{nearest(name, known)}")
    return getattr(module, name)


def _run(env: str, path: Path, module_name: str) -> ModuleType:
    """The module made by running a file, from the very bytes that were permitted (no compiled file beside it)."""
    source = read_bytes(path)
    permit({path.name: source}, f"the environment file {path.resolve()}")
    module = ModuleType(module_name)
    module.__file__ = str(path.resolve())
    sys.modules[module_name] = module  # dataclasses and pickle look a module up
    try:
        exec(compile(source, str(path.resolve()), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(f"--env {env}: the file cannot be used: {spot(error)}") from error
    return module


def _import(env: str, module: str) -> None:
    """Import a module that registers environments; it may lie in the working folder."""
    here = importlib.machinery.PathFinder.find_spec(module.partition(".")[0], [str(Path.cwd())])
    origin = here.origin if here is not None and here.origin and module not in sys.modules else None
    package = here is not None and here.submodule_search_locations is not None
    if origin and package and not is_granted():  # it has many files, so it is imported only at the user's word
        raise UserError(
            f"this run acts in --env {env}; to go on would run the package {Path(origin).parent}, so add --trust if you "
            "trust it"
        )
    before = list(sys.path)
    if is_granted():
        sys.path.append(str(Path.cwd()))  # at the end: nothing here may stand before an installed package
    try:
        if origin and not package:
            _run(env, Path(origin), module)
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, ImportError) else spot(error)
        raise UserError(f"--env {env}: the module '{module}' cannot be imported ({what})") from error
    finally:
        sys.path[:] = before


# ---------------------------------------------------------------------------------------------------- mistakes


def spot(error: BaseException) -> str:
    """``file, line 7: Type: message``: where the user's own code (not a library's) was when this was raised."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(("<", *_LIBRARIES)):
            place = f"{_short(file)}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    return " ".join(f"{place}{what}".split())


_HOMES = (
    Path(__file__).resolve().parents[2],
    Path(inspect.getfile(np)).parent.parent,
    Path(inspect.getfile(inspect)).parent,
)
_LIBRARIES = tuple(f"{home}{os.sep}" for home in _HOMES)


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


# ---------------------------------------------------------------------------------------------------- spaces


def discrete(space: Any, name: str) -> tuple[int, int]:
    """(number of actions, first action) of a Discrete space."""
    from gymnasium.spaces import Discrete, MultiDiscrete

    if not isinstance(space, Discrete):
        several = "; a wrapper of yours can number all combinations" if isinstance(space, MultiDiscrete) else ""
        raise UserError(
            f"--env {name} has the action space {space}; this method needs discrete actions, as in CartPole-v1 or "
            f"LunarLander-v3{several}"
        )
    return int(space.n), int(space.start)


def boxed(space: Any, name: str) -> tuple[int, NDArray[np.float32], NDArray[np.float32]]:
    """(numbers in an action, their lower, their upper bounds) of a Box space: A, (A,), (A,)."""
    from gymnasium.spaces import Box

    bounded = isinstance(space, Box) and np.issubdtype(space.dtype, np.floating) and np.prod(space.shape) > 0
    if not bounded or not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UserError(
            f"--env {name} has the action space {space}; this method needs continuous actions between bounds, as in "
            "Pendulum-v1"
        )
    low, high = (np.asarray(end, np.float32).reshape(-1) for end in (space.low, space.high))
    return len(low), low, high


def is_boxed(space: Any) -> bool:
    """Whether actions are continuous."""
    from gymnasium.spaces import Box

    return isinstance(space, Box)


def encoder(space: Any, name: str, images: bool = True) -> tuple[tuple[int, ...], Callable[[Any], NDArray[Any]]]:
    """(shape of one state, function from raw observations (N, …) to fresh arrays (N, *shape)) of a Box or Discrete space.

    Images (uint8 with two or three axes) stay bytes, (C, H, W) with the channels first, and are refused without `images`.
    Everything else becomes one float32 vector, (D,).
    """
    from gymnasium.spaces import Box, Discrete

    if isinstance(space, Discrete):
        size, first = int(space.n), int(space.start)
        afford(f"--env {name} with its {size:,} states as one-hot vectors", 4 * 1000 * size)

        def one_hot(raw: Any) -> NDArray[np.float32]:
            state = np.asarray(raw, dtype=np.int64) - first
            rows = np.zeros((len(state), size), np.float32)
            rows[np.arange(len(state)), state] = 1.0
            return rows

        return (size,), one_hot
    if not isinstance(space, Box):
        raise UserError(
            f"--env {name} has the observation space {space}; Box and Discrete observations are supported, and a function "
            "that wraps it in gymnasium.wrappers.FlattenObservation makes it a Box"
        )
    if len(space.shape) in (2, 3) and space.dtype == np.uint8:
        if not images:
            raise UserError(
                f"--env {name} observes images {space.shape}; image observations are for rl/dqn and rl/ppo, and this method "
                "learns from vectors"
            )
        height, width, last = space.shape if len(space.shape) == 3 else (*space.shape, 1)
        if last <= height:
            return (last, height, width), lambda raw: _channels_first(np.asarray(raw), last)
        return space.shape, lambda raw: np.array(raw)
    size = int(np.prod(space.shape))
    if not size:
        raise UserError(f"--env {name} has the observation space {space}, in which there is nothing to observe")
    return (size,), lambda raw: np.array(raw, dtype=np.float32).reshape(-1, size)


def _channels_first(images: NDArray[Any], channels: int) -> NDArray[Any]:
    """(N, H, W) or (N, H, W, C) → (N, C, H, W), a copy."""
    return np.array(np.moveaxis(images.reshape(*images.shape[:3], channels), -1, 1), order="C")
