"""The contract suite: what every entry of the catalogue must keep. A new method joins by existing.

For each method the `tiny` preset is run offline three times (a seed twice, another seed once) and once killed in the
middle and resumed; all tests of a method share these runs. Nothing here names a method.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import etude
from etude import catalog, cli, data
from etude.core import checkpoint, launch
from etude.core.config import check
from etude.core.errors import UserError
from etude.core.evidence.cards import own_tests as evidence_files
from etude.core.evidence.settings import another
from etude.core.evidence.stage import swapped
from etude.core.longer import length
from etude.core.meanings import meaning
from etude.core.randomness import fold
from etude.core.run import Run
from etude.core.spec import Spec

TINY_SECONDS = 5.0
MOST_FIELDS = 25
LONGEST_TITLE = 80
Undrawn = Callable[[], contextlib.AbstractContextManager[None]]


class Killed(BaseException):
    """What a test raises in the middle of a run, so that nothing gets the chance to tidy up."""


@dataclasses.dataclass
class Watch:
    """What was seen during one run: the steps taken, what was tracked, and which parameters were reached."""

    steps: int = 0
    tracked: dict[str, Any] = dataclasses.field(default_factory=dict)
    reached: dict[str, set[str]] = dataclasses.field(default_factory=dict)


class Case:
    """One method with its tiny runs, each made when the first test asks for it."""

    def __init__(self, entry: catalog.Entry, folder: Path, undrawn: Undrawn) -> None:
        self.entry, self.folder, self.undrawn = entry, folder, undrawn
        self.module: ModuleType = catalog.load_method(entry)
        self.watch = Watch()
        self.seconds: list[float] = []

    def run(self, name: str, seed: int = 0, drawn: bool = False, **common: Any) -> Path:
        """Run the tiny preset offline; on a busy machine its CPU seconds count, if they are fewer."""
        wall, busy = time.perf_counter(), time.process_time()
        with offline(self.folder / "home"), contextlib.nullcontext() if drawn else self.undrawn():
            done = etude.run(
                self.entry.name,
                preset="tiny",
                out=self.folder / name,
                seed=seed,
                threads=1,
                quiet=True,
                device="cpu",
                **common,
            )
        if drawn:
            self.seconds.append(min(time.perf_counter() - wall, time.process_time() - busy))
        return done.folder

    @cached_property
    def first(self) -> Path:
        with watched(self.watch):
            return self.run("first", drawn=True)

    @cached_property
    def other(self) -> Path:
        return self.run("other", seed=1)

    @cached_property
    def resumed(self) -> Path:
        """A run killed in the middle, steps after its last checkpoint and with later metrics on disk; then resumed."""
        assert self.first
        kill_at = self.watch.steps // 2
        with killed_at(kill_at), pytest.raises(Killed):
            self.run("resumed", save_every=max(1, kill_at * 2 // 3))
        with offline(self.folder / "home"), self.undrawn():
            return etude.resume(self.folder / "resumed").folder

    @cached_property
    def built(self) -> dict[str, nn.Module]:
        """What `build` makes from the run's own config and spec, as `etude.load` will, with the weights of seed 0."""
        if not hasattr(self.module, "build"):
            return {}
        described = self.first / "spec.json"
        spec = Spec.from_json(json.loads(described.read_text(encoding="utf-8"))) if described.is_file() else Spec()
        with torch.random.fork_rng():
            torch.manual_seed(fold(0, 0, 0, "init"))
            return self.module.build(self.module.PRESETS["tiny"], spec)


ONLY = os.environ.get("ETUDE_ONLY", "")  # a method, or a room with its slash: the suite for these alone


@pytest.fixture(
    scope="module",
    params=[n for n in catalog.entries() if n == ONLY or (ONLY[-1:] in ("", "/") and n.startswith(ONLY))],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, undrawn: Undrawn) -> Case:
    entry = catalog.find(request.param)
    if entry.missing:
        pytest.skip(f"{entry.name} needs the extra {', '.join(entry.missing)}, which is not installed")
    return Case(entry, tmp_path_factory.mktemp(entry.name.replace("/", "-")), undrawn)


# ---------------------------------------------------------------------------------------------------------- its words


def test_info_is_complete(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The docstring is a contract, the name is the path, and `etude info NAME --json` says all of it."""
    entry = case.entry
    parts = entry.path.relative_to(catalog.PACKAGE).with_suffix("").parts
    assert entry.name == "/".join(parts[:-1] if parts[-1] == "train" else parts)
    assert catalog.loop_of(case.module).etude["name"] == entry.name  # type: ignore[attr-defined]
    assert 0 < len(entry.title) <= LONGEST_TITLE
    assert entry.paper
    assert entry.section
    filled = {heading for heading, text in entry.contract.items() if text.strip()}
    assert filled >= {"claim", "Paper", "Differences", "Expect", "Command"}
    assert filled & {"Equation", "Algorithm"}
    assert cli.main(["info", entry.name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["name"] == entry.name
    assert told["contract"] == entry.contract
    assert [field["name"] for field in told["fields"]] == [
        field.name for field in dataclasses.fields(case.module.Config)
    ]
    assert list(told["presets"]) == list(case.module.PRESETS)


def test_commands_in_the_docstring_parse(case: Case) -> None:
    """Every ``etude run`` of this method that its docstring shows names flags, presets and values that exist."""
    commands = re.findall(rf"`etude run {re.escape(case.entry.name)}([^`]*)`", case.entry.docstring)
    assert commands, f"the docstring of {case.entry.name} shows no `etude run {case.entry.name} …`"
    for words in commands:
        cli.parse_settings(case.entry, case.module, shlex.split(" ".join(words.split())))


def test_settings_are_documented_and_in_range(case: Case) -> None:
    """Config (and Sample) are flat frozen dataclasses; every field has a help text and a default in range."""
    for name in ("Config", "Sample"):
        if not hasattr(case.module, name):
            assert name == "Sample", "a method file defines Config"
            continue
        kind = getattr(case.module, name)
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen, f"{name} is @dataclass(frozen=True)"
        helps = {
            field["name"]: field["help"] for field in catalog.class_fields(ast.parse(inspect.getsource(kind)), name)
        }
        assert list(helps) == [field.name for field in dataclasses.fields(kind)]
        assert [field for field, text in helps.items() if not text] == [], f"fields of {name} without a docstring"
        assert len(helps) <= MOST_FIELDS
        check(kind())
    assert hasattr(case.module, "sample") == hasattr(case.module, "Sample") == case.entry.samples


def test_presets_and_experiments_are_whole(case: Case) -> None:
    """There are tiny and default; every preset is in range; every experiment starts from one and has a bar."""
    presets = case.module.PRESETS
    assert {"tiny", "default"} <= set(presets)
    for name, preset in presets.items():
        assert type(preset) is case.module.Config, name
        check(preset)
        said, default = case.entry.presets[name]["changes"], case.module.Config()
        changed = [f.name for f in dataclasses.fields(preset) if getattr(preset, f.name) != getattr(default, f.name)]
        assert [field for field in changed if f"{field}=" not in said] == [], f"not said of preset {name}"
    experiments = getattr(case.module, "EXPERIMENTS", ())
    assert [e.name for e in experiments] == [e["name"] for e in case.entry.experiments]
    assert len({e.name for e in experiments}) == len(experiments)
    for experiment in experiments:
        assert experiment.preset in presets
        assert experiment.better in ("higher", "lower", "near")
        assert experiment.seeds
        assert math.isfinite(experiment.bar)
        launch.configure(case.module, case.entry, experiment.preset, experiment.flags)


def test_experiments_have_controls(case: Case) -> None:
    """Every bar names a fault or a null that must fail it, written with settings, metrics and functions that exist."""
    experiments = getattr(case.module, "EXPERIMENTS", ())
    assert experiments, "a method without an experiment proves nothing"
    assert [catalog.Experiment.of(values) for values in case.entry.experiments] == list(experiments)
    for experiment in experiments:
        assert experiment.controls, f"experiment '{experiment.name}' has no control"
        assert experiment.better == "near" or not experiment.tolerance, experiment.name
        for control in experiment.controls:
            assert control.flags or control.preset or control.metric or control.swap, (
                f"'{control.name}' changes nothing"
            )
            flags = experiment.flags | control.flags
            launch.configure(case.module, case.entry, control.preset or experiment.preset, flags)
            with swapped(case.entry, control.swap):
                pass


def test_bars_stand_near_what_was_measured(case: Case) -> None:
    """A bar lies within 20 % of the worst seed (of its distance from 1 for a share near 1), or at rounding error."""
    for row in (case.entry.card or {}).get("experiments", []) if case.entry.badge != "stale" else []:
        values = [value for value in row["values"] if value is not None]
        if not values or not row["passed"] or row["better"] == "near":
            continue
        worst, bar = (min if row["better"] == "higher" else max)(values), row["bar"]
        exact = abs(bar) <= 1e-4 or worst == bar or float(worst).is_integer()
        share = 0.5 < bar <= worst <= 1
        scale = min(abs(worst), 1 - worst) if share and worst < 1 else abs(worst)
        assert exact or abs(worst - bar) <= 0.2 * scale + 1e-9, (
            f"'{row['name']}' measured {worst:.4g}, its bar is {bar}"
        )


def test_settings_say_how_they_change(case: Case) -> None:
    """SETTINGS names fields only; for a field whose type does not tell what to change it to there is a line."""
    given = getattr(case.module, "SETTINGS", {})
    hints = typing.get_type_hints(case.module.Config, include_extras=True)
    fields = {field.name for field in dataclasses.fields(case.module.Config)}
    assert given.keys() <= fields
    for name, choice in given.items():
        if isinstance(choice, catalog.Idle):
            assert choice.why
        elif isinstance(choice, dict):
            assert name in choice, f"SETTINGS['{name}'] does not say to what {name} is changed"
            assert choice.keys() <= fields
    for name in fields - given.keys():
        another(getattr(case.module.PRESETS["tiny"], name), hints[name])


def test_its_run_is_proved(case: Case) -> None:
    """Tests hold the loop against a plain one and compute every reported number again: `test_loop_*`, `test_reported_*`."""
    root = catalog.checkout_folder()
    assert root is not None
    files = evidence_files(case.entry, root)
    names = [
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    for beginning in ("test_loop_", "test_reported_"):
        found = any(name.startswith(beginning) for name in names)
        assert found, f"no {beginning}* in {', '.join(path.name for path in files) or 'tests/facts'}"


# ---------------------------------------------------------------------------------------------------------- its runs


def test_tiny_run_leaves_a_whole_folder(case: Case) -> None:
    """The run ends, returns finite numbers under result.json and is marked as done."""
    folder = case.first
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.values())
    assert (folder / "done").is_file()
    assert not (folder / "failed").exists()
    assert (folder / "metrics.jsonl").read_text(encoding="utf-8").count("\n") > 0
    presets = case.module.PRESETS
    for experiment in getattr(case.module, "EXPERIMENTS", ()):
        data = experiment.flags.get("data", getattr(presets[experiment.preset], "data", ""))
        # other data may have a number of their own (BLEU of sentences, not of strings): one with a meaning, and on the card
        card = (case.entry.card or {}).get("experiments", []) if data != getattr(presets["tiny"], "data", "") else []
        measured = [
            row["values"] for row in card if (row["name"], row["metric"]) == (experiment.name, experiment.metric)
        ]
        told = measured and None not in measured[0] and meaning(experiment.metric, case.entry.metrics)
        assert experiment.metric in result or told, (
            f"experiment '{experiment.name}' reads a metric that the run does not return"
        )


def test_returned_numbers_have_a_meaning(case: Case) -> None:
    """METRICS or the shared words say what each number is, in a line."""
    own, result = case.entry.metrics, json.loads((case.first / "result.json").read_text(encoding="utf-8"))
    mute = [name for name in result if not meaning(name, own)]
    assert not mute, f"METRICS in {case.entry.path.name} does not say what these numbers are: {', '.join(mute)}"
    assert all(0 < len(said) <= 125 and not said.endswith(".") for said in own.values())


def test_tiny_run_is_short(case: Case) -> None:
    """Setup, loop and report in at most 5 seconds, torch and the method already imported."""
    assert case.first
    for attempt in range(3):  # on a machine that is busy or slow for a moment
        if min(case.seconds) > TINY_SECONDS:
            case.run(f"try-{attempt}", drawn=True)
    assert min(case.seconds) <= TINY_SECONDS, f"tiny took {min(case.seconds):.1f} s of CPU time at its fastest"


def test_report_is_self_contained(case: Case) -> None:
    """report.html loads nothing from elsewhere, so it opens offline and survives being mailed."""
    text = (case.first / "report.html").read_text(encoding="utf-8")
    assert case.entry.name in text
    loaded = re.findall(
        r"""<(?:img|script|link|iframe|video|source|image)\b[^>]*?\b(?:src|href)\s*=\s*["']?([^"'\s>]+)""", text
    )
    loaded += re.findall(r"""url\(\s*["']?([^"')]+)""", text) + re.findall(r"""@import\s+["']?([^"';]+)""", text)
    assert [address[:80] for address in loaded if not address.startswith(("data:", "#"))] == []


def test_every_parameter_gets_a_gradient(case: Case) -> None:
    """Each trainable parameter of `build` sees a gradient that is not zero; a module moved without gradients must move.

    A module that is meant to stand still (a frozen teacher, a target network) has requires_grad off.
    """
    assert case.first
    for name, module in case.built.items():
        assert name in case.watch.tracked, (
            f"build makes '{name}', but the run does not track it: etude.load cannot fill it"
        )
        trainable = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
        frozen = {k for k, p in case.watch.tracked[name].named_parameters() if not p.requires_grad}
        missed = trainable - frozen - case.watch.reached[name]
        if trainable and missed == trainable - frozen:  # e.g. moved by a rule of its own: then it must have moved
            start, state = module.state_dict(), newest(case.first)[name]
            missed = {key for key in missed if torch.equal(start[key], state[key])}
        assert sorted(missed) == [], f"parameters of '{name}' that no gradient reached"


def test_no_choice_looks_at_the_test_split(case: Case) -> None:
    """With the test part of its data permuted, nothing changes that was logged or learned before test is scored.

    Numbers of the test split are called test_…; a method that examines a network may log what it finds after the last
    step in which the network learned.
    """
    if "data" not in {field.name for field in dataclasses.fields(case.module.Config)}:
        return
    with permuted_tests() as calls:
        other = case.run("permuted")
    if case.module.PRESETS["tiny"].data in data.names():
        assert calls, "the method reads its data by names of its own; take etude.data.images, .text or .characters"
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (case.first, other)]
    examines = "source" in {field.name for field in dataclasses.fields(case.module.Config)}
    kept = [[{k: v for k, v in row.items() if not k.startswith("test_")} for row in part] for part in rows]
    if examines:
        kept = [[row for row in part if row.keys() & {"loss", "train_loss"}] for part in kept]
    assert kept[0] == kept[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (case.first, other)]
    learned = [{k: v for k, v in r.items() if k.startswith(("train_", "validation_"))} for r in results]
    assert learned[0] == learned[1]
    for name, module in case.watch.tracked.items():
        if isinstance(module, (nn.Module, torch.optim.Optimizer)):
            assert same(newest(case.first)[name], newest(other)[name], name) == ""


def test_other_seed_other_numbers(case: Case) -> None:
    """Another seed gives other numbers, unless the docstring says that the method is deterministic."""
    if re.search(r"\bdeterministic\b", case.entry.docstring, re.IGNORECASE):
        agree(case.first, case.other)
    else:
        same = (case.first / "metrics.jsonl").read_bytes() == (case.other / "metrics.jsonl").read_bytes()
        assert not same, "seeds 0 and 1 give equal metrics; if chance has no part, say 'deterministic' in the docstring"


def test_resume_is_bit_exact(case: Case) -> None:
    """Killed in the middle and resumed equals never interrupted: metrics, result, checkpoint, names of the pictures.

    So do two runs with one seed, then, to the last bit.
    """
    assert case.first
    assert case.watch.steps >= 2, "tiny takes at least two steps, so that there is a middle to be killed in"
    agree(case.first, case.resumed)
    sessions = json.loads((case.resumed / "environment.json").read_text(encoding="utf-8"))["sessions"]
    assert len(sessions) == 2
    assert sessions[1]["from_step"] < case.watch.steps, "the second session had nothing left to do"


def test_a_finished_run_can_go_on(case: Case) -> None:
    """A run that has ended takes a greater length, unless its file gives a reason why not; nothing of it has the old one."""
    try:
        name = length(case.entry)
    except UserError:
        return
    described = json.loads((case.first / "config.json").read_text(encoding="utf-8"))["config"]
    whole = shutil.copytree(case.first, case.folder / "longer")
    more = described[name] + max(1, described[name] // 4)
    with offline(case.folder / "home"), case.undrawn():
        if newest(whole)["~run"].get("over"):
            with pytest.raises(UserError, match="ended by itself"):
                etude.resume(whole, **{name: more})
            return
        longer = etude.resume(whole, **{name: more})
    assert longer.metrics
    assert not (whole / "failed").exists()


def test_load_and_sample(case: Case, tmp_path: Path) -> None:
    """`etude.load` gives the trained modules back; `etude sample`, where there is one, draws from them."""
    loaded = etude.load(case.first)
    assert loaded.name == case.entry.name
    assert set(loaded.modules) == set(case.built)
    state = newest(case.first)
    for name, module in loaded.modules.items():
        assert not module.training
        assert same(checkpoint.state_of(module), state[name], name) == ""
    if hasattr(case.module, "sample"):
        with offline(case.folder / "home"):
            text = case.module.sample(loaded, case.module.Sample(), tmp_path)
        assert isinstance(text, str)
        assert text or any(tmp_path.iterdir()) or "print(" in case.entry.source


# ------------------------------------------------------------------------------------------------------- all at once

IMPORTS = """
import contextlib, io, json, os, random, signal, sys, threading, warnings
warnings.simplefilter("error")
import numpy as np, torch
from etude import catalog

def state():
    return {
        "torch threads": torch.get_num_threads(),
        "torch random state": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy random state": hash(str(np.random.get_state())),
        "python random state": hash(random.getstate()),
        "default dtype": str(torch.get_default_dtype()),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "files": sorted(os.listdir()),
        "folder": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("KMP_")},
        "signal handlers": str([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]),
        "threads": threading.active_count(),
    }

opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == "socket.connect" else None)
found = {}
for name, entry in catalog.entries().items():
    if entry.missing:
        continue
    before, said, opened[:] = state(), io.StringIO(), []
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        catalog.load_method(entry)
    after = state()
    found[name] = [key for key in before if before[key] != after[key]]
    found[name] += ["output"] if said.getvalue() else []
    found[name] += ["network"] if opened else []
print(json.dumps(found))
"""


def test_imports_have_no_side_effect(tmp_path: Path) -> None:
    """Importing all methods one by one in a fresh process changes nothing there, prints and writes nothing."""
    environment = os.environ | {"PYTHONPATH": str(catalog.PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert set(found) == {name for name, entry in catalog.entries().items() if not entry.missing}
    assert {name: changed for name, changed in found.items() if changed} == {}
    assert list(tmp_path.iterdir()) == []


def test_there_are_methods() -> None:
    """An empty catalogue would pass everything above."""
    assert len(catalog.entries()) >= 2


# ------------------------------------------------------------------------------------------------------------ helpers


@contextlib.contextmanager
def offline(home: Path) -> Iterator[None]:
    """No datasets, no cache and no network: any connection that leaves the machine is refused."""

    def refuse(self: socket.socket, address: Any) -> Any:
        raise OSError(f"a tiny run reached for the network: {address}")

    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ETUDE_DATA", raising=False)
        patch.setenv("HOME", str(home))
        connect = socket.socket.connect
        local = getattr(socket, "AF_UNIX", None)
        patch.setattr(
            socket.socket, "connect", lambda self, to: connect(self, to) if self.family == local else refuse(self, to)
        )
        patch.setattr(socket, "getaddrinfo", lambda *words, **_: refuse(None, words[0]))  # type: ignore[arg-type]
        yield


@contextlib.contextmanager
def permuted_tests() -> Iterator[list[str]]:
    """Data whose test part has lost its order: labels of images, characters of a text, drawings of few-shot classes.

    Yields the list of the readers called.
    """
    read = {"images": data.images, "text": data.text, "characters": data.characters}
    calls: list[str] = []

    def images(*words: Any, **named: Any) -> Any:
        calls.append("images")
        found = read["images"](*words, **named)
        y = found.test.y[torch.randperm(len(found.test.y), generator=torch.Generator().manual_seed(1))]
        return dataclasses.replace(found, test=data.Split(found.test.x, y))

    def text(*words: Any, **named: Any) -> Any:
        calls.append("text")
        found = read["text"](*words, **named)
        cut = len(found.text) - len(found.text) // 40  # half of the test part
        return dataclasses.replace(found, text=found.text[:cut] + found.text[cut:][::-1])

    def characters(*words: Any, **named: Any) -> Any:
        calls.append("characters")
        found = read["characters"](*words, **named)
        shuffled = dataclasses.replace(found.evaluation, x=found.evaluation.x.flip(0))
        return dataclasses.replace(found, evaluation=shuffled)

    with pytest.MonkeyPatch.context() as patch:
        for name, reader in (("images", images), ("text", text), ("characters", characters)):
            patch.setattr(data, name, reader)
        yield calls


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Count the steps of a run, keep what it tracks, note every parameter that gets a gradient other than zero."""
    steps, track = Run.steps, Run.track

    def counting(self: Run, total: int) -> Iterator[int]:
        with contextlib.closing(steps(self, total)) as inner:  # type: ignore[type-var]
            for step in inner:
                watch.steps += 1
                yield step

    def keeping(self: Run, **objects: Any) -> None:
        for name, thing in objects.items():
            watch.tracked[name] = thing
            if isinstance(thing, nn.Module):
                reached = watch.reached.setdefault(name, set())
                for key, parameter in thing.named_parameters(remove_duplicate=False):
                    if parameter.requires_grad:
                        parameter.register_hook(_noting(reached, key))
        track(self, **objects)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", counting)
        patch.setattr(Run, "track", keeping)
        yield


def _noting(reached: set[str], key: str) -> Callable[[torch.Tensor], None]:
    """A hook that sees both `backward` and `torch.autograd.grad`; once reached, it costs a set lookup."""

    def note(gradient: torch.Tensor) -> None:
        if key not in reached and bool(gradient.any()):
            reached.add(key)

    return note


@contextlib.contextmanager
def killed_at(kill_at: int) -> Iterator[None]:
    """Raise Killed when the run is about to take this step: metrics flushed, no checkpoint written."""
    steps = Run.steps

    def dying(self: Run, total: int) -> Iterator[int]:
        with contextlib.closing(steps(self, total)) as inner:  # type: ignore[type-var]
            for step in inner:
                if step == kill_at:
                    self.flush()
                    raise Killed
                yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", dying)
        yield


def agree(one: Path, two: Path) -> None:
    """Fail unless two run folders hold the same metrics, result, checkpoint and names of artifacts."""
    assert (one / "metrics.jsonl").read_text(encoding="utf-8") == (two / "metrics.jsonl").read_text(encoding="utf-8")
    assert (one / "result.json").read_text(encoding="utf-8") == (two / "result.json").read_text(encoding="utf-8")
    assert same(newest(one), newest(two), "checkpoint") == ""
    names = [sorted(path.name for path in (folder / "artifacts").glob("*")) for folder in (one, two)]
    assert names[0] == names[1]


def newest(folder: Path) -> dict[str, Any]:
    """The state in the newest checkpoint of a run folder, with its step."""
    path = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    return checkpoint.read(path) | {"~step": path.name}


def same(one: Any, two: Any, place: str) -> str:
    """Where two trees of tensors, arrays and plain values first differ (in value, type or shape), or nothing."""
    if type(one) is not type(two):
        return f"{place}: {type(one).__name__} and {type(two).__name__}"
    if isinstance(one, dict):
        if list(one) != list(two):
            return f"{place}: keys {list(one)} and {list(two)}"
        return next(filter(None, (same(one[key], two[key], f"{place}.{key}") for key in one)), "")
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return f"{place}: {len(one)} and {len(two)} items"
        return next(filter(None, (same(a, b, f"{place}.{i}") for i, (a, b) in enumerate(zip(one, two)))), "")
    if isinstance(one, np.ndarray):
        one, two = torch.from_numpy(one), torch.from_numpy(two)
    if isinstance(one, torch.Tensor):
        alike = one.dtype == two.dtype and one.shape == two.shape
        bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one, two)]
        return "" if alike and torch.equal(*bits) else f"{place}: not equal to the last bit"
    equal = one == two or (isinstance(one, float) and math.isnan(one) and math.isnan(two))
    return "" if equal else f"{place}: {one!r} and {two!r}"
