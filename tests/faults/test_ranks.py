"""Several ranks: the result of one process at the whole batch, each test item once, one folder, one decision to stop."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FILES = {
    "config.json",
    "source.py",
    "environment.json",
    "about.json",
    "metrics.jsonl",
    "result.json",
    "report.html",
    "done",
    "checkpoints",
    "artifacts",
}


def port() -> str:
    """A free port below those the system hands out by itself: another test's connection cannot take it meanwhile."""
    draw = random.SystemRandom()
    while True:
        number = draw.randint(20_000, 32_000)
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", number))
            return str(number)


def ranks(etude, *words: object, before: str = "") -> list:
    """The command on two ranks, as torchrun would start it."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    started = [etude.start(*words, before=before, **shared, RANK=str(n), LOCAL_RANK=str(n)) for n in range(2)]
    return [one.wait() for one in started]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").iterdir())[-1] / "tensors.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def agrees(one: Path, other: Path) -> None:
    """Equal weights, moments, losses and scores to float tolerance."""
    expected = tensors(other)
    for name, tensor in tensors(one).items():
        if name.startswith("~run.ranks"):  # what the other ranks keep for themselves
            continue
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    scores = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    assert next(scores) == pytest.approx(next(scores), rel=1e-5)


@pytest.fixture
def alone(etude, tmp_path) -> Path:
    """One process with the batch of both."""
    done = etude("run", etude.choir, "--batch", "16", "--out", tmp_path / "alone")
    assert (done.code, done.err) == (0, "")
    return tmp_path / "alone"


MAIN = """
import atexit, runpy
from pathlib import Path
names = lambda: {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
atexit.register(lambda: print("threads at the end:", *names()))
runpy.run_module("etude", run_name="__main__", alter_sys=True)
"""


def test_torchrun_equals_one_process_at_the_doubled_batch(etude, tmp_path, alone) -> None:
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        port(),
        tmp_path / "main.py",
        "run",
        etude.choir,
        "--quiet",
    ]
    (tmp_path / "main.py").write_text(MAIN)
    done = subprocess.run(
        [sys.executable, *words], env=etude.environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert "threads at the end" in done.stdout
    assert "gloo" not in done.stdout, "the process group outlives the run; its threads may abort the process at its end"
    (folder,) = (tmp_path / "runs").glob("*/*/*")
    assert {path.name for path in folder.iterdir()} == FILES
    assert done.stdout.count(f"run:  {folder}") == 1
    agrees(folder, alone)
    noted = json.loads((folder / "artifacts" / "ranks.json").read_text())
    assert len(set(noted["pids"])) == 2
    assert sorted(noted["seen"][0] + noted["seen"][1]) == list(range(37))
    assert all(a != b for a, b in zip(*noted["draws"], strict=True))
    assert noted["draws"][0] == json.loads((alone / "artifacts" / "ranks.json").read_text())["draws"][0]
    assert noted["means"][0] == noted["means"][1]


@pytest.mark.parametrize("shard", [(), ("--shard",)])
def test_a_signal_to_one_rank_stops_both_and_they_resume(etude, tmp_path, alone, shard) -> None:
    """Each rank goes on with its own Boxes too, as if nothing had happened."""
    folder = tmp_path / "run"
    words = ["run", etude.choir, "--out", folder, "--quiet", *shard, "--fault", "terminate", "--at", "5"]
    first, second = ranks(etude, *words)
    assert (first.code, second.code) == (143, 143), first.err + second.err
    assert first.err == f"stopped with the state of step 6 saved\nnext: etude resume {folder}\n"
    assert second.err == ""
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000006"]
    first, second = ranks(etude, "resume", folder)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    agrees(folder, alone)
    assert {path.name for path in folder.iterdir()} == FILES
    calm = tmp_path / "calm"
    assert [done.code for done in ranks(etude, "run", etude.choir, "--out", calm, "--quiet", *shard)] == [0, 0]
    kept, expected = (json.loads((run / "artifacts" / "ranks.json").read_text())["kept"] for run in (folder, calm))
    assert kept == expected
    assert [len(one) for one in kept] == [12 + 2, 12 + 2]
    assert [one[12:] for one in kept] == [[12, 12], [13, 13]]
    assert not set(kept[0]) & set(kept[1])


@pytest.mark.parametrize("method", ["basics/mlp", "vision/lenet", "language/gpt"])
def test_sharding_changes_where_the_parameters_are_and_no_number(etude, tmp_path, method) -> None:
    for name, shard in (("plain", ()), ("sharded", ("--shard",))):
        done = ranks(etude, "run", method, "--preset", "tiny", "--quiet", "--out", tmp_path / name, *shard)
        assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-3)
    shapes = [{key: value.shape for key, value in tensors(folder).items()} for folder in (plain, sharded)]
    assert shapes[0] == shapes[1]
    assert {path.name for path in (plain / "artifacts").iterdir()} == {
        path.name for path in (sharded / "artifacts").iterdir()
    }


def test_a_method_that_needs_whole_parameters_refuses_to_be_sharded(etude) -> None:
    assert (
        etude.refused("run", "rl/dqn", "--shard") == "rl/dqn cannot split its parameters over ranks; leave out --shard"
    )


STOP = """
import os, signal
from etude.core.run import Run
log = Run.log
def stopping(run, **scalars):
    log(run, **scalars)
    if run.rank == 1 and run.step == 5 and "epsilon" in scalars:
        os.kill(os.getpid(), signal.SIGTERM)
Run.log = stopping
"""


def test_worlds_and_replay_buffers_of_each_rank_go_on(etude, tmp_path) -> None:
    """DQN learns from round 4 on, on both ranks, though some worlds are a few steps beyond the round's end by then."""
    pytest.importorskip("gymnasium")
    words = ["run", "rl/dqn", "--preset", "tiny", "--quiet", "--learning-starts", "1024"]
    assert [done.code for done in ranks(etude, *words, "--out", tmp_path / "calm")] == [0, 0]
    assert [done.code for done in ranks(etude, *words, "--out", tmp_path / "run", before=STOP)] == [143, 143]
    assert [done.code for done in ranks(etude, "resume", tmp_path / "run")] == [0, 0]
    last = "checkpoints/step-000000008"
    for name in ("metrics.jsonl", "result.json", f"{last}/state.json", f"{last}/tensors.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name


def test_another_number_of_ranks_is_said(etude, tmp_path) -> None:
    folder = tmp_path / "run"
    words = ["run", etude.choir, "--out", folder, "--fault", "terminate", "--at", "5"]
    assert [done.code for done in ranks(etude, *words)] == [143, 143]
    done = etude("resume", folder)
    assert done.code == 0
    said = "the run was saved by 2 ranks and is now on 1, so its numbers will be other ones; going on from step 6"
    assert done.err.splitlines()[0] == said
    folder = tmp_path / "other"
    done = etude("run", etude.choir, "--out", folder, "--fault", "terminate", "--at", "5")
    assert done.code == 143
    first, second = ranks(etude, "resume", folder)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.err.splitlines()[0].startswith("the run was saved by 1 rank and is now on 2, so ")
    assert second.err == ""


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        (("--fault", "nan_loss"), ("loss is nan",) * 2),
        (("--fault", "nan_gradient"), ("the gradient of 0.weight is not finite",) * 2),
        (
            ("--fault", "nan_gradient", "--shard"),
            ("a gradient on another rank is not finite", "the gradient of 0.weight is not finite"),
        ),
    ],
)
def test_nan_on_one_rank_stops_both(etude, tmp_path, flags, sentences) -> None:
    folder = tmp_path / "run"
    done = ranks(etude, "run", etude.choir, "--out", folder, "--quiet", "--save-every", "2", *flags)
    for rank, sentence in zip(done, sentences, strict=True):
        said = f"etude: {sentence} at step 5; the update was not made and the checkpoint of step 4 is kept\n"
        assert (rank.code, rank.err) == (1, said)
    assert (folder / "failed").is_file()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000000002", "step-000000004"]


def test_wrong_input_ends_both_ranks(etude, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for done in ranks(etude, "run", etude.choir, "--out", tmp_path / "file" / "run"):
        assert done.code == 2
        assert done.err.startswith("etude: the run folder ")
    assert "torchrun" in etude.refused("run", etude.choir, "--shard")
    assert not (tmp_path / "runs").exists()


def test_a_killed_rank_does_not_harm_the_checkpoint(etude, tmp_path, alone) -> None:
    folder = tmp_path / "run"
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    words = ["run", etude.choir, "--out", folder, "--quiet", "--save-every", "2", "--steps", "12"]
    die = """
import os
from etude.core.run import Run
average = Run.average
def dying(run, *arguments, **scalars):
    if run.step == 7:
        os.kill(os.getpid(), 9)
    average(run, *arguments, **scalars)
Run.average = dying
"""
    second = etude.start(*words, before=die, **shared, RANK="1", LOCAL_RANK="1")
    first = etude.start(*words, **shared, RANK="0", LOCAL_RANK="0")
    assert second.wait().code == -signal.SIGKILL
    done = first.wait()
    assert done.code == 1
    assert len(done.err.splitlines()) == 1, done.err
    first, second = ranks(etude, "resume", folder)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    agrees(folder, alone)


ACTING = {"env": "CartPole-v1", "worlds": 2, "widths": "6", "learning_rate": 0.01, "evaluate_every": 0}
ACTING |= {"evaluation_episodes": 1, "final_episodes": 1}


@pytest.mark.parametrize("method", ["rl/a2c", "rl/ppo"])
def test_two_ranks_act_as_one_process_in_the_worlds_of_both(etude, tmp_path, method) -> None:
    """The curve is that of the union of their worlds, up to rounding: one loop replays both ranks and takes the mean gradient.

    PPO's ranks have different numbers of transitions (resets are none) and agree on the number of updates all the same, also
    where `--target-kl` ends the passes.
    """
    pytest.importorskip("gymnasium")
    from etude.blocks.acting.worlds import Worlds
    from etude.core.randomness import fold, generator
    from etude.rl import ppo
    from etude.rl.parts.actor_critic import ActorCritic
    from etude.rl.parts.rollouts import advantages, collect

    clipped = method == "rl/ppo"
    given = ACTING | ({"segment": 20, "steps": 200, "batch": 2, "passes": 3, "target_kl": 0.004} if clipped else
                      {"segment": 5, "steps": 60, "log_every": 1})  # fmt: skip
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = ranks(etude, "run", method, "--quiet", "--out", tmp_path / "run", *flags)
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err

    torch.manual_seed(fold(0, 0, 0, "init"))
    model = ActorCritic(4, 2, (6,))
    kind = torch.optim.Adam if clipped else torch.optim.RMSprop
    optimizer = kind(model.parameters(), eps=1e-5)
    worlds = [Worlds.make("CartPole-v1", 2, 0, "training", rank) for rank in range(2)]
    steps, whole, kept, counts = given["steps"] // (2 * given["segment"]), 2 * given["segment"], [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        sides = []
        for rank in range(2):
            dice = generator(0, step, rank, "act")
            rows = collect(
                worlds[rank],
                lambda s, d=dice: model.act(s, model.noise(d, len(s))),
                given["segment"],
                torch.device("cpu"),
            )
            gamma, lam = (0.98, 0.8) if clipped else (0.99, 1.0)
            real, (advantage, returns) = rows.real, advantages(rows, model.value, gamma, lam)
            side = [rows.state[:-1][real], rows.action[real], advantage[real], returns[real]]
            sides.append([*side, model.judge(*side[:2])[0].detach(), generator(0, step, rank, "order")])
        counts.append([len(side[1]) for side in sides])
        found = []
        for _ in range(given.get("passes", 1)):
            if clipped:
                orders = [torch.randperm(len(side[1]), generator=side[5]) for side in sides]
                parts = list(zip(*(ppo.minibatches(order, 2, whole // 2) for order in orders), strict=True))
            else:
                parts = [tuple(torch.arange(len(side[1])) for side in sides)]
            for part in parts:
                optimizer.zero_grad()
                both = []
                for index, (state, action, advantage, returns, old, _) in zip(part, sides):
                    log_prob, _, value = model.judge(state[index], action[index])
                    error, wanted = (value - returns[index]).square().mean(), advantage[index]
                    if clipped:
                        ratio, wanted = (log_prob - old[index]).exp(), ppo.standardised(wanted)
                        kl = (ratio - 1 - (log_prob - old[index])).mean().item()
                        gain = ppo.clipped_objective(ratio, wanted, 0.2 * (1 - step / steps)).mean()
                        both.append((0.25 * error - gain, kl))
                    else:
                        both.append((0.5 * error - (wanted * log_prob).mean(), 0.0))
                loss = sum(one for one, _ in both) / 2
                loss.backward()
                found.append(loss.item())
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            if clipped and sum(kl for _, kl in both) / 2 > given["target_kl"]:
                break
        kept.append(sum(found) / len(found))
    per = 2 if clipped else 1
    assert any(-(-one // per) != -(-other // per) for one, other in counts), "resets must have made the ranks unequal"
    assert losses(tmp_path / "run") == pytest.approx(kept, rel=1e-3, abs=1e-5)
    saved = tensors(tmp_path / "run")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[f"model.{name}"], parameter.detach(), rtol=1e-3, atol=1e-5, msg=name)
