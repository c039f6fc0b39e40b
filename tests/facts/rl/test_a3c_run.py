"""Whole runs of A3C: one worker replayed plainly; several write, die, are replaced, stop, go on, and are counted."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import etude
from etude.core.errors import RunError, UserError
from etude.core.randomness import fold, generator
from etude.rl import a3c
from etude.rl.a3c import Config
from etude.rl.parts import workers

plainly = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_ppo_run.py"))))
SEED = plainly.SEED
SMALL = {
    "steps": 300,
    "workers": 1,
    "worlds": 3,
    "segment": 6,
    "widths": (6, 5),
    "learning_rate": 0.01,
    "collect": 60,
    "gamma": 0.9,
}
SMALL |= {"evaluate_every": 120, "evaluation_episodes": 2, "final_episodes": 3}
TWO = SMALL | {"workers": 2, "collect": 40, "evaluate_every": 0}


@pytest.fixture(autouse=True)
def _no_film(monkeypatch):
    monkeypatch.setattr(a3c, "show", lambda *given: None)


def flat_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(config):
    """The run of one worker written plainly: its rows, its numbers and its network."""
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    net = plainly.Plain(config)
    square = [torch.zeros_like(p) for p in net.parameters()]
    n = config.worlds
    env = gymnasium.make_vec("CartPole-v1", num_envs=n, vectorization_mode="vector_entry_point")
    state, resetting = env.reset(seed=fold(SEED, 0, 0, "training"))[0], np.zeros(n, bool)
    running, ended, taken, rows, updates = np.zeros(n), [], 0, [], 0
    rounds = math.ceil(config.steps / config.collect)
    for step in range(rounds):
        finished, row = [], {"step": step + 1}
        while taken < min((step + 1) * config.collect, config.steps):
            part = 1 - min(taken, config.steps - 1) / config.steps if config.schedule == "linear" else 1
            act, lives = plainly.drawing(net, generator(SEED, updates, 0, "worker 0")), [[] for _ in range(n)]
            for _ in range(config.segment):
                action = act(torch.from_numpy(state))
                after, reward, terminated, truncated, _ = env.step(action)
                for i in range(n):
                    if resetting[i]:
                        lives[i].append(None)
                        continue
                    lives[i].append((state[i], action[i], float(reward[i]), after[i], terminated[i], truncated[i]))
                    taken, running[i] = taken + 1, running[i] + reward[i]
                    if terminated[i] or truncated[i]:
                        finished.append(running[i])
                        running[i] = 0.0
                state, resetting = after, terminated | truncated
            found = [
                (lives[i][t], plainly.advantage_of(net, lives[i], t, config))
                for t in range(config.segment)
                for i in range(n)
                if lives[i][t]
            ]
            s = torch.from_numpy(np.stack([life[0] for life, _ in found]))
            a = torch.tensor([int(life[1]) for life, _ in found])
            advantage = torch.tensor([value for _, value in found]).float()
            policy, v = net(s)
            error, entropy = ((v - (advantage + v.detach())) ** 2).mean(), policy.entropy().mean()
            gain = (advantage * policy.log_prob(a)).mean() + config.entropy_bonus * entropy
            loss = config.value_coefficient * error - gain
            net.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
            with torch.no_grad():
                for p, g in zip(net.parameters(), square):
                    g += 0.01 * (p.grad**2 - g)
                    p -= config.learning_rate * part * p.grad / (g + 1e-5).sqrt()
            updates += 1
        if finished:
            row["training_return"], ended = np.mean(finished), ended + finished
        row |= {"env_steps": taken, "loss": loss.item(), "value_loss": error.item(), "entropy": entropy.item()}
        done, every = (step + 1) * config.collect, config.evaluate_every
        if step + 1 == rounds or (every and done // every > step * config.collect // every):
            score = plainly.returns_of(plainly.greedy(net), config.evaluation_episodes, "evaluation", fold(SEED, step))
            row["greedy_return"] = score.mean()
        rows.append(row)
    scores = plainly.returns_of(plainly.greedy(net), config.final_episodes, "final evaluation")
    dice = generator(SEED, 0, 0, "final act")
    sampled = plainly.returns_of(plainly.drawing(net, dice), config.final_episodes, "final sampling")
    numbers = {"greedy_return": scores.mean(), "greedy_return_low": scores.min(), "sampled_return": sampled.mean()}
    numbers |= {"training_return": np.mean(ended[-100:]), "env_steps": taken, "updates": updates}
    return SimpleNamespace(rows=rows, numbers=numbers | {"least_share": 1.0, "replaced": 0.0}, final=plainly.flat(net))


CHANGES = (
    {},
    {"gae_lambda": 0.5, "schedule": "constant"},
    {"entropy_bonus": 0.5, "value_coefficient": 2.0, "clip_norm": 0.05},
    {"shared": True, "gamma": 0.5},
    {"worlds": 2, "segment": 10, "evaluate_every": 0, "collect": 50},
)


@pytest.fixture(scope="module")
def base():
    return plain(Config(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "base")
def test_loop_of_one_worker_equals_a_plain_one_under_every_setting(changes, base, tmp_path):
    settings = SMALL | changes
    want = plain(Config(**settings))
    done = etude.run("rl/a3c", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(want.rows)
    for one, other in zip(rows, want.rows):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=5e-3, abs=2e-4), (name, other["step"])
    torch.testing.assert_close(plainly.flat(etude.load(tmp_path / "run").model), want.final, atol=1e-4, rtol=2e-3)
    assert done.metrics == pytest.approx(want.numbers, rel=5e-3, abs=2e-4)
    if changes:  # what is tested must matter, far beyond rounding
        assert len(want.final) != len(base.final) or (want.final - base.final).abs().max() > 1e-3


def test_reported_numbers_are_those_of_the_saved_weights(tmp_path):
    """Of two workers too: nothing repeats, but what is saved is what was scored and counted."""
    got = etude.run("rl/a3c", out=tmp_path / "run", seed=SEED, quiet=True, **TWO).metrics
    loaded = etude.load(tmp_path / "run")

    def net(state):
        logits, value = loaded.model(state)
        return torch.distributions.Categorical(logits=logits), value

    scores = plainly.returns_of(plainly.greedy(net), 3, "final evaluation")
    assert (got["greedy_return"], got["greedy_return_low"]) == (scores.mean(), scores.min())
    dice = generator(SEED, 0, 0, "final act")
    assert got["sampled_return"] == plainly.returns_of(plainly.drawing(net, dice), 3, "final sampling").mean()
    box = loaded.state["box"]
    assert got["env_steps"] == box["taken"].sum() >= 300
    assert got["updates"] == box["updates"].sum()
    assert got["least_share"] == pytest.approx(float(box["taken"].min() / box["taken"].sum()))
    assert ("training_return" in got) == bool(box["recent"])  # in so few steps no episode may have ended
    assert got.get("training_return", np.nan) == pytest.approx(np.mean(box["recent"] or [np.nan]), nan_ok=True)
    assert got["replaced"] == 0


def test_workers_share_the_steps_and_their_updates_reach_the_weights(tmp_path):
    """E90: two write into one θ. Every update moved g, and each worker's did."""
    settings = TWO | {"steps": 2000, "collect": 400}
    result = etude.run("rl/a3c", out=tmp_path / "run", seed=SEED, quiet=True, **settings)
    state = etude.load(result.folder).state
    assert (state["box"]["taken"] > 0).all()
    assert 2000 <= state["box"]["taken"].sum() <= 2000 + 2 * 18
    still = etude.run("rl/a3c", out=tmp_path / "still", seed=SEED, quiet=True, **settings | {"learning_rate": 1e-30})
    before, after = (plainly.flat(etude.load(folder).model) for folder in (still.folder, result.folder))
    assert (before - after).abs().max() > 0.01
    assert torch.isfinite(after).all()
    assert "without waiting" in (result.folder / "report.html").read_text()


def test_a_run_of_two_saves_the_shared_weights_and_goes_on_from_them(tmp_path, monkeypatch):
    shared, begun, share = [], [], torch.Tensor.share_memory_
    enter, end = workers.Crew.__enter__, workers.Crew.end

    def sharing(tensor):
        shared.append(tensor)
        return share(tensor)

    def entering(crew):
        begun.append(shared[0].clone())
        return enter(crew)

    def ending(crew):
        if crew.pids:  # a worker was in the middle of a segment
            shared[0][0] += 1
        end(crew)

    monkeypatch.setattr(workers.Crew, "end", ending)
    monkeypatch.setattr(torch.Tensor, "share_memory_", sharing)
    monkeypatch.setattr(workers.Crew, "__enter__", entering)
    first = etude.run("rl/a3c", out=tmp_path / "run", seed=SEED, quiet=True, **TWO)
    loaded = etude.load(first.folder)
    kept = flat_of(loaded.model)
    assert kept.equal(shared[0])
    assert not kept.equal(begun[0])
    saved = loaded.state["box"]["taken"].clone()
    shared.clear()
    etude.resume(first.folder, steps=900)
    state = etude.load(first.folder).state
    assert begun[1].equal(kept)
    assert (state["box"]["taken"] >= saved).all()
    assert 900 <= state["box"]["taken"].sum() <= 900 + 2 * 18
    assert flat_of(etude.load(first.folder).model).equal(shared[0])
    assert torch.isfinite(shared[0]).all()


# ------------------------------------------------------------------------------------------------------- processes


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_is_replaced_and_the_run_ends_well(tmp_path, monkeypatch, capsys):
    killed, real = [], workers.Crew.hear

    def hear(crew):
        heard = real(crew)
        if heard and not killed:  # after its first words
            killed.append(crew.pids[0])
            os.kill(crew.pids[0], signal.SIGKILL)
        return heard

    monkeypatch.setattr(workers.Crew, "hear", hear)
    settings = TWO | {"steps": 3000, "collect": 200}
    result = etude.run("rl/a3c", out=tmp_path / "run", seed=SEED, **settings)
    assert result.metrics["replaced"] == 1
    assert result.metrics["env_steps"] >= 3000
    told = capsys.readouterr()
    assert "1 worker died and was replaced" in told.err + told.out
    assert not alive(killed[0])
    assert result.metrics["least_share"] > 0.05


def dies(worker, tell, stopped):
    os.kill(os.getpid(), signal.SIGKILL)


def flat(worker, tell, stopped):
    raise UserError("the world is flat")


def fails(worker, tell, stopped):
    raise ValueError("odd")


def waits(worker, tell, stopped):
    tell(worker)
    while not stopped():
        time.sleep(0.01)


def heard(crew, seconds=10):
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end and len(found) < 2:
        found += crew.hear()
        time.sleep(0.01)
    return found


def test_a_crew_hears_replaces_and_ends():
    with (
        pytest.raises(RunError, match="ended 3 times in a row before it had said anything .exit code -9"),
        workers.Crew(2, dies) as crew,
    ):
        heard(crew)
    with pytest.raises(UserError, match="the world is flat"), workers.Crew(1, flat) as crew:
        heard(crew)
    with pytest.raises(RunError, match=r"worker 0: ValueError: odd \(.*line \d+\)"), workers.Crew(1, fails) as crew:
        heard(crew)
    with workers.Crew(2, waits) as crew:
        assert sorted(heard(crew)) == [(0, 0), (1, 1)]
        pids = crew.pids
    assert not any(map(alive, pids))


def test_nobody_is_left_when_the_run_is_killed(tmp_path):
    """SIGKILL of the run cannot be caught: its workers see that their parent is gone."""
    code = textwrap.dedent(f"""
        import etude
        etude.run("rl/a3c", out={str(tmp_path / "run")!r}, workers=2, worlds=2, widths=(8,), steps=10_000_000, evaluate_every=0)
    """)
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children, end = [], time.monotonic() + 40
    while len(children) < 2 and time.monotonic() < end:
        time.sleep(0.2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) == 2
    time.sleep(0.5)
    run.kill()
    run.wait()
    end = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in map(int, children) if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
