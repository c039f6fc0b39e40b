"""What the tests of the compiled updates share: a plain agent's lines against those of `replay_updates`, in float64.

A test takes it by ``replayed = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("replayed.py"))))``.
"""

import json

import pytest
import torch
from torch.nn.utils import parameters_to_vector as vector_of
from torch.nn.utils import vector_to_parameters

import etude
from etude.core.errors import RunError, UserError
from etude.core.randomness import generator
from etude.optim.adam import Adam
from etude.optim.flat import flatten
from etude.rl.parts.continuous import frozen
from etude.rl.parts.replay_fused import BoxLearner

SEED = 3
WIDTHS = ((6, 5), (7,), (), (6, 5, 4))


def asleep(nets):
    """Turn off some units of every hidden layer but the first, for good, and others on; the others stay as they are."""
    for net in nets:
        for layer in list(net)[2:-1:2]:
            layer.bias.data[::3] -= 9
            layer.bias.data[1::3] += 9


def rows_of(step, updates, batch, size, actions):
    """Minibatches (K, N, …) of transitions that nobody made."""
    dice = generator(SEED, step, 0, "rows")
    shape = (updates, batch)
    state, reached = (torch.randn(*shape, size, generator=dice) for _ in range(2))
    action, reward = torch.rand(*shape, actions, generator=dice) * 2 - 1, torch.randn(shape, generator=dice)
    over = torch.rand(shape, generator=dice) < 0.3
    return {"state": state, "action": action, "reward": reward, "next_state": reached, "terminated": over}


NAMES = ("state", "action", "reward", "next_state", "terminated")


def learner_of(config, model, critic, actor, critics, target_model=None, more=()):
    """Our networks with the plain ones' weights, and what makes their updates."""
    vector_to_parameters(vector_of(actor.parameters()).detach(), model.parameters())
    vector_to_parameters(torch.cat([vector_of(net.parameters()).detach() for net in critics]), critic.parameters())
    target_model, target_critic = frozen(model) if target_model else None, frozen(critic)
    optimizers = Adam([flatten(model)], lr=config.actor_learning_rate), Adam([flatten(critic)], lr=config.learning_rate)
    learner = BoxLearner(model, critic, target_model, target_critic, *optimizers, config.batch, *more)
    return learner, target_model, target_critic, optimizers


def same(ours, plain, limit):
    """Every number of our module is one of the plain modules', in their order."""
    want = torch.cat([vector_of(net.parameters()) for net in plain])
    torch.testing.assert_close(vector_of(ours.parameters()), want, rtol=0, atol=limit)


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def log_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def state_of(run):
    loaded = etude.load(run.folder)
    return loaded.state, {name: net.state_dict() for name, net in loaded.modules.items()}


def cut(module, name, settings, folder, monkeypatch):
    """A run that is cut in its third round and goes on is the whole one to the last bit; the whole one."""
    machine = {} if "engine" in settings else {"update": "compiled"}
    settings = settings | machine | {"quiet": True, "seed": SEED, "save_every": 1}
    whole = etude.run(name, out=folder / "whole", **settings)
    real, calls = module.Worlds.drain, []

    def failing(worlds):
        calls.append(1)
        if len(calls) == 4:
            raise RunError("power cut")
        return real(worlds)

    with monkeypatch.context() as patch:
        patch.setattr(module.Worlds, "drain", failing)
        with pytest.raises(RunError, match="power cut"):
            etude.run(name, out=folder / "parts", **settings)
    parts = etude.resume(folder / "parts")
    assert log_of(parts) == log_of(whole)
    assert parts.metrics == whole.metrics
    (one, nets), (other, others) = state_of(whole), state_of(parts)
    torch.testing.assert_close(others, nets, rtol=0, atol=0)
    for key in one.keys() & {"optimizer", "actor_optimizer", "temperature_optimizer"}:
        assert one[key]["state"]
        torch.testing.assert_close(other[key], one[key], rtol=0, atol=0)
    return whole


def refused(refuse, *others):
    """Several ranks and accelerators are refused, each in a sentence."""
    from types import SimpleNamespace

    for world, device, said in ((2, "cpu", "on one rank, and there are 2; leave it out"), (1, "cuda", "--device cpu$")):
        with pytest.raises(UserError, match=said):
            refuse(SimpleNamespace(world=world, device=torch.device(device)), *others)
    refuse(SimpleNamespace(world=1, device=torch.device("cpu")), *others)
