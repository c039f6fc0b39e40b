"""Every verb: its help, its JSON, its refusals in one sentence with the nearest match, and what it must not import."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

VERBS = [
    "list", "info", "run", "resume", "show", "runs", "compare", "predict", "sample", "export", "verify", "bench", "data",
    "copy", "doctor", "completion",
]  # fmt: skip
WARM = ("--quiet", "--steps", "4")


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(etude, verb) -> None:
    for word in ("--help", "-h"):
        done = etude(verb, word)
        assert (done.code, done.err) == (0, "")
        assert f"usage: etude {verb}" in done.out
    assert f"\n  {verb} " in etude("--help").out


def test_the_overview(etude) -> None:
    shown = etude("--help")
    assert shown.code == 0
    assert shown.out == etude().out == etude("help").out
    assert re.findall(r"^  (\w+)  ", shown.out, re.MULTILINE) == VERBS
    assert re.fullmatch(r"etude \d+\.\d+\.\d+\n", etude("--version").out)


def test_help_of_a_method_shows_every_setting(etude) -> None:
    done = etude("run", "vision/lenet", "--help")
    assert (done.code, done.err) == (0, "")
    common = ("seed", "device", "precision", "threads", "save-every", "compile", "shard", "quiet", "preset", "out")
    fields = [field["name"].replace("_", "-") for field in json.loads(etude("info", "lenet", "--json").out)["fields"]]
    for flag in (*common, *fields):
        assert f"--{flag} " in done.out or f"--{flag}," in done.out, flag
    assert not (etude.folder / "runs").exists()


@pytest.mark.parametrize(
    "words", [("--help",), ("list",), ("list", "--json"), ("info", "lenet"), ("__complete", "run", "")]
)
def test_quick_verbs_import_no_torch(etude, words) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "importtime", "-m", "etude", *words],
        env=etude.environment, cwd=etude.folder, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "etude" in imported
    assert not imported & {"torch", "numpy", "matplotlib", "sklearn", "tyro", "numba", "PIL"}
    assert done.stdout


# ---------------------------------------------------------------------------------------------------------------- JSON


def test_list_json(etude) -> None:
    rows = json.loads(etude("list", "--json").out)
    assert {"vision/lenet", "basics/mlp"} <= {row["name"] for row in rows}
    for row in rows:
        assert list(row) == ["name", "title", "room", "section", "paper", "badge", "needs"]
        assert row["room"] == row["name"].partition("/")[0]
        assert row["badge"] in {"verified", "stale", "runs", "broken", "unproved"}
        assert isinstance(row["needs"], list)
        assert all(isinstance(value, str) for name, value in row.items() if name != "needs")
    assert {row["name"] for row in json.loads(etude("list", "vision", "--json").out)} == {
        row["name"] for row in rows if row["room"] == "vision"
    }
    assert etude("list", "--names").out.split() == [row["name"] for row in rows]
    shown = etude("list").out
    assert all(row["name"] in shown for row in rows)


def test_info_bench_data_doctor_json(etude, tmp_path) -> None:
    shown = json.loads(etude("info", "vision/lenet", "--json").out)
    assert {"name", "contract", "fields", "presets", "experiments", "card", "source"} <= shown.keys()
    assert Path(shown["source"]).is_file()
    (tmp_path / "results" / "bench").mkdir(parents=True)
    row = {
        "name": "a",
        "peer": "b",
        "peer_version": "1",
        "ratio": 2.0,
        "low": 1.5,
        "high": 2.5,
        "bar": 1.0,
        "equal": "loss",
    }
    (tmp_path / "results" / "bench" / "core.json").write_text(json.dumps([row]))
    results = {"ETUDE_RESULTS": str(tmp_path / "results")}
    assert json.loads(etude("bench", "--recorded", "--json", **results).out) == [row]
    assert "2.00x" in etude("bench", "--recorded", **results).out
    row["bar"] = 3.0
    (tmp_path / "results" / "bench" / "core.json").write_text(json.dumps([row]))
    assert etude("bench", "core", "--recorded", **results).code == 1
    rows = json.loads(etude("data", "list", "--json").out)
    assert {"digits", "mnist"} <= {row["name"] for row in rows}
    done = etude("doctor", "--json")
    rows = {row["what"]: row for row in json.loads(done.out)}
    assert {"python", "torch", "devices", "machine", "runs folder", "data folder", "free disk"} <= rows.keys()
    assert {row["state"] for row in rows.values()} <= {"ok", "note", "fix"}
    assert done.code == any(row["state"] == "fix" for row in rows.values())
    assert rows["runs folder"]["detail"] == str(tmp_path / "runs")
    blocked = etude("doctor", ETUDE_RUNS="/proc/version/runs")
    assert blocked.code == 1
    assert re.search(r"fix +runs folder +/proc/version/runs cannot be written", blocked.out)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("rum vision/lenet", "there is no command 'rum'; did you mean 'run'?"),
        ("run", "name the method to run"),
        ("run vision/lenett", "there is no method 'vision/lenett'; did you mean 'vision/lenet'?"),
        ("run lenett", "did you mean 'vision/lenet'?"),
        ("info lente", "did you mean 'vision/lenet'?"),
        ("copy lente x.py", "did you mean 'vision/lenet'?"),
        ("list visoin", "no method matches 'visoin'; did you mean 'vision'?"),
        ("verify visoin", "did you mean 'vision'?"),
        ("verify lenet --seeds 0", "--seeds is 0; it must be a whole number at least 1"),
        ("verify lenet --experiment mnits", "has no experiment 'mnits'"),
        ("list --jsn", "does not understand '--jsn'; did you mean '--json'?"),
        ("show --jsno", "did you mean '--json'?"),
        (f"run lenet --data {'x' * 5000}", f"{'x' * 40}…{'x' * 40}"),
        (f"run fgsm --preset tiny --data {'x' * 5000}", "There is no dataset 'xxx"),
        ("run lenet --steps 3 -q", "has no flag '-q'; flags are written out, as in --quiet"),
        ("run lenet --stesp 3", "has no flag '--stesp'; did you mean '--steps'?"),
        ("run lenet --learning_rat 3", "has no flag '--learning_rat'; did you mean '--learning-rate'?"),
        ("run lenet --preset tinny", "has no preset 'tinny'; did you mean 'tiny'? (it has tiny, default"),
        ("run lenet --preset=tinny", "has no preset 'tinny'; did you mean 'tiny'?"),
        ("run lenet --preset", "--preset needs a value: text"),
        ("run lenet --steps", "--steps needs a value: a whole number at least 1"),
        ("run lenet --steps many", "--steps is 'many'; it must be a whole number at least 1"),
        ("run lenet --steps 1.5", "--steps is '1.5'; it must be a whole number at least 1"),
        ("run lenet --steps 0", "--steps is 0; it must be a whole number at least 1"),
        ("run lenet --steps=-3", "--steps is -3; it must be a whole number at least 1"),
        ("run lenet --steps -3", "--steps is -3; it must be a whole number at least 1"),
        ("run lenet --steps 3 4", "--steps is '3 4'; it must be a whole number at least 1"),
        ("run lenet --learning-rate nan", "--learning-rate is nan; it must be a number greater than 0"),
        ("run lenet --learning-rate inf", "--learning-rate is inf; it must be a finite number greater than 0"),
        ("run lenet --learning-rate 0", "--learning-rate is 0.0; it must be a number greater than 0"),
        ("run lenet --style classic", "--style is 'classic'; it must be one of modern, 1998"),
        ("run lenet --size 29", "--size is '29'; it must be one of 28, 32"),
        ("run lenet --precision fp16", "--precision is 'fp16'; it must be one of fp32, bf16"),
        ("run lenet --device tpu", "--device tpu cannot be used here; 'etude doctor'"),
        ("run lenet --device cuda:99", "--device cuda:99 cannot be used here"),
        ("run lenet --device meta", "--device meta cannot be used here"),
        ("run lenet --seed -1", "--seed is -1; it must be a whole number at least 0"),
        ("run lenet --quiet yes", "--quiet takes no value, but 'yes' follows it"),
        ("run lenet --compile", "vision/lenet has no part that torch.compile is used for; leave out --compile"),
        ("run lenet mnist", "'mnist' stands where a flag should"),
        ("run lenet --data mnits", "did you mean 'mnist'?"),
        ("run mlp --dropout 1", "--dropout is 1.0; it must be a number between 0 and 1 (1 excluded)"),
        ("run mlp --widths 8 x", "--widths is '8 x'; it must be a list, each a whole number at least 1"),
        ("run mlp --widths 8 0", "--widths is (8, 0); it must be a list, each a whole number at least 1"),
        ("resume nowhere", "there is no run 'nowhere'"),
        ("show latest", "there is no run 'latest'; 'etude run METHOD' makes one"),
        ("sample", "name the run to draw from"),
        ("sample nowhere", "there is no run 'nowhere'"),
        ("resume", "the following arguments are required: run"),
        ("data", "the following arguments are required: action"),
        ("data fetch", "'fetch' is none of list, get, check"),
        ("data get", "name what to fetch"),
        ("data get mnits", "did you mean 'mnist'?"),
        ("data check mnits", "did you mean 'mnist'?"),
        ("completion tcsh", "'tcsh' is none of bash, zsh, fish; did you mean 'zsh'?"),
        ("bench nothing --recorded", "there is no benchmark for 'nothing'"),
        ("copy lenet mine.txt", "mine.txt must end in .py"),
        ("copy lenet /proc/version/x.py", "cannot be written"),
        ("run missing.py", "there is no file missing.py; 'etude copy METHOD missing.py'"),
    ],
)
def test_refusals_are_one_sentence_with_the_nearest_match(etude, words, part) -> None:
    assert part in etude.refused(*words.split())
    assert not (etude.folder / "runs").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("import nonsuch", "ModuleNotFoundError: No module named 'nonsuch'"),
        ("from etude.core.run import Rum", "ImportError: cannot import name 'Rum'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("raise ValueError('one\\ntwo')", "ValueError: one two"),
    ],
)
def test_own_file_that_cannot_be_imported(etude, tmp_path, text, part) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        text + "\n" + Path(etude.piece).read_text(encoding="utf-8").replace("from __future__ import annotations\n", ""),
        encoding="utf-8",
    )
    said = etude.refused("run", mine)
    assert said.startswith(f"{mine} cannot be imported: ")
    assert part in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text", ["", "print('hello')\n", '"""x"""\n\n@method("a/b", paper=)\ndef train(c, r):\n    pass\n', "\xff\x00"]
)
def test_own_file_that_is_no_method(etude, tmp_path, text) -> None:
    mine = tmp_path / "mine.py"
    mine.write_bytes(text.encode("latin-1"))
    assert str(mine) in etude.refused("run", mine)


# ------------------------------------------------------------------------------------------------------------ the path


def test_copy_run_resume_show(etude, tmp_path) -> None:
    done = etude("copy", "vision/lenet", "mine/copy.py")
    assert (done.code, done.err) == (0, "")
    assert done.out == "mine/copy.py\nnext: etude run ./mine/copy.py --preset tiny\n"
    assert etude.refused("copy", "vision/lenet", "mine/copy.py") == "mine/copy.py exists already; name another file"
    done = etude("run", "./mine/copy.py", "--preset", "tiny", "--quiet")
    assert (done.code, done.err) == (0, "")
    (folder,) = (tmp_path / "runs" / "mine" / "copy").iterdir()
    assert f"run:  {folder}\nnext: etude show {folder}\n" in done.out
    # what the run keeps is what resumes, wherever the command is given and whatever became of the file
    assert (folder / "source.py").read_bytes() == (tmp_path / "mine" / "copy.py").read_bytes()
    (tmp_path / "mine" / "copy.py").unlink()
    (folder / "done").unlink()
    result = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    described = json.loads((folder / "config.json").read_text())
    assert described["method"] == "mine/copy"
    assert described["source"]["path"] == str(tmp_path / "mine" / "copy.py")
    assert described["command"] == f"etude run {tmp_path / 'mine' / 'copy.py'} --preset tiny --quiet"
    done = etude("resume", "latest", before="import os; os.chdir('/')")
    assert (done.code, done.err) == (0, "")
    assert (folder / "result.json").read_text() == result
    done = etude("resume", folder)
    assert (done.code, done.err) == (0, f"{folder} has already finished; nothing to continue\n")
    for words in (("latest",), (), ("mine/copy",), (folder,)):
        done = etude("show", *words)
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines()[0] == "mine/copy  done"
        assert done.out.splitlines()[-1] == str(folder / "report.html")
    shown = json.loads(etude("show", "--json").out)
    assert shown["state"] == "done"
    assert shown["run"] == str(folder)
    assert shown["result"] == json.loads(result)
    assert etude.refused("show", "lenett").startswith("there is no run 'lenett'")
    assert etude.refused("run", "lenet", "--out", folder).startswith(
        f"--out {folder} already holds a run; continue it with 'etude resume"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    assert etude.refused("run", "lenet", "--out", "full") == "--out full is not empty; name a new folder for the run"
    assert etude.refused("resume", "full") == "full is not a run folder (it has no config.json)"
    assert etude.refused("resume", "full/thing").startswith("full/thing is a file; name the run folder")


def test_a_run_folder_holds_what_the_house_says(etude, tmp_path) -> None:
    """house.md §4, and the command in config.json repeats the run."""
    done = etude("run", "vision/lenet", "--preset", "tiny", *WARM, "--seed", "3", "--style", "1998", "--shift", "0")
    assert done.code == 0
    (folder,) = (tmp_path / "runs" / "vision" / "lenet").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-3", folder.name)
    names = {
        "about.json",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "artifacts",
        "report.html",
        "done",
        "spec.json",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert {path.suffix for path in (folder / "artifacts").iterdir()} == {".png", ".json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["command"] == "etude run vision/lenet --preset tiny --style 1998 --steps 4 --shift 0 --seed 3 --quiet"
    result = json.loads((folder / "result.json").read_text())
    assert all(isinstance(value, float) for value in result.values())
    environment = json.loads((folder / "environment.json").read_text())
    assert {"hardware", "versions", "commit", "sessions"} <= environment.keys()
    assert done.out.splitlines()[-2:] == [f"run:  {folder}", f"next: etude show {folder}"]
    done = etude(*config["command"].split()[1:], "--out", "again")
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_the_next_command_can_be_pasted(etude) -> None:
    """Also where a folder's name has a space in it."""
    copied = etude("copy", etude.piece, "my own/piece one.py")
    assert copied.code == 0, copied.err
    words = shlex.split(copied.out.splitlines()[-1])
    assert words[:2] == ["next:", "etude"]
    stopped = etude(*words[2:], "--out", "a run", "--fault", "wait", "--at", "3", PIECE="go", before=INTERRUPT)
    assert stopped.code == 130, stopped.err
    words = shlex.split(stopped.err.splitlines()[-1])
    assert words == ["next:", "etude", "resume", "a run"]
    done = etude(*words[2:], PIECE="go")
    assert done.code == 0
    words = shlex.split(done.out.splitlines()[-1])
    assert words == ["next:", "etude", "show", "a run"]
    assert etude(*words[2:]).code == 0


INTERRUPT = """
import os, signal
from etude.core.run import Run
log = Run.log
def stopping(run, **scalars):
    log(run, **scalars)
    if run.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
Run.log = stopping
"""


def test_sample_refuses_a_method_without_a_distribution(etude, tmp_path) -> None:
    assert etude("run", "vision/lenet", "--preset", "tiny", *WARM, "--out", "run").code == 0
    assert etude.refused("sample", "run") == (
        "vision/lenet learns no distribution to draw from; see its results with: etude show run"
    )


def test_completion(etude, tmp_path) -> None:
    def offered(*words: str) -> list[str]:
        return etude("__complete", *words).out.split()

    assert offered("") == VERBS
    assert offered("re") == ["resume"]
    assert offered("run", "vision/le") == ["vision/lenet"]
    assert "vision" in offered("list", "")
    assert offered("run", "vision/lenet", "--st") == ["--style", "--steps"]
    assert offered("run", "vision/lenet", "--preset", "t") == ["tiny"]
    assert "mnist" in offered("run", "vision/lenet", "--data", "")
    assert offered("data", "g") == ["get"]
    assert offered("data", "get", "mni") == ["mnist"]
    assert etude("run", etude.piece, *WARM).code == 0
    for verb in ("show", "resume", "compare", "predict", "sample", "export"):
        assert offered(verb, "la") == ["latest"]
        assert len(offered(verb, str(tmp_path / "runs"))) == 1
    # choices after a flag, also those of a type that the file imports
    assert offered("run", "vision/lenet", "--style", "") == ["modern", "1998"]
    assert "rmsprop" in offered("run", "vision/lenet", "--optimizer", "r")
    assert offered("run", "vision/lenet", "--precision", "") == ["fp32", "bf16"]
    assert offered("run", "vision/lenet", "--steps", "") == []
    assert {"fresh", "latest"} <= set(offered("run", "robustness/fgsm", "--source", ""))
    assert offered("run", "./piece.py", "--") == []
    assert {"--fault", "--seeds", "--json"} <= set(offered("run", etude.piece, "--"))
    assert offered("resume", "latest", "--st") == ["--steps"]
    assert offered("show", "latest", "--j") == ["--json"]
    assert offered("predict", "latest", "") == ["--json", "--trust"]
    assert offered("runs", "vision/le") == ["vision/lenet"]
    for words in json.loads(json.dumps([[verb, *rest] for verb in VERBS for rest in ([], ["x"], ["x", "--y"])])):
        assert etude("__complete", *words, "").code == 0
    for shell in ("bash", "zsh", "fish"):
        done = etude("completion", shell)
        assert done.code == 0
        assert "etude __complete" in done.out
    script = etude("completion", "bash").out
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=True)
    assert checked.stderr == ""


def test_verify_writes_a_card_and_fails_on_a_miss(etude, tmp_path) -> None:
    before = """
import os, types
from etude import catalog, cli
from etude.core.evidence import cards, stage, traces
def forked(words, **settings):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(stage.main(words[3:]))
    return types.SimpleNamespace(returncode=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stderr="", stdout="")
stage.subprocess = types.SimpleNamespace(run=forked)
row = {{"name": "a", "preset": "tiny", "metric": "{metric}", "bar": 1.5, "seeds": (5,), "flags": {{"steps": 2, "shift": 0}},
       "controls": ()}}
catalog.Entry.experiments = property(lambda entry: [row])
cards._oracle = lambda entry: {{"file": "x", "tests": 3, "passed": True}}
cards._may_write = lambda: None
cards.check_settings = lambda entry: {{}}
traces.record = lambda entry, chosen, stage: ([""], {{}})
"""
    results = {"ETUDE_RESULTS": str(tmp_path / "results")}
    done = etude("verify", "vision/lenet", "--json", before=before.format(metric="test_accuracy"), **results)
    assert done.code == 1
    (card,) = json.loads(done.out)
    assert card == json.loads((tmp_path / "results" / "vision" / "lenet.json").read_text())
    assert {"name", "badge", "commit", "oracle", "experiments", "hardware", "versions"} <= card.keys()
    assert card["badge"] == "runs"
    (row,) = card["experiments"]
    assert row["command"] == "etude run vision/lenet --preset tiny --steps 2 --shift 0"
    assert (row["passed"], row["bar"], row["seeds"], len(row["values"])) == (False, 1.5, [5], 1)
    assert 0 <= row["mean"] == row["values"][0] <= 1
    assert json.loads(etude("list", "lenet", "--json", **results).out)[0]["badge"] == "runs"


# ------------------------------------------------------------------------------------------------------------ progress


# time passes only where the piece sleeps, so what is shown does not depend on how busy the machine is
CLOCK = """
import time
now = [0.0]
def sleep(seconds):
    now[0] += seconds
time.sleep, time.perf_counter = sleep, lambda: now[0]
"""


def test_progress_without_a_terminal(etude) -> None:
    """Plain lines with step, rate, time left and loss: the first after a second, then one every ten."""
    done = etude("run", etude.piece, "--steps", "60", "--pause", "500", before=CLOCK)
    assert done.code == 0
    lines = done.err.splitlines()
    assert len(lines) == 3, done.err
    for line, (step, left) in zip(lines, [(2, 29), (22, 19), (42, 9)]):
        assert re.fullmatch(rf"step {step}/60  2\.00/s  {left}s left  before 1  loss [\d.e-]+  .*", line), line


def test_progress_on_a_terminal(etude) -> None:
    """One live line that is taken away at the end; Ctrl-C says what happens."""
    ours, theirs = pty.openpty()
    seen = bytearray()

    def listen() -> None:
        try:
            while data := os.read(ours, 4096):
                seen.extend(data)
        except OSError:  # the terminal is closed
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    words = ("--steps", "60", "--pause", "50")
    run = etude.start("run", etude.piece, *words, before=CLOCK, err=os.ttyname(theirs), TERM="xterm")
    code = etude.forge.ask({"wait": run.pid})
    os.close(theirs)
    listener.join()
    os.close(ours)
    assert code == 0, seen.decode()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"mine/piece \S+ \d+/60 20/s \ds left .*loss \d", shown), shown
    assert seen.decode().rstrip("\n\r").endswith("\x1b[2K"), "the line was left behind"
