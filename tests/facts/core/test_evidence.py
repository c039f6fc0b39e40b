"""What a card is worth: bars with controls, traces, digests, settings, and where no card may be written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest

from etude import catalog, cli
from etude.catalog import Control, Experiment, Idle
from etude.core import digest
from etude.core.config import Count, Fraction, Positive
from etude.core.errors import UserError
from etude.core.evidence import cards, settings, stage, traces, trials
from etude.core.evidence.stage import Outcome, Part

ENTRY = catalog.find("basics/risk")


def result(**metrics: float) -> Outcome:
    return Outcome(metrics, [{"step": 1.0, "loss": 2.0}], 1.0, 10.0)


def judged(experiment: Experiment, answer: Any) -> dict[str, Any]:
    return trials.try_experiment(ENTRY, experiment, trials.Stage(None, lambda _: None, answer), lambda _: None)


# ------------------------------------------------------------------------------------------------ bars and controls

GAIN = Experiment("gain", preset="default", metric="gain", bar=1.0, controls=(Control("off", flags={"noise": 0.1}),))


@pytest.mark.parametrize(
    ("control", "passes"),
    [
        ((0.1, 0.2, 0.3), True),
        ((0.1, 1.2, 0.3), False),  # one seed of the control clears the bar
        ((None, None, None), True),  # a control whose run fails has failed the bar
    ],
)
def test_an_experiment_fails_when_a_control_clears_its_bar_on_any_seed(control: tuple[Any, ...], passes: bool) -> None:
    def perform(part: Part, _: Path | None) -> Outcome:
        if "noise" in part.flags:
            value = control[part.seed]
            return Outcome(failure="diverged") if value is None else result(gain=value)
        return result(gain=1.5)

    row = judged(GAIN, perform)
    assert row["cleared"] is True
    assert row["controls"][0]["values"] == list(control)
    assert row["controls"][0]["held"] is passes
    assert row["passed"] is passes


def test_a_control_that_cannot_run_proves_nothing() -> None:
    def refuse(part: Part, _: Path | None) -> Outcome:
        return Outcome(failure="--noise is wrong", refused=True) if part.flags else result(gain=1.5)

    row = judged(GAIN, refuse)
    assert row["controls"][0]["broken"] == "--noise is wrong"
    assert not row["passed"]
    absent = dataclasses.replace(GAIN, controls=(Control("null", metric="null"),))
    assert not judged(absent, lambda *_: result(gain=1.5))["passed"]
    assert judged(absent, lambda *_: result(gain=1.5, null=0.0))["passed"]


def test_no_control_no_proof_and_every_seed_counts() -> None:
    assert not judged(dataclasses.replace(GAIN, controls=()), lambda *_: result(gain=1.5))["passed"]
    one_misses = judged(GAIN, lambda part, _: result(gain=0.0 if part.flags or part.seed == 2 else 1.5))
    assert not one_misses["cleared"]
    late = dataclasses.replace(GAIN, within_seconds=0.5)
    assert not judged(late, lambda part, _: result(gain=0.0 if part.flags else 1.5))["passed"]


@pytest.mark.parametrize(
    ("better", "value", "clears"),
    [("higher", 1.0, True), ("higher", 0.9, False), ("lower", 1.0, True), ("lower", 1.1, False)]
    + [("near", 1.2, True), ("near", 0.8, True), ("near", 1.21, False), ("near", 0.79, False)],
)
def test_which_values_clear_a_bar(better: str, value: float, clears: bool) -> None:
    assert Experiment("x", "default", "m", 1.0, better, tolerance=0.2000001).clears(value) is clears


def test_a_run_that_several_bars_read_is_run_once() -> None:
    seen: list[Part] = []

    def perform(part: Part, _: Path | None) -> Outcome:
        seen.append(part)
        return result(gain=1.0, other=2.0)

    shared = trials.Stage(None, lambda _: None, perform)
    for metric in ("gain", "other"):
        trials.try_experiment(ENTRY, Experiment(metric, "default", metric, 0.5), shared, lambda _: None)
    assert len(seen) == 3


def test_a_swap_replaces_a_name_of_the_file_and_puts_it_back() -> None:
    module = catalog.load_method(ENTRY)
    before = module.minimise
    with stage.swapped(ENTRY, {"minimise": "math.sqrt"}):
        assert module.minimise is __import__("math").sqrt
    assert module.minimise is before
    with pytest.raises(UserError, match=r"risk\.py has no 'minimize'"), stage.swapped(ENTRY, {"minimize": "math.sqrt"}):
        pass


def test_a_part_runs_in_a_process_of_its_own_whole_or_its_first_steps() -> None:
    whole = stage.perform(Part("basics/risk", "tiny", 1, {"sizes": [14, 20]}))
    assert whole.failure == ""
    assert whole.memory_mb > 10
    first = stage.perform(Part("basics/risk", "tiny", 1, {"sizes": [14, 20]}, first=2))
    assert first.rows == whole.rows[:2]
    assert first.metrics.keys() == whole.metrics.keys()
    refused = stage.perform(Part("basics/risk", "tiny", 1, {"noise": -1.0}))
    assert refused.refused
    assert "--noise is -1.0" in refused.failure
    crashed = stage.perform(Part("basics/risk", "tiny", 1, swap={"minimise": "math.sqrt"}))
    assert crashed.refused  # a mistake in a control proves nothing about a bar
    assert "TypeError" in crashed.failure
    infinite = stage.perform(Part("basics/risk", "tiny", 1, swap={"minimise": "tests_nulls.nowhere"}))
    assert infinite.refused


# ---------------------------------------------------------------------------------------------------------- traces


def test_a_trace_tells_a_changed_number_from_rounding() -> None:
    one = Outcome({"accuracy": 0.5}, [{"step": float(n), "loss": 1 / (n + 1)} for n in range(40)])
    kept = traces.trace(one, 8)
    assert len(kept["rows"]) == traces.KEPT + 1
    assert traces.difference(kept, json.loads(json.dumps(kept))) == ""
    other = dataclasses.replace(one, rows=[row | {"loss": row["loss"] * (1 + 1e-8)} for row in one.rows])
    assert traces.difference(kept, traces.trace(other, 8)) == ""
    other = dataclasses.replace(one, rows=[*one.rows[:3], {"step": 3.0, "loss": 0.2501}, *one.rows[4:]])
    assert traces.difference(kept, traces.trace(other, 8)) == "loss at step 3 is 0.2501, it was 0.25"
    assert "accuracy is 0.6" in traces.difference(
        kept, traces.trace(dataclasses.replace(one, metrics={"accuracy": 0.6}), 8)
    )
    assert "39 rows" in traces.difference(kept, traces.trace(dataclasses.replace(one, rows=one.rows[1:]), 8))
    assert "names differ: error" in traces.difference(
        kept, traces.trace(dataclasses.replace(one, metrics={"accuracy": 0.5, "error": 0.5}), 8)
    )


@pytest.mark.parametrize(
    ("whole", "start", "elsewhere", "said"),
    [
        (1.5, 0.2, False, ""),
        (1.6, 0.2, False, "gain is 1.6, it was 1.5"),
        (1.6, 0.2, True, ""),  # another processor rounds in another order: the first steps decide
        (1.6, 0.3, True, "gain is 1.6, it was 1.5 (the card was made on another processor)"),
        (1.5, 0.3, True, ""),
    ],
)
def test_on_another_processor_the_first_steps_of_a_whole_trace_decide(
    whole: float, start: float, elsewhere: bool, said: str
) -> None:
    played = {0: 1.5, traces.FIRST: 0.2}
    stage = trials.Stage(None, lambda _: None, lambda part, _: result(gain=played[part.first]))
    (name,), kept = traces.record(ENTRY, [GAIN], stage)
    played |= {0: whole, traces.FIRST: start}
    stage = trials.Stage(None, lambda _: None, lambda part, _: result(gain=played[part.first]))
    found, made = traces.again(ENTRY, GAIN, kept[name], stage, elsewhere)
    assert found == said
    if not said:
        assert made == kept[name]


# ---------------------------------------------------------------------------------------------------------- digests


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of four files with the digests' view of it."""
    files = {
        "room/method.py": '"""Doc."""\nfrom etude.blocks import part\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n',
        "blocks/part.py": "from etude.data.deep import (\n    g,\n)\n",
        "data/deep.py": "g = 1\n",
        "blocks/apart.py": "h = 1\n",
        "core/randomness.py": "r = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(digest, "PACKAGE", tmp_path)
    monkeypatch.setattr(digest, "_ALWAYS", tmp_path / "core" / "randomness.py")
    return tmp_path


def fresh(path: Path) -> digest.Digest:
    digest._read.cache_clear()
    digest._code.cache_clear()
    return digest.digest(path)


def test_a_digest_sees_what_runs_and_nothing_else(package: Path) -> None:
    path = package / "room" / "method.py"
    before = fresh(path)
    source = path.read_text()
    path.write_text(source.replace("Doc.", "Other words.") + "# a comment\nEXPERIMENTS = (1,)\nSETTINGS = {}\n")
    after = fresh(path)
    assert after.code == before.code
    assert after.files != before.files
    (package / "blocks" / "apart.py").write_text("h = 2\n")  # not imported
    assert fresh(path) == after
    for name, text in (("room/method.py", source.replace("x + 1", "x + 2")), ("data/deep.py", "g = 2\n")):
        kept = (package / name).read_text()
        (package / name).write_text(text)
        assert fresh(path).code != before.code, name
        (package / name).write_text(kept)
    assert fresh(path).code == before.code


def test_every_method_is_made_of_its_file_and_what_it_imports() -> None:
    files = {path.relative_to(catalog.PACKAGE).as_posix() for path in digest.sources(catalog.find("vision/lenet").path)}
    assert {"vision/lenet.py", "data/__init__.py", "data/idx.py", "optim/adam.py", "core/randomness.py"} <= files
    assert not any(name.startswith(("core/run", "cli/", "rl/")) for name in files)
    assert catalog.find("vision/lenet").path in digest.sources(catalog.find("insight/saliency").path)


# -------------------------------------------------------------------------------------------------- stale, renewed


@pytest.fixture
def carded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A method with a card, in a results folder of its own, whose runs and sweep are played."""
    monkeypatch.setenv("ETUDE_RESULTS", str(tmp_path))
    monkeypatch.setattr(cards, "_may_write", lambda: None)
    monkeypatch.setattr(cards, "_oracle", lambda entry: {"file": "x", "tests": 3, "passed": True})
    monkeypatch.setattr(cards, "check_settings", lambda entry: {"noise": {"to": "", "state": "matters", "why": ""}})
    played = {"gain": 1.5, "off": 0.0}

    def perform(part: Part, _: Path | None) -> Outcome:
        return result(gain=played["off" if part.flags else "gain"])

    stage_of = trials.Stage
    monkeypatch.setattr(cards, "Stage", lambda keep, say: stage_of(keep, say, perform))
    asked = {"experiments": [dataclasses.asdict(GAIN)]}
    monkeypatch.setattr(catalog.Entry, "experiments", property(lambda self: asked["experiments"]))
    return played, asked


def test_others_on_the_same_cpu_do_not_count() -> None:
    """Wall seconds, or what the threads were busy for where that is less; a GPU's host waits on purpose."""
    session = {"loop_seconds": 10.0, "loop_cpu_seconds": 12.0, "threads": 2, "device": "cpu"}
    assert stage._spent(session) == 6.0
    assert stage._spent(session | {"loop_cpu_seconds": 30.0}) == 10.0
    assert stage._spent(session | {"device": "cuda:0"}) == 10.0
    del session["loop_cpu_seconds"]
    assert stage._spent(session) == 10.0


def test_a_card_goes_stale_and_is_renewed_by_its_traces(carded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    played, _ = carded
    assert ENTRY.badge == "unproved"
    assert cards.verify(ENTRY)["badge"] == "verified"
    assert ENTRY.badge == "verified"
    monkeypatch.setattr(catalog, "files_digest", lambda path: "other bytes")
    assert ENTRY.badge == "verified"  # other bytes, the same code
    monkeypatch.setattr(catalog, "digest", lambda path: digest.Digest("other code", "other bytes"))
    assert ENTRY.badge == "stale"
    monkeypatch.setattr(cards, "digest", lambda path: digest.Digest("other code", "other bytes"))
    played["gain"] = 1.6
    card, said = cards.replay(ENTRY)
    assert card is None
    assert said == "the trace of 'gain' differs: gain is 1.6, it was 1.5; it wants: etude verify basics/risk"
    assert ENTRY.badge == "stale"
    played["gain"] = 1.5
    card, said = cards.replay(ENTRY)
    assert card is not None
    assert card["badge"] == "verified"
    assert card["replayed"]["written"]
    assert ENTRY.badge == "verified"


def test_a_halved_bar_is_seen_and_recorded_values_are_held_against_it(
    carded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, asked = carded
    cards.verify(ENTRY)
    monkeypatch.setattr(catalog, "files_digest", lambda path: "other bytes")
    asked["experiments"] = [dataclasses.asdict(dataclasses.replace(GAIN, bar=2.0))]
    assert ENTRY.badge == "stale"
    card, _ = cards.replay(ENTRY)
    assert card is not None
    assert card["badge"] == "runs"
    asked["experiments"] = [dataclasses.asdict(dataclasses.replace(GAIN, seeds=(0,)))]
    assert cards.replay(ENTRY)[0] is None


def test_only_a_control_that_is_new_runs_again(carded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    played, asked = carded
    cards.verify(ENTRY)
    monkeypatch.setattr(catalog, "files_digest", lambda path: "other bytes")
    new = catalog.Control("another null", flags={"noise": 0.5})
    asked["experiments"] = [dataclasses.asdict(dataclasses.replace(GAIN, controls=(*GAIN.controls, new)))]
    played["off"] = 7.0  # what a control returns if it is run now
    card, _ = cards.replay(ENTRY)
    assert card is not None
    before, after = (control["values"] for control in card["experiments"][0]["controls"])
    assert before == [0.0] * len(GAIN.seeds)
    assert after == [7.0] * len(GAIN.seeds)
    assert card["badge"] == "runs"  # a control that clears the bar


def test_a_setting_that_does_nothing_costs_the_badge(carded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for state, badge in (("nothing", "runs"), ("refused", "runs"), ("idle", "verified")):
        rows = {"noise": {"to": "", "state": state, "why": ""}}
        monkeypatch.setattr(cards, "check_settings", lambda entry, rows=rows: rows)
        assert cards.verify(ENTRY)["badge"] == badge


def test_no_card_from_a_changed_checkout_nor_over_a_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    monkeypatch.setattr(catalog, "checkout_folder", lambda: tmp_path)
    cards._may_write()
    (tmp_path / "src" / "a.py").write_text("a = 2\n")
    with pytest.raises(UserError, match=r"src/a\.py is changed and not committed"):
        cards._may_write()
    monkeypatch.setattr(catalog, "checkout_folder", lambda: None)
    monkeypatch.delenv("ETUDE_RESULTS", raising=False)
    with pytest.raises(UserError, match="set ETUDE_RESULTS"):
        cards._may_write()
    monkeypatch.setenv("ETUDE_RESULTS", str(tmp_path))
    cards._may_write()


def test_a_file_of_ones_own_has_no_card(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(ENTRY.source)
    own = catalog.find(str(path))
    assert own.own
    assert own.card is None
    assert own.badge == "unproved"


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("value", "hint", "other"),
    [
        (True, bool, False),
        ("a", Literal["a", "b"], "b"),
        ("b", Literal["a", "b"], "a"),
        (3, Count, 4),
        (0.5, Positive, 0.25),
        (0.0, Fraction, 0.25),
        ((1, 2), tuple[Count, ...], (1,)),
        ((4,), tuple[Count, ...], (5,)),
        (None, Count | None, 1),
        (None, Positive | None, 0.5),
        (7, Count | None, 8),
    ],
)
def test_another_value_of_a_type(value: Any, hint: Any, other: Any) -> None:
    assert settings.another(value, hint) == other


def test_text_has_no_other_value() -> None:
    with pytest.raises(ValueError, match="SETTINGS must say to what 'digits' is changed"):
        settings.another("digits", str)


def test_the_sweep_finds_a_setting_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of basics/risk every field matters but the correlation; with the noise taken out of the problem, `noise` is found out."""
    monkeypatch.setattr(settings, "_common", lambda entry, before: {})
    whole = settings.sweep(ENTRY)
    assert {name for name, row in whole.items() if row["state"] == "matters"} >= {"noise", "features", "datasets"}
    module = catalog.load_method(ENTRY)
    plain = module.problem
    monkeypatch.setattr(module, "problem", lambda d, noise, c, stream: plain(d, 0.5, c, stream))
    monkeypatch.setattr(
        module, "parabolas_figure", lambda stream, noise: __import__("PIL.Image").Image.new("L", (1, 1))
    )
    others = {field.name: Idle("seen above") for field in dataclasses.fields(module.Config) if field.name != "noise"}
    monkeypatch.setattr(module, "SETTINGS", others, raising=False)
    assert settings.sweep(ENTRY)["noise"]["state"] == "nothing"


@pytest.mark.parametrize(
    ("one", "two", "state"),
    [
        (b'{"step": 1, "loss": 0.25}\n{"step": 2, "loss": 0.125}\n', b'{"step": 1, "loss": 0.25}\n', "matters"),
        (b'{"step": 1, "loss": 0.25}\n', b'{"step": 1, "loss": 0.2500000000000003}\n', "nothing"),
        (b'{"step": 1, "loss": 0.25}\n', b'{"step": 1, "loss": 0.2500001}\n', "matters"),
        (b'{"step": 1, "loss": 0.25}\n', b'{"step": 1, "error": 0.25}\n', "matters"),
        (b'{"step": 1}\n', b'{"step": 2}\n', "matters"),
        (b'{\n "rows": [1.5, NaN, "a"]\n}\n', b'{\n "rows": [1.500000000000001, NaN, "a"]\n}\n', "nothing"),
        (b'{\n "rows": [1.5, NaN, "a"]\n}\n', b'{\n "rows": [1.5, 2.0, "a"]\n}\n', "matters"),
        (b"\x89PNG\r\n1", b"\x89PNG\r\n2", "matters"),
        (b"words", b"other words", "matters"),
        (b"words", None, "matters"),
    ],
)
def test_rounding_is_no_difference(one: bytes, two: bytes | None, state: str) -> None:
    """A setting that only changes the order of sums changes last digits, and that is nothing."""
    after = {} if two is None else {"left": two}
    assert settings._verdict({"noise": 2.0}, {"left": one}, after)["state"] == state


def test_files_of_tests_belong_to_the_longest_name() -> None:
    root = catalog.checkout_folder()
    assert root is not None
    names = {
        name: [p.name for p in cards.own_tests(catalog.find(f"gans/{name}"), root)]
        for name in ("gan", "wgan", "wgan_gp")
    }
    assert "test_gan.py" in names["gan"]
    assert "test_wgan_gp.py" not in names["wgan"]
    assert "test_wgan_gp.py" in names["wgan_gp"]


def test_verify_says_how_it_went(carded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "basics/risk", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert card["experiments"][0]["controls"][0] | {"command": ""} == {
        "name": "off",
        "command": "",
        "metric": "gain",
        "swap": {},
        "values": [0.0, 0.0, 0.0],
        "broken": "",
        "held": True,
    }
    assert cli.main(["verify", "basics/risk", "--replay"]) == 0
