"""An environment of one's own: by file, by module, by object; what is wrong with it is said with its place."""

import os
import sys

import gymnasium
import numpy as np
import pytest

import etude
from etude.blocks.acting.environments import Environment, environment, spot
from etude.blocks.acting.episodes import film, play
from etude.blocks.acting.guard import Guard
from etude.blocks.acting.worlds import Worlds
from etude.core.errors import RunError, UserError

SOURCE = '''\
import gymnasium
import numpy as np
from gymnasium import spaces


class Walk(gymnasium.Env):
    """Five places in a row; walking off at the right pays 1."""

    observation_space = spaces.Discrete(5)
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(5))
        return self.place, {}

    def step(self, action):
        self.place += 1 if action else -1
        over = self.place == 5
        self.place = min(max(self.place, 0), 4)
        return self.place, float(over), over, False, {}

    def render(self):
        return np.full((4, 6, 3), 50 * self.place, np.uint8)


def build(render_mode=None):
    return Walk(render_mode)


WALK = Walk()
NUMBER = 7
'''
DQN = {"steps": 64, "worlds": 2, "collect": 16, "updates": 2, "batch": 4, "learning_starts": 16, "widths": (4,)}
DQN |= {"evaluate_every": 0, "evaluation_episodes": 1, "final_episodes": 1, "quiet": True, "seed": 1}
TABLE = {"episodes": 200, "log_every": 50, "evaluate_every": 0, "max_episode_steps": 30, "quiet": True, "seed": 1}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with walk.py in it."""
    (tmp_path / "walk.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    yield tmp_path
    forget()


def forget():
    """As a new process would know none of it."""
    for name in ("walk", "etude_user_walk", "registers"):
        sys.modules.pop(name, None)
    gymnasium.registry.pop("MyWalk-v0", None)


def walk():
    scope = {}
    exec(SOURCE, scope)
    return scope["Walk"]


def test_file_module_class_function_and_object_are_the_same_world(here):
    (here / "registers.py").write_text(
        "import gymnasium\nfrom walk import Walk\ngymnasium.register('MyWalk-v0', entry_point=Walk)\n"
    )
    names = ("walk.py:Walk", "./walk.py:build", f"{here}/walk.py:WALK", "registers:MyWalk-v0")
    named = [environment(name) for name in names]
    assert "" not in sys.path
    assert str(here) not in sys.path
    given = [environment("x", thing) for thing in (walk(), lambda render_mode=None: walk()(render_mode), walk()())]
    for kind in (*named, *given):
        assert kind.own
        assert kind.note == ""
        assert kind.limit() == 1000
        worlds = Worlds.make(kind, 3, seed=2)
        assert worlds.observation.shape == (3, 5)
        seen = [worlds.step(np.array([1, 0, 1])) for _ in range(6)]
        if kind is named[0]:
            first = seen
        for row, other in zip(seen, first):
            for column, expected in zip(row, other):
                np.testing.assert_array_equal(column, expected)
        right = play(kind, lambda state: np.ones(len(state), int), 4, seed=0)
        assert right.tolist() == [1.0] * 4
        half = play(kind, lambda state: np.ones(len(state), int), 4, seed=0, gamma=0.5)
        assert set(half) <= {0.5**t for t in range(5)}


@pytest.mark.parametrize(("method", "settings"), [("rl/dqn", DQN), ("rl/q_learning", TABLE)])
def test_both_methods_run_in_it_and_agree_however_it_was_named(method, settings, here):
    runs = {"file": "walk.py:Walk", "class": walk(), "object": walk()()}
    done = {name: etude.run(method, env=env, out=here / name, **settings) for name, env in runs.items()}
    rows = [(run.folder / "metrics.jsonl").read_text() for run in done.values()]
    assert rows[0] == rows[1] == rows[2]
    assert (here / "class" / "artifacts" / "episode.gif").is_file()
    assert "cannot be drawn" in (here / "object" / "artifacts" / "episode.txt").read_text()
    if method == "rl/q_learning":
        assert done["file"].metrics["greedy_return"] == 1.0
    # the networks can be loaded without the world
    assert etude.load(done["object"].folder).spec.extra["actions"] == 2


def _unfinish(folder):
    """As if the run had been killed before its first checkpoint."""
    for name in ("done", "result.json"):
        (folder / name).unlink()


def test_a_run_in_an_object_cannot_be_resumed_and_says_so(here):
    run = etude.run("rl/q_learning", env=walk(), out=here / "run", **TABLE)
    _unfinish(run.folder)
    with pytest.raises(UserError, match=r"acts in the environment object Walk, which ended with its Python session"):
        etude.resume(run.folder)


@pytest.mark.parametrize("env", ["walk.py:Walk", "registers:MyWalk-v0"])
def test_a_resumed_run_does_not_execute_a_file_that_its_folder_names(env, here):
    registers = (
        SOURCE + "\ngymnasium.register('MyWalk-v0', entry_point=Walk)\n"
    )  # what it imports from here wants trust
    (here / "registers.py").write_text(registers)
    run = etude.run("rl/q_learning", env=env, out=here / "run", **TABLE)
    _unfinish(run.folder)
    name = env.partition(":")[0].removesuffix(".py") + ".py"
    for file in ("walk.py", "registers.py"):
        (here / file).write_text("raise SystemExit('it was run')")
    for module in ("walk", "registers", "etude_user_walk"):
        sys.modules.pop(module, None)
    with pytest.raises(UserError, match=rf"the environment file {here / name} \(.*would be run"):
        etude.resume(run.folder)
    (here / "walk.py").write_text(SOURCE)  # the very code that has been run here before
    (here / "registers.py").write_text(registers)
    forget()
    assert etude.resume(run.folder).metrics == run.metrics
    changed = (here / name).read_text() + "\n"
    (here / name).write_text(changed)
    _unfinish(run.folder)
    forget()
    with pytest.raises(UserError, match="--trust"):
        etude.resume(run.folder)
    assert etude.resume(run.folder, trust=True).metrics == run.metrics


def test_an_expert_s_folder_does_not_make_its_world_trusted(here):
    run = etude.run("rl/dqn", env="CartPole-v1", out=here / "run", **DQN)
    (here / "evil.py").write_text("from pathlib import Path\nPath('mark').touch()\n")
    for file in ("spec.json", "config.json"):
        text = (run.folder / file).read_text()
        (run.folder / file).write_text(text.replace("CartPole-v1", f"{here}/evil.py:X"))
        for method in ("imitation/dagger", "imitation/behaviour_cloning"):
            with pytest.raises(UserError, match=r"the environment file .*evil.py \(.*would be run"):
                etude.run(method, preset="tiny", expert=str(run.folder), quiet=True)
    assert not (here / "mark").exists()
    assert not (here / "cache").exists()


BROKEN = {
    "observation": ("return self.place, float(over)", "return [self.place, 0], float(over)", "observes the shape"),
    "outside": ("min(max(self.place, 0), 4)", "7", "step observes 7, which is not in its space Discrete"),
    "four": ("over, False, {}", "over, {}", r"step must return \(observation, reward.*a tuple of 4"),
    "reset": ("return self.place, {}", "return self.place", r"reset must return \(observation, info\), it returns one int"),
    "reward": ("float(over), over", "float('nan'), over", "step gives the reward nan"),
    "words": ("float(over), over", "'much', over", "step gives the reward 'much'"),
    "seed": ("def reset(self, *, seed=None, options=None):\n        super().reset(seed=seed)", "def reset(self):\n        pass", "its reset takes no seed and no options"),
    "options": ("seed=None, options=None", "seed=None", "its reset takes no options"),
    "step": ("self.place += 1", "self.place //= 0", r"failed in step: broken.py, line 22: ZeroDivisionError"),
    "begin": ("self.place = int(", "self.place = in_t(", r"failed in reset: broken.py, line 18: NameError"),
    "make": ("self.render_mode = render_mode", "self.x = [][0]", "cannot be made: broken.py, line 14: IndexError"),
    "import": ("WALK = Walk()", "WALK = Walk(", r"the file cannot be used: .*broken.py, line 3\d: SyntaxError"),
    "run": ("WALK = Walk()", "WALK = 1 / 0", r"the file cannot be used: broken.py, line 35: ZeroDivisionError"),
    "action": ("action_space = spaces.Discrete(2)", "", "has no action_space"),
    "continuous": ("spaces.Discrete(2)", "spaces.Box(-1, 1)", "needs discrete actions"),
    "dictionary": ("spaces.Discrete(5)", "spaces.Dict({})", "Box and Discrete observations are supported"),
    "kind": ("class Walk(gymnasium.Env)", "class Walk", "gives a Walk, which is not a gymnasium.Env"),
    "exit": ("self.place += 1 if action else -1", "raise SystemExit(3)", "failed in step: broken.py, line 22: SystemExit: 3"),
    "nothing": ("spaces.Discrete(5)", "spaces.Box(-1, 1, (0,))", "in which there is nothing to observe"),
    "huge": ("float(over), over", "1e308, over", "step gives the reward 1e[+]308"),
    "package": ("import numpy as np", "import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["rl/dqn", "rl/q_learning"])
@pytest.mark.parametrize("what", BROKEN)
def test_mistakes_in_it_are_answered_in_one_sentence_before_a_folder_is_left(what, method, here):
    before, after, sentence = BROKEN[what]
    text = SOURCE.replace("WALK = Walk()", "WALK = None") if what == "make" else SOURCE
    text = text.replace("super().reset(seed=seed)", "") if what == "kind" else text
    assert before in text
    (here / "broken.py").write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=sentence) as caught:
        etude.run(method, env="broken.py:Walk", out=here / "run", quiet=True)
    assert "--env broken.py:Walk" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ("walk.py", r"name the environment class in it too, as in walk.py:MyEnv"),
        ("walk.py:Wolk", r"walk.py has no 'Wolk'; did you mean 'Walk'"),
        ("wilk.py:Walk", r"there is no file wilk.py"),
        ("walk.py:NUMBER", r"has the type int; it must be an environment class, a function"),
        ("nothing:MyWalk-v0", "the module 'nothing' cannot be imported"),
        ("walk:MyWalk-v0", "is not a registered Gymnasium environment"),
    ],
)
def test_wrong_names_are_answered(env, sentence, here):
    with pytest.raises(UserError, match=sentence):
        environment(env)


@pytest.mark.parametrize(("method", "settings"), [("rl/dqn", DQN), ("rl/q_learning", TABLE)])
def test_what_breaks_later_fails_the_run_with_its_place(method, settings, here):
    late = SOURCE.replace(
        "self.place += 1", "self.age = getattr(self, 'age', 0) + 1; 1 // (self.age < 9); self.place += 1"
    )
    (here / "late.py").write_text(late)
    with pytest.raises(RunError, match=r"--env late.py:Walk failed in step: late.py, line 22: ZeroDivisionError"):
        etude.run(method, env="late.py:Walk", out=here / "run", **settings)
    assert "late.py, line 22" in (here / "run" / "failed").read_text()


def test_one_that_does_not_repeat_is_run_with_a_warning(here, capsys):
    (here / "walk.py").write_text(
        SOURCE.replace("self.np_random.integers(5)", "np.random.default_rng().integers(10**9) % 5")
    )
    notes = {environment("walk.py:Walk").note for _ in range(20)}
    sentence = "walk.py:Walk does not begin alike from equal seeds, so two runs with one seed will differ"
    assert notes == {"", sentence}  # one time in five the places are equal by chance
    (here / "walk.py").write_text(SOURCE.replace("spaces.Discrete(5)", "spaces.Box(0, 9, (1,))").replace(
        "return self.place, {}", "return np.random.random(1), {}").replace("return self.place, f", "return [0], f"))  # fmt: skip
    etude.run("rl/dqn", env="walk.py:Walk", out=here / "run", **DQN | {"quiet": False})
    assert sentence in capsys.readouterr().err
    assert sentence in (here / "run" / "artifacts" / "environment.txt").read_text()


def test_a_guard_holds_no_state_so_an_own_world_continues_exactly(here):
    (here / "walk.py").write_text(
        SOURCE
        + "\n\nclass Saved(Walk):\n    def state_dict(self):\n        return {'place': self.place}\n\n"
        + "    def load_state_dict(self, state):\n        self.place = state['place']\n"
    )
    kind = environment("walk.py:Saved")
    worlds, again = Worlds.make(kind, 2, seed=3), Worlds.make(kind, 2, seed=4)
    assert isinstance(worlds.env.envs[0], Guard)
    actions = np.random.default_rng(0).integers(0, 2, (40, 2))
    for action in actions[:15]:
        worlds.step(action)
    again.load_state_dict(worlds.state_dict())
    assert again.note == ""
    for action in actions[15:]:
        for ours, theirs in zip(worlds.step(action), again.step(action)):
            np.testing.assert_array_equal(ours, theirs)


def test_the_place_of_a_mistake_is_the_last_line_that_is_not_a_library(here):
    (here / "deep.py").write_text("import numpy as np\n\ndef f():\n    return np.zeros(3).reshape(2)\n")
    scope = {}
    exec(compile((here / "deep.py").read_text(), str(here / "deep.py"), "exec"), scope)
    with pytest.raises(ValueError, match="cannot reshape") as caught:
        scope["f"]()
    assert spot(caught.value).startswith("deep.py, line 4: ValueError: cannot reshape")
    assert os.sep not in spot(KeyError())


def test_a_film_that_breaks_says_why_and_nothing_is_raised():
    class Dark(walk()):
        def render(self):
            if self.place == 4:
                raise OSError("no light")
            return super().render()

    kind = Environment("Dark", Dark, own=True)
    pictures, _, reason = film(kind, lambda state: np.ones(len(state), int), seed=0)
    assert pictures == []
    assert "Dark cannot be drawn here" in reason
    assert "OSError: no light" in reason


def test_what_no_memory_could_hold_is_refused_with_its_bytes(tmp_path):
    class Wide(walk()):
        observation_space = gymnasium.spaces.Discrete(10**12)

    for method in ("rl/dqn", "rl/q_learning"):
        with pytest.raises(
            UserError, match=r"with its 1,000,000,000,000 states as one-hot vectors would take 4 PB of memory"
        ):
            etude.run(method, env=Wide, out=tmp_path / "run", quiet=True)
    for settings, sentence in (
        (
            {"buffer": 10**12, "steps": 10**12},
            r"a replay buffer of 1,000,000,000,000 transitions \(--buffer\) would take \d+ TB",
        ),
        ({"updates": 10**10}, r"640,000,000,000 transitions a round \(--updates times --batch\) would take .* PB"),
        ({"batch": 10**15}, r"would take .* PB of memory, and this machine has"),
        ({"widths": (10**7, 10**7)}, r"a network of 100,000,\d+,\d+,\d+ parameters \(--widths\) would take 2.4 PB"),
        ({"worlds": 10**6}, "--worlds is 1000000; it must be a whole number between 1 and 10000"),
        ({"final_episodes": 10**9}, "--final-episodes is 1000000000"),
    ):
        with pytest.raises(UserError, match=sentence):
            etude.run("rl/dqn", out=tmp_path / "run", quiet=True, **settings)
    assert not (tmp_path / "run").exists()
    for settings in ({"log_every": 10**9}, {"max_episode_steps": 10**18}, {"evaluation_episodes": 10**9}):
        with pytest.raises(UserError, match="it must be a whole number between 1 and"):
            etude.run("rl/q_learning", out=tmp_path / "run", quiet=True, **settings)
