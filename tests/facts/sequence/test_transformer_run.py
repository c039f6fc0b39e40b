"""The Transformer's training against a plain loop around torch.nn.Transformer, its numbers from the saved weights, its commands."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import etude
from etude import cli
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.sequence.transformer import Architecture
from etude.sequence.transformer import train as method

plain = runpy.run_path(str(Path(__file__).with_name("plain_transformer.py")))
SMALL = {"layers": 2, "heads": 2, "width": 8, "batch": 4, "steps": 7, "longest": 5, "warmup_steps": 3, "beams": 3}
SMALL |= {"context": 8, "evaluate_every": 3, "learning_rate": 0.7, "length_penalty": 0.4}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def _few(monkeypatch):
    """Six strings of the reversal to validate with, and six to test with, in place of 500."""
    from etude.sequence.parts import translating

    many = translating.reversals
    monkeypatch.setattr(translating, "reversals", lambda count, *rest: many(min(count, 6), *rest))


def run(folder, seed=3, **settings):
    return etude.run(
        "sequence/transformer", out=folder / "run", seed=seed, quiet=True, threads=1, **{**SMALL, **settings}
    )


def strings(count, longest, dice):
    """Random strings, as ids with EOS, and themselves backwards: the documented draw of the reversal."""
    lengths = torch.randint(1, longest + 1, (count,), generator=dice).tolist()
    letters = torch.randint(26, (count, longest), generator=dice).tolist()
    rows = [row[:n] for row, n in zip(letters, lengths)]
    return [([i + 3 for i in row] + [2], [i + 3 for i in reversed(row)] + [2]) for row in rows]


def padded(rows):
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def sides(pairs):
    """source, before, after, each padded."""
    return padded([a for a, _ in pairs]), padded([[1, *b[:-1]] for _, b in pairs]), padded([b for _, b in pairs])


def trained(result):
    return checkpoint.load(result.folder / "checkpoints")[1]["model"]


def rows_of(result):
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def few_held(part, longest):
    """What six draws instead of 500 give."""
    return strings(6, longest, generator(0, 0, 0, part))


def nats_of(model, pairs):
    source, before, after = sides(pairs)
    model.eval()
    with torch.no_grad():
        logits = model(source, before).flatten(0, 1)
    model.train()
    return float(F.cross_entropy(logits, after.flatten(), ignore_index=0))


def text(ids):
    return "".join(LETTERS[i - 3] for i in ids if i > 2)


def translations(model, pairs, count, beams, penalty):
    model.eval()
    told = [text(plain["written"](model, torch.tensor(a), count, beams, penalty)) for a, _ in pairs]
    model.train()
    return told


CASES = {
    "paper": {},
    "learned": {"positions": "learned", "norm_placement": "pre"},
    "concatenated": {"positions": "concatenated", "smoothing": 0.0},
    "appended": {"positions": "appended", "norm_placement": "pre", "smoothing": 0.4},
    "none": {"positions": "none", "layers": 1, "warmup_steps": 20},
    "dropout": {"dropout": 0.3, "batch": 1},  # one string has no padding, so that both draw the same random numbers
    "dropout_pre": {"dropout": 0.3, "batch": 1, "norm_placement": "pre"},
}


@pytest.mark.usefixtures("_float64", "_few")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.long] * (case in ("appended", "none", "dropout_pre"))) for case in CASES],
)
def test_loop_equals_a_plain_one_around_torch_transformer(case, tmp_path):
    """Seven steps on padded batches: cross_entropy with label smoothing, the paper's rate, Adam in plain arithmetic."""
    settings = {
        **SMALL,
        "smoothing": 0.1,
        "norm_placement": "post",
        "positions": "sinusoidal",
        "dropout": 0.0,
        **CASES[case],
    }
    result = run(tmp_path, **CASES[case])
    of = Architecture(
        29, settings["context"], settings["layers"], settings["heads"], settings["width"], settings["positions"],
        settings["norm_placement"], settings["dropout"],
    )  # fmt: skip
    torch.manual_seed(fold(3, 0, 0, "init"))
    config = method.Config(**{**SMALL, **CASES[case]})
    ours = method.build(config, Spec(extra={"architecture": vars(of)}))["model"]
    model = plain["Plain"](of).double()
    model.load(ours.state_dict())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_like_ours()}
    losses, validations = [], {}
    for step in range(7):
        source, before, after = sides(strings(settings["batch"], settings["longest"], generator(3, step, 0, "strings")))
        torch.manual_seed(fold(3, step, 0, "step"))  # dropout's
        logits = model(source, before)
        loss = F.cross_entropy(
            logits.flatten(0, 1), after.flatten(), ignore_index=0, label_smoothing=settings["smoothing"]
        )
        parameters = dict(model.named_like_ours())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        k, warm = step + 1, settings["warmup_steps"]
        rate = 0.7 * settings["width"] ** -0.5 * min(k**-0.5, k * warm**-1.5)
        with torch.no_grad():
            for name, p in parameters.items():
                g, (m, v) = gradients[name], moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.98).add_(0.02 * g * g)
                p.sub_(rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.98**k)).sqrt() + 1e-9))
        losses.append(loss.item())
        if k % 3 == 0 or k == 7:
            validations[k] = nats_of(model, few_held("validation", settings["longest"]))
    saved = trained(result)
    for name, p in model.named_like_ours():
        if (
            "in_proj_bias" in name
        ):  # a key's bias shifts all scores alike: its gradient is rounding, which Adam enlarges
            keep = torch.arange(len(p)) // settings["width"] != 1
            p, saved[name] = p[keep], saved[name][keep]
        torch.testing.assert_close(saved[name], p.detach(), rtol=1e-6, atol=1e-7, msg=name)
    told = rows_of(result)
    assert [row["loss"] for row in told] == pytest.approx(losses, rel=1e-7)
    assert {
        row["step"]: row["validation_nats_per_token"] for row in told if "validation_nats_per_token" in row
    } == pytest.approx(validations, rel=1e-6)


@pytest.mark.usefixtures("_float64", "_few")
@pytest.mark.parametrize("settings", [{}, pytest.param({"beams": 1, "norm_placement": "pre"}, marks=pytest.mark.long)])
def test_reported_numbers_from_the_saved_weights(settings, tmp_path):
    """exact, BLEU and nats of the test strings, translated by torch's network run anew for every hypothesis and token."""
    given = {"longest": 3, "steps": 40, "learning_rate": 2.0, "warmup_steps": 20, **settings}
    result = run(tmp_path, **given)
    whole = {**SMALL, **given}
    model = plain["Plain"](
        Architecture(29, 8, 2, 2, 8, norm_placement=whole.get("norm_placement", "post"), dropout=0.0)
    )
    model = model.double()
    model.load(trained(result))
    pairs = few_held("test", 3)
    told = translations(model, pairs, 4, whole["beams"], whole["length_penalty"])
    right = [text(b) for _, b in pairs]
    assert result.metrics["test_exact_match"] == sum(a == b for a, b in zip(told, right)) / 6
    assert result.metrics["test_nats_per_token"] == pytest.approx(nats_of(model, pairs), rel=1e-7)
    assert "test_bleu" not in result.metrics  # strings have no words
    found = etude.load(result.folder)
    assert (
        found.generate([text(a) for a, _ in pairs], beams=whole["beams"], length_penalty=whole["length_penalty"])
        == told
    )
    last = rows_of(result)[-1]
    greedy = translations(model, few_held("validation", 3), 4, 1, 1.0)
    assert (
        last["validation_exact_match"] == sum(a == text(b) for a, (_, b) in zip(greedy, few_held("validation", 3))) / 6
    )


@pytest.mark.usefixtures("_few")
def test_reported_translations_follow_the_rules(monkeypatch, tmp_path):
    """The test is translated with --beams and --length-penalty, validations greedily."""
    from etude.sequence.parts import translating

    asked, search = [], translating.beam_search
    monkeypatch.setattr(
        translating, "beam_search",
        lambda *given, **rules: asked.append((rules["beams"], rules["length_penalty"])) or search(*given, **rules),
    )  # fmt: skip
    run(tmp_path)
    assert asked == [(1, 1.0)] * 3 + [(3, 0.4)]


def parallel(folder):
    """Four sentences a part in two languages, and what training makes of them."""
    folder.mkdir()
    for part in ("train", "val", "test"):
        (folder / f"{part}.en").write_text("a cat\nthe dog sleeps\na man\nno\n", encoding="utf-8")
        (folder / f"{part}.de").write_text("eine Katze\nder Hund schläft\nein Mann\nnein\n", encoding="utf-8")
    return str(folder)


@pytest.mark.usefixtures("_float64")
def test_loop_learns_from_parallel_text(tmp_path):
    """The first loss on a folder of parallel text is torch's on the same pairs; the other direction has another."""
    data = parallel(tmp_path / "text")
    settings = {"data": data, "vocabulary": 256, "longest": 30, "batch": 4, "steps": 1, "context": 40}
    result = run(tmp_path, **settings)
    spec = json.loads((result.folder / "spec.json").read_text(encoding="utf-8"))
    model = plain["Plain"](Architecture(**spec["extra"]["architecture"])).double()
    torch.manual_seed(fold(3, 0, 0, "init"))
    model.load(method.build(method.Config(**SMALL), Spec(extra=spec["extra"]))["model"].state_dict())
    lines = [(Path(data) / f"train.{side}").read_text(encoding="utf-8").splitlines() for side in ("en", "de")]
    tokens = method.Special(method.tokenizer(spec["extra"]["tokenizer"]))
    source, before, after = sides([[tokens.encode(one).tolist() for one in pair] for pair in zip(*lines)])
    loss = F.cross_entropy(model(source, before).flatten(0, 1), after.flatten(), ignore_index=0, label_smoothing=0.1)
    assert rows_of(result)[0]["loss"] == pytest.approx(loss.item(), rel=1e-9)
    other = run(tmp_path / "other", **settings, languages="de-en")
    assert not math.isclose(rows_of(other)[0]["loss"], loss.item(), rel_tol=1e-4)


@pytest.mark.usefixtures("_few")
def test_sample_translates_and_draws_who_looked_where(tmp_path, capsys):
    result = run(tmp_path, positions="learned")
    assert cli.main(["sample", str(result.folder), "--text", "abc", "--beams", "5"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == etude.load(result.folder).generate(["abc"], beams=5)[0]
    assert etude.sample(result.folder, text="abc").text == said  # in Python too
    assert cli.main(["sample", str(result.folder), "--text", "abc", "--beams", "1000000"]) == 2  # no memory has these
    assert "beams" in capsys.readouterr().err
    drawn = [path for path in result.folder.rglob("attention_*.png") if "artifacts" not in path.parts]
    assert {path.stem for path in drawn} == {"attention_encoder", "attention_decoder", "attention_cross"}
    for path in drawn:
        with Image.open(path) as image:
            assert image.width > 100
    assert cli.main(["sample", str(result.folder), "--text", "abcdefghij"]) == 2
    assert "a sentence of 11 tokens is longer than the 8 learned positions" in capsys.readouterr().err


@pytest.mark.usefixtures("_few")
def test_what_cannot_be_trained_is_refused_first(tmp_path):
    with pytest.raises(UserError, match="a sentence of 6 tokens is longer than the 5 learned positions"):
        run(tmp_path, positions="learned", context=5)
    with pytest.raises(UserError, match="width 8 is not divisible by 3 heads"):
        run(tmp_path / "heads", heads=3)
