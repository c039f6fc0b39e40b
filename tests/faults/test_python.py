"""The Python interface does what the command line does: run, load, resume, and the same refusals as exceptions."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import etude
from etude.core.checkpoint import Box
from etude.core.errors import RunError, UserError
from etude.core.run import Common, Run
from etude.core.spec import Spec

PIECE = str(Path(__file__).with_name("piece.py"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def run(**settings):
    return etude.run(PIECE, **{"quiet": True, **settings})


def test_run_and_load(tmp_path, capfd) -> None:
    threads, handlers = (
        torch.get_num_threads(),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    )
    done = run(steps=12, seed=3)
    (done.folder / "artifacts" / "config.json").write_text("{}")  # an artifact of that name makes no run
    assert done.folder.parent == tmp_path / "runs" / "mine" / "piece"
    assert done.metrics == json.loads((done.folder / "result.json").read_text())
    assert torch.get_num_threads() == threads
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    for text in (done.folder, str(done.folder), "latest", "mine/piece"):
        loaded = etude.load(text)
        assert (loaded.name, loaded.step, loaded.folder) == ("mine/piece", 12, done.folder)
        assert loaded.config.steps == 12
        assert loaded.spec == Spec(shape=(4,), extra={"pid": 0})
        saved = load_file(done.folder / "checkpoints" / "step-000000012" / "tensors.safetensors")
        assert not loaded.model.training
        assert list(loaded.modules) == ["model"]
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(value, saved[f"model.{name}"])
        assert list(loaded.state) == ["optimizer", "box"]
        assert loaded.state["box"]["history"] == list(range(12))
        assert loaded.state["box"]["keyed"] == {(1, 2): 0.5}
    # the weights really are the trained ones: they give the returned loss
    with torch.no_grad():
        assert float((loaded.model(torch.ones(1, 4)) - 4).square()) == done.metrics["test_loss"]
    assert capfd.readouterr() == ("", "")


def test_command_line_and_python_agree() -> None:
    one = run(steps=12, widths=[5, 6], dropout=0)
    from etude import cli

    assert (
        cli.main(["run", PIECE, "--quiet", "--steps", "12", "--widths", "5", "6", "--dropout", "0", "--out", "line"])
        == 0
    )
    for name in ("metrics.jsonl", "result.json", "checkpoints/step-000000012/tensors.safetensors"):
        assert (one.folder / name).read_bytes() == Path("line", name).read_bytes()
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (one.folder, Path("line")))
    assert {**first, "config": None} == {**second, "config": None}
    assert first["config"] == second["config"]
    assert first["command"] == f"etude run {shlex.quote(str(PIECE))} --steps 12 --dropout 0.0 --widths 5 6 --quiet"


def test_same_seed_agrees_and_two_seeds_differ() -> None:
    one, two, other = run(steps=8), run(steps=8), run(steps=8, seed=1)
    assert one.folder != two.folder  # even within the same second
    read = lambda done: [(done.folder / name).read_bytes() for name in ("metrics.jsonl", "result.json")]  # noqa: E731
    assert read(one) == read(two)
    noise = [[json.loads(line).get("noise") for line in read(done)[0].splitlines()[1:-1]] for done in (one, other)]
    assert not set(noise[0]) & set(noise[1])
    assert one.metrics["test_loss"] != other.metrics["test_loss"]


def test_resume_goes_on_and_a_finished_run_is_returned() -> None:
    whole = run(steps=30, save_every=10)
    with pytest.raises(ZeroDivisionError):
        run(steps=30, save_every=10, fault="error", at=17, out="broken")
    config = json.loads(Path("broken/config.json").read_text())
    config["config"]["fault"] = "none"
    Path("broken/config.json").write_text(json.dumps(config))
    assert etude.load("broken").step == 10
    done = etude.resume("broken")
    assert done.metrics == whole.metrics
    assert (Path("broken") / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    changed = (whole.folder / "report.html").stat().st_mtime_ns
    assert etude.resume(whole.folder) == whole
    assert (whole.folder / "report.html").stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"preset": "tinny"}, "mine/piece has no preset 'tinny'; did you mean 'tiny'?"),
        ({"stesp": 3}, "mine/piece has no setting 'stesp'; did you mean 'steps'?"),
        ({"sed": 3}, "mine/piece has no setting 'sed'; did you mean 'seed'?"),
        ({"presett": "tiny"}, "mine/piece has no setting 'presett'; did you mean 'preset'?"),
        ({"steps": 0}, "--steps is 0; it must be a whole number at least 1"),
        ({"steps": "3"}, "--steps is '3'; it must be a whole number at least 1"),
        ({"dropout": float("nan")}, "--dropout is nan; it must be a number between 0 and 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"device": "tpu"}, "--device tpu cannot be used here"),
        ({"shard": True}, "--shard needs several ranks"),
    ],
)
def test_wrong_input_is_a_user_error_and_leaves_nothing(tmp_path, settings, sentence) -> None:
    with pytest.raises(UserError) as caught:
        run(**settings)
    assert str(caught.value).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_names_of_runs_and_methods_that_are_not() -> None:
    with pytest.raises(UserError, match="did you mean 'vision/lenet'"):
        etude.run("vision/lenett")
    for verb in (etude.load, etude.resume):
        with pytest.raises(UserError, match="there is no run 'latest'"):
            verb("latest")
    with pytest.raises(RunError, match="loss is nan at step 30"):
        run(fault="nan_loss", out="nan")
    with pytest.raises(UserError, match="nan has no checkpoint yet; 'etude resume nan' runs it from the start"):
        etude.load("nan")


def test_a_run_in_a_thread_takes_no_signals() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run(steps=5)))
    thread.start()
    thread.join()
    assert len(results) == 1


# ------------------------------------------------------------------------------------------------------------- the Run


def make(folder: Path, resume: bool = False, **settings) -> Run:
    folder.mkdir(exist_ok=True)
    made = Run("mine/none", None, Common(quiet=True, **settings), folder, resume=resume)
    made.record.open(made.step, "cpu")
    return made


def test_every_and_the_clock(tmp_path) -> None:
    clock = make(tmp_path)
    told = []
    for step in clock.steps(7):
        assert step == clock.step
        told.append((clock.every(3), clock.every(0), clock.every(100)))
    assert [step for step, answers in enumerate(told) if answers[0]] == [2, 5, 6]
    assert [step for step, answers in enumerate(told) if answers[1]] == [6]
    assert [step for step, answers in enumerate(told) if answers[2]] == [6]
    assert list(clock.steps(7)) == []
    seconds = clock.record.loop_seconds
    assert list(clock.steps(9)) == [7, 8]  # a second phase goes on
    assert clock.record.loop_seconds > seconds > 0
    assert clock.record.cpu_seconds > 0


def test_threads_suit_the_network_unless_the_user_chose(tmp_path, monkeypatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("etude.core.run.torch.set_num_threads", chosen.append)
    monkeypatch.setattr("etude.core.run.os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    small, large = torch.nn.Linear(10, 10), torch.nn.Linear(1000, 1000)
    for settings in ({}, {"threads": 3}):
        one = make(tmp_path / str(len(settings)), **settings)
        one.suit_threads(small)
        one.suit_threads(large)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        one.use_threads(None)
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert chosen == [1, 12, 3, 3, 3, 3]


def test_logged_tensors_are_read_as_they_were(tmp_path) -> None:
    """A multiplier that is changed in place after it was logged is recorded as it was."""
    clock = make(tmp_path)
    multiplier = torch.zeros(())
    for step in clock.steps(3):
        clock.log(multiplier=multiplier, double=torch.tensor(1 / 3, dtype=torch.float64), whole=step)
        multiplier += 1
    clock.finish()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["multiplier"] for row in rows] == [0, 1, 2]
    assert rows[0]["double"] == 1 / 3
    with pytest.raises(RuntimeError):
        clock.log(vector=torch.zeros(2))


def test_global_draws_depend_on_seed_step_and_rank(tmp_path, monkeypatch) -> None:
    def draws(name: str, **settings) -> list[float]:
        clock = make(tmp_path / name, **settings)
        found = [float(torch.rand(())) for _ in clock.steps(4)]
        return [*found, float(torch.rand(()))]  # and after the loop

    one = draws("one")
    assert len(set(one)) == 5
    torch.rand(3)
    assert draws("two") == one
    assert not set(draws("seed", seed=1)) & set(one)
    monkeypatch.setenv("RANK", "1")
    assert not set(draws("rank")) & set(one)


def test_average_refuses_what_is_not_finite(tmp_path) -> None:
    clock = make(tmp_path)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    clock.average(module, loss=torch.ones(()))  # no gradient yet
    module(torch.ones(1, 2)).sum().backward()
    clock.average(module)
    for parameter in module.parameters():
        parameter.grad.fill_(1e38)  # finite, though their sum is not
    clock.average(module, loss=torch.tensor(3e38))
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(
            RunError,
            match=r"loss is -?(nan|inf) at step 0; the update was not made and no checkpoint had been written yet",
        ):
            clock.average(module, loss=torch.tensor(value))
        module[1].bias.grad.fill_(value)
        with pytest.raises(RunError, match=r"the gradient of 1\.bias is not finite at step 0"):
            clock.average(module, loss=torch.ones(()))
    big = torch.nn.Linear(400, 400)
    big(torch.ones(1, 400)).sum().backward()
    big.weight.grad[7, 9] = float("inf")
    with pytest.raises(RunError, match="the gradient of weight is not finite"):
        clock.average(big)


def test_track_restores_in_place_and_names_what_is_missing(tmp_path) -> None:
    clock = make(tmp_path, save_every=2)
    box = Box(total=0.0)
    clock.track(box=box)
    with pytest.raises(ValueError, match=r"run\.track got 'box' twice"):
        clock.track(box=box)
    for _ in clock.steps(4):
        box.total += 1
    again = make(tmp_path, resume=True)
    with pytest.raises(RunError, match="the checkpoint holds 'box', which the method did not track"):
        next(again.steps(4))
    fresh = Box(total=0.0)
    again.track(box=fresh)
    assert (fresh.total, again.step) == (4.0, 4)
    assert list(again.steps(4)) == []


def test_time_between_checkpoints(tmp_path, monkeypatch) -> None:
    """Without --save-every a checkpoint is written when a minute has passed."""
    now = [0.0]
    monkeypatch.setattr("etude.core.run.time.perf_counter", lambda: now[0])
    clock = make(tmp_path)
    clock.track(box=Box(x=1))
    found = []
    for _ in clock.steps(8):
        now[0] += 25
        found.append(sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*")))
    assert found == [[], [], [], [3], [3], [3], [3, 6], [3, 6]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000006", "step-000000008"]
