"""Schedules in closed form, the coins, what is mixed against a walk that is written out, the loop, and the reported numbers."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import lambertw

import etude
from etude.core import checkpoint
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.sequence import scheduled_sampling as method
from etude.sequence.parts import translating
from etude.sequence.parts.translating import BOS, EOS, PAD, noisy_copies, read_task, token_nats
from etude.sequence.scheduled_sampling import given_share, mixed, sigmoid_pace, token_errors

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_translation.py")))
SMALL = {
    "width": 8,
    "embedding": 5,
    "batch": 4,
    "steps": 7,
    "longest": 5,
    "clip_norm": 0.3,
    "learning_rate": 0.03,
    "half": 3,
}
SMALL |= {"evaluate_every": 3, "beta2": 0.9, "final_learning_rate": 0.2}


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Sixteen held strings instead of 500."""
    monkeypatch.setattr(
        translating, "noisy_copies", lambda count, *rest: noisy_copies(count, *rest)[: 16 if count == 500 else None]
    )


def network(seed=0, **settings):
    torch.manual_seed(seed)
    model = method.build(method.Config(**{**SMALL, **settings}), Spec(extra={"vocabulary": 29}))["model"].double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model


def batch_of(count=6):
    return read_task("noisy_copy", "en-de", 300, 5, count, 1)(0)


@pytest.mark.parametrize("half", [1, 3, 150, 4000])
def test_schedules_are_the_papers(half):
    """§2.4 of the paper: max(ε, k − c i), kⁱ, and k / (k + e^{i/k}) with k ≥ 1, each 1/2 at `half`."""
    k = half / float(np.real(lambertw(half)))
    assert sigmoid_pace(half) == pytest.approx(k, rel=1e-12)
    assert k >= 1
    for step in (0, 1, half, 2 * half, 3 * half):
        assert given_share("linear", step, half, 0.1) == pytest.approx(max(0.1, 1 - (0.5 / half) * step))
        assert given_share("exponential", step, half) == pytest.approx((0.5 ** (1 / half)) ** step)
        assert given_share("inverse_sigmoid", step, half) == pytest.approx(k / (k + math.exp(step / k)), rel=1e-9)
        assert given_share("always", step, half) == 1
        assert given_share("never", step, half) == 0
    assert all(
        given_share(kind, half, half) == pytest.approx(0.5) for kind in ("linear", "exponential", "inverse_sigmoid")
    )
    assert given_share("inverse_sigmoid", 10**9, half) < 1e-200


def test_with_every_coin_heads_it_is_teacher_forcing_bit_for_bit():
    model, batch = network(), batch_of()
    read = mixed(model, batch, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(read, batch.before)
    losses, gradients = [], []
    for before in (read, batch.before):
        loss = token_nats(model(batch.source, batch.lengths, before), batch.after)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def walk(model, source, length, given, coins, choose):
    """One sentence, one token after another, the whole prefix read anew: what is read."""
    read = [BOS]
    for t in range(1, len(given)):
        logits = model(source[None], length[None], torch.tensor([read]))[0, -1]
        read.append(int(given[t]) if coins[t] else choose(logits))
    return read


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 0.8])
def test_what_is_read_is_a_walk_with_a_coin_a_token(epsilon):
    """E54: coins are tossed for each token; ε = 0 is free running from the second token on."""
    model, batch = network().eval(), batch_of()
    coins = torch.rand(batch.before.shape, generator=torch.Generator().manual_seed(5)) < epsilon
    read = mixed(model, batch, epsilon, torch.Generator().manual_seed(5), argmax=True)
    for b in range(6):
        expected = walk(
            model, batch.source[b], batch.lengths[b], batch.before[b], coins[b], lambda logits: int(logits.argmax())
        )
        assert read[b].tolist() == expected
    given = (read == batch.before).float().mean(1)
    assert epsilon != 0.4 or len(set(given.tolist())) > 1


def test_coins_and_draws_have_their_probabilities():
    """Of 3,000 equal rows: heads within 4.5 standard errors of ε, and where tails fell the network's probabilities."""
    model, one = network(seed=2).eval(), batch_of(1)
    many = translating.Batch(*(part.expand(3000, *part.shape[1:]) for part in one))
    many = many._replace(before=torch.full((3000, 2), 20).index_fill(1, torch.tensor([0]), BOS))
    read = mixed(model, many, 0.7, torch.Generator().manual_seed(0))
    p = model(one.source, one.lengths, torch.tensor([[BOS]]))[0, 0].softmax(-1)
    expected = 0.3 * p
    expected[20] += 0.7
    found = torch.bincount(read[:, 1], minlength=29) / 3000
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / 3000).sqrt() + 1e-3).all()
    assert (read[:, 0] == BOS).all()


def test_no_gradient_goes_through_what_was_drawn():
    """The gradient is that of the loss on the mixed row as a constant: nothing of how it was drawn is in the graph."""
    model, batch = network().train(), batch_of()
    read = mixed(model, batch, 0.2, torch.Generator().manual_seed(1))
    assert not read.is_floating_point()
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not torch.equal(read, batch.before)


def descended(epsilon):
    """Logits of q(second | read) at the least expected loss; both first letters are equally likely."""
    second = torch.randn(2, 2, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([second], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        log_p, total = second.log_softmax(-1), torch.zeros((), dtype=torch.float64)
        for y in (0, 1):
            for read in (0, 1):
                total = total - 0.5 * (epsilon * (read == y) + (1 - epsilon) * 0.5) * log_p[read, y]
        optimizer.zero_grad()
        total.backward()
        return total

    optimizer.step(loss)
    return second.detach()


def test_the_objective_is_not_consistent():
    """E54, Huszár: of "aa" and "bb", equally likely, free running learns p(second | first) = 1/2, which writes "ab" too.

    The expected loss of a table q(first), q(second | read), the first letter drawn from q when tails fell: its minimum by
    descent, against ε = 1, whose minimum is the distribution of the data.
    """
    for epsilon, expected in ((1.0, 1.0), (0.0, 0.5), (0.5, 0.75)):
        second = descended(epsilon)
        assert second.softmax(-1).diagonal().tolist() == pytest.approx([expected] * 2, abs=1e-4)


def test_noisy_copies_have_their_channel():
    pairs = noisy_copies(20_000, 6, torch.Generator().manual_seed(0))
    same = np.mean([a == b for source, target in pairs for a, b in zip(source, target)])
    stays = np.mean([a == b for _, target in pairs for a, b in itertools.pairwise(target)])
    assert same == pytest.approx(0.6 + 0.4 / 6, abs=0.01)
    assert stays == pytest.approx(0.8 + 0.2 / 6, abs=0.01)
    assert {letter for source, target in pairs for letter in source + target} == set("abcdef")
    lengths = np.bincount([len(target) for _, target in pairs], minlength=7)[1:]
    assert abs(lengths - 20_000 / 6).max() < 4.5 * math.sqrt(20_000 / 6)
    assert all(len(source) == len(target) for source, target in pairs)


def run(folder, seed=3, **settings):
    return etude.run(
        "sequence/scheduled_sampling", out=folder, seed=seed, quiet=True, threads=1, **{**SMALL, **settings}
    )


def errors_of(model, pairs):
    """Free, forced and copied errors, token by token."""
    wrong, count = [0, 0, 0], 0
    for a, b in pairs:
        source, lengths, before, after = plain.tensors([(plain.numbers(a) + [EOS], plain.numbers(b))])
        forced = model(source, lengths, before)[0].argmax(-1)
        read, own = [BOS], []
        for _ in range(after.shape[1]):
            own.append(int(model(source, lengths, torch.tensor([read]))[0, -1].argmax()))
            read.append(own[-1])
        for t, token in enumerate(after[0].tolist()):
            told = (own[t], int(forced[t]), int(source[0, t]))
            wrong = [w + (said != token) for w, said in zip(wrong, told)]
            count += 1
    return [w / count for w in wrong]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 100.0},
        {"forcing": "linear", "least": 0.3, "attention": "none"},
        {"forcing": "exponential", "guess": "argmax", "dropout": 0.3},
        {"forcing": "never"},
    ],
    ids=str,
)
def test_loop_equals_a_plain_one(settings, tmp_path):
    result, config = (
        run(tmp_path / "run", **settings),
        {"forcing": "inverse_sigmoid", "least": 0.0, **SMALL, **settings},
    )
    torch.manual_seed(fold(3, 0, 0, "init"))
    model = method.build(method.Config(**{**SMALL, **settings}), Spec(extra={"vocabulary": 29}))["model"].double()
    update, losses, shares, validations = plain.Updates(model, config, 7), [], [], {}
    held = {part: noisy_copies(500, 5, generator(0, 0, 0, part))[:16] for part in ("validation", "test")}
    for step in range(7):
        pairs = noisy_copies(4, 5, generator(3, step, 0, "strings"))
        source, lengths, before, after = plain.tensors([(plain.numbers(a) + [EOS], plain.numbers(b)) for a, b in pairs])
        share = {
            "linear": max(config["least"], 1 - step / 6),
            "exponential": 0.5 ** (step / 3),
            "inverse_sigmoid": 1
            / (1 + math.exp(step / (3 / float(np.real(lambertw(3))))) / (3 / float(np.real(lambertw(3))))),
            "never": 0.0,
        }[config["forcing"]]
        dice = generator(3, step, 0, "coins")
        coins = torch.rand(before.shape, generator=dice) < share
        coins[:, 0] = True
        torch.manual_seed(plain.seed_of_step(3, step))
        read = before.clone()
        model.eval()
        if not coins.all():
            for t in range(1, before.shape[1]):
                with torch.no_grad():
                    logits = model(source, lengths, read[:, :t])[:, -1]
                told = logits.argmax(-1)
                if config.get("guess") != "argmax":
                    told = torch.multinomial(logits.float().softmax(-1), 1, generator=dice)[:, 0]
                read[:, t] = torch.where(coins[:, t], before[:, t], told)
        loss = plain.loss_of(model.train()(source, lengths, read), after, 0.0)
        update(loss, step)
        losses.append(float(loss.detach()))
        shares.append(share)
        if step in (2, 5, 6):
            with torch.no_grad():
                validations[step + 1] = errors_of(model.eval(), held["validation"])[:2]
    assert config["clip_norm"] > 1 or min(update.norms) > config["clip_norm"]
    trained = checkpoint.load(result.folder / "checkpoints")[1]["model"]
    for key, p in model.state_dict().items():
        torch.testing.assert_close(trained[key], p, rtol=1e-8, atol=1e-8, msg=key)
    told = plain.rows(result)
    assert [row["loss"] for row in told] == pytest.approx(losses, rel=1e-8)
    assert [row["epsilon"] for row in told] == pytest.approx(shares, rel=1e-9, abs=1e-12)
    logged = {
        r["step"]: [r["validation_free_error"], r["validation_forced_error"]]
        for r in told
        if "validation_free_error" in r
    }
    assert logged.keys() == validations.keys()
    assert all(logged[step] == pytest.approx(numbers) for step, numbers in validations.items())
    with torch.no_grad():
        assert [result.metrics[f"test_{name}_error"] for name in ("free", "forced", "copy")] == pytest.approx(
            errors_of(model.eval(), held["test"])
        )


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    result = run(tmp_path / "run", steps=30, width=16)
    model, pairs = etude.load(result.folder).model.eval(), noisy_copies(500, 5, generator(0, 0, 0, "test"))[:16]
    with torch.no_grad():
        exact, nats = plain.scores_of(model, pairs, 5)
        errors = errors_of(model, pairs)
    assert result.metrics["test_exact_match"] == exact
    assert result.metrics["test_nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert [result.metrics[f"test_{name}_error"] for name in ("free", "forced", "copy")] == pytest.approx(errors)
    assert len(result.metrics) == 5
    loaded = etude.load(result.folder)
    method.sample(loaded, method.Sample(text="aab", beams=2), tmp_path)
    assert (tmp_path / "sample.txt").read_text() == loaded.generate("aab", beams=2) + "\n"


def test_errors_do_not_depend_on_the_batch():
    model, task = network().train(), read_task("noisy_copy", "en-de", 300, 5, 4, 1)
    whole = token_errors(model, task, task.test)
    assert whole == pytest.approx(token_errors(model, task, task.test, size=3))
    assert model.training
    assert PAD == 0
