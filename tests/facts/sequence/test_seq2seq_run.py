"""The loop against a plain one, every reported number computed again, and what `etude sample` writes."""

from __future__ import annotations

import io
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
import torch

import etude
from etude import data
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.core.randomness import fold
from etude.core.spec import Spec
from etude.sequence import seq2seq
from etude.sequence.parts import translating

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "plain_translation.py")))
SMALL = {"width": 8, "embedding": 5, "batch": 4, "steps": 7, "longest": 4, "clip_norm": 0.3, "learning_rate": 0.03}
SMALL |= {"evaluate_every": 3, "beta2": 0.9, "final_learning_rate": 0.2, "beams": 1}


def run(folder, seed=3, **settings):
    return etude.run("sequence/seq2seq", out=folder, seed=seed, quiet=True, threads=1, **{**SMALL, **settings})


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Sixteen held strings instead of 500: the plain loop translates each of them alone."""
    drawn = translating.reversals
    monkeypatch.setattr(
        translating, "reversals", lambda count, *rest: drawn(count, *rest)[: 16 if count == 500 else None]
    )


def held(part):
    return plain.held(part, 4)[:16]


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 100.0},
        {"attention": "none", "label_smoothing": 0.2},
        {"dropout": 0.3, "cell": "lstm", "attention": "additive", "read_in": "layer"},
        {"read_in": "state", "attention": "values", "layers": 2, "dropout": 0.2},
    ],
    ids=str,
)
def test_loop_equals_a_plain_one(settings, tmp_path):
    """The network is the method's own (its equations have their tests); data, loss, clipping, Adam, rates and scores are not."""
    result, config = run(tmp_path / "run", **settings), {"label_smoothing": 0.0, **SMALL, **settings}
    torch.manual_seed(fold(3, 0, 0, "init"))
    model = seq2seq.build(seq2seq.Config(**{**SMALL, **settings}), Spec(extra={"vocabulary": 29}))["model"].double()
    update, losses, validations = plain.Updates(model, config, 7), [], {}
    for step in range(7):
        source, lengths, before, after = plain.tensors(plain.strings(3, step, 4, 4))
        torch.manual_seed(plain.seed_of_step(3, step))
        loss = plain.loss_of(model.train()(source, lengths, before), after, config["label_smoothing"])
        update(loss, step)
        losses.append(float(loss.detach()))
        if step in (2, 5, 6):
            with torch.no_grad():
                validations[step + 1] = plain.scores_of(model.eval(), held("validation"), 4)
    assert config["clip_norm"] > 1 or min(update.norms) > config["clip_norm"]
    trained = checkpoint.load(result.folder / "checkpoints")[1]["model"]
    for key, p in model.state_dict().items():
        torch.testing.assert_close(trained[key], p, rtol=1e-8, atol=1e-8, msg=key)
    told = plain.rows(result)
    assert [row["loss"] for row in told] == pytest.approx(losses, rel=1e-8)
    logged = {
        row["step"]: (row["validation_exact_match"], row["validation_nats_per_token"]) for row in told if len(row) > 2
    }
    assert logged.keys() == validations.keys()
    for step, numbers in validations.items():
        assert logged[step] == pytest.approx(numbers, rel=1e-6)
    with torch.no_grad():
        expected = plain.scores_of(model.eval(), held("test"), 4)
    assert result.metrics["test_exact_match"] == expected[0]
    assert result.metrics["test_nats_per_token"] == pytest.approx(expected[1], rel=1e-6)


def beam_of(model, text, beams, longest, penalty):
    """The best string of a network by a search that is written out, each hypothesis read anew."""
    source = torch.tensor([plain.numbers(text) + [2]])
    live, finished = [([1], 0.0)], []
    for length in range(1, longest + 2):
        before = torch.tensor([tokens for tokens, _ in live])
        many = len(before)
        given = source.expand(many, -1), torch.tensor([source.shape[1]]).expand(many)
        with torch.no_grad():
            log_p = model(*given, before)[:, -1].double().log_softmax(-1)
        children = [
            ([*tokens, v], total + float(log_p[i, v])) for i, (tokens, total) in enumerate(live) for v in range(29)
        ]
        children.sort(key=lambda child: -child[1])
        leaving = [c for c in children[:beams] if c[0][-1] == 2 or length == longest + 1]
        finished += [(total / length**penalty, tokens) for tokens, total in leaving]
        live = [child for child in children if child[0][-1] != 2][:beams]
        if len(finished) >= beams:
            break
    return "".join(chr(token - 3 + 97) for token in max(finished)[1] if token > 2)


@pytest.mark.parametrize(
    "settings", [{"beams": 3}, {"beams": 3, "length_penalty": 0.0}, {"beams": 2, "length_penalty": 3.0}], ids=str
)
def test_reported_numbers_are_those_of_the_saved_network(settings, tmp_path):
    """Translated with a beam that is written out, from the saved weights; the loss string by string."""
    result = run(tmp_path / "run", steps=40, longest=3, width=16, **settings)
    model, pairs = etude.load(result.folder).model.eval(), plain.held("test", 3)[:16]
    told = [beam_of(model, a, settings["beams"], 3, settings.get("length_penalty", 1.0)) for a, _ in pairs]
    assert result.metrics["test_exact_match"] == sum(said == b for said, (_, b) in zip(told, pairs)) / 16
    with torch.no_grad():
        assert result.metrics["test_nats_per_token"] == pytest.approx(plain.mean_nats(model, pairs), rel=1e-5)
    assert set(result.metrics) == {"test_exact_match", "test_nats_per_token"}
    options = seq2seq.Sample(beams=settings["beams"], length_penalty=settings.get("length_penalty", 1.0))
    assert seq2seq.generate(etude.load(result.folder), [a for a, _ in pairs], options) == told


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A hundred captions of Multi30k: German, and English as the target."""
    folder, pairs = tmp_path_factory.mktemp("captions"), data.parallel("multi30k").train[:100]
    for side, language in enumerate(("en", "de")):
        (folder / f"some.{language}").write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")
    return folder


def test_reported_bleu_is_sacrebleus(captions, tmp_path, monkeypatch):
    """On parallel text: BLEU of what the saved network translates the test to, and of each batch the pairs it holds."""
    result = run(tmp_path / "run", data=str(captions), languages="de-en", vocabulary=300, longest=150, steps=4, beams=2)
    loaded, pairs = etude.load(result.folder), data.parallel(captions, ("de", "en")).test
    told = seq2seq.generate(loaded, [a for a, _ in pairs], seq2seq.Sample(beams=2))
    assert set(result.metrics) == {"test_bleu", "test_unrelated_bleu", "test_exact_match", "test_nats_per_token"}
    targets = [b for _, b in pairs]
    assert result.metrics["test_bleu"] == pytest.approx(sacrebleu.corpus_bleu(told, [targets]).score)
    others = [targets[(i + 1) % len(targets)] for i in range(len(targets))]
    assert result.metrics["test_unrelated_bleu"] == pytest.approx(sacrebleu.corpus_bleu(told, [others]).score)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(a for a, _ in pairs) + "\n"))
    assert seq2seq.sample(loaded, seq2seq.Sample(text="-", beams=2), tmp_path) == "\n".join(told)
    assert (tmp_path / "sample.txt").read_text(encoding="utf-8") == "\n".join(told) + "\n"
    assert seq2seq.sample(loaded, seq2seq.Sample(text=pairs[1][0], beams=2), tmp_path) == told[1]
    assert (tmp_path / "sample.txt").read_text(encoding="utf-8") == told[1] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(UserError, match="there is nothing to translate"):
        seq2seq.sample(loaded, seq2seq.Sample(text="-"), tmp_path)


def test_a_string_of_other_letters_is_refused(tmp_path):
    loaded = etude.load(run(tmp_path / "run", steps=1).folder)
    with pytest.raises(UserError, match="the character 'A'"):
        loaded.generate("A")
    assert loaded.generate("abc", beams=1) == seq2seq.generate(loaded, ["abc"], seq2seq.Sample(beams=1))[0]
