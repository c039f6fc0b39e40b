"""The captioner: the image enters once, torch's LSTM says the same, captions are read, said, and scored."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import etude
from etude.core import checkpoint
from etude.core.errors import UserError
from etude.core.randomness import fold
from etude.core.spec import Spec
from etude.data.batches import Stream
from etude.sequence import captioner
from etude.sequence.captioner import Captioner, Config, build, describe, exact, likelihood, look, total_nats
from etude.sequence.parts.baselines import of_other_images
from etude.sequence.parts.captions import Part, Vocabulary, read, spelled

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
SMALL = {
    "width": 5,
    "embedding": 6,
    "batch": 3,
    "steps": 4,
    "clip_norm": 0.5,
    "learning_rate": 0.01,
    "evaluate_every": 3,
}
WORDS = ["a red ball", "a blue box", "two balls"]


def write(folder, count=20, end="captions.tsv", mark="\t", head=""):
    """Coloured squares, each with one or two captions."""
    folder.mkdir(exist_ok=True)
    dice, lines = np.random.default_rng(0), [head] if head else []
    for i in range(count):
        Image.fromarray(dice.integers(0, 255, (9, 12, 3), np.uint8)).save(folder / f"{i:02d}.png")
        lines.append(f"{i:02d}.png{mark}{WORDS[i % 3]}")
        if i % 4 == 0:
            lines.append(f"{i:02d}.png{mark}it is {WORDS[i % 3]}")
    (folder / end).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def run(folder, seed=3, **settings):
    return etude.run(
        "sequence/captioner", out=folder / "run", seed=seed, quiet=True, threads=1,
        **{"data": write(folder / "images"), **SMALL, **settings},
    )  # fmt: skip


def network(**settings):
    torch.manual_seed(0)
    words = Vocabulary.of(WORDS, "words")
    spec = Spec((3, 28, 28), (), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), {"vocabulary": words.state()})
    return build(Config(**{**SMALL, **settings}), spec)["model"].double(), words


class Plain(nn.Module):
    """The decoder from torch's module, the image as its first input or its first state."""

    def __init__(self, of: Captioner, cell="lstm", dropout=0.0):
        super().__init__()
        self.inject, self.chance, self.cnn = of.inject, dropout, of.cnn
        self.embedding = nn.Embedding(*of.embedding.weight.shape)
        self.recurrent = KINDS[cell](of.recurrent.input_size, of.recurrent.width, batch_first=True)
        self.readout = nn.Linear(of.recurrent.width, of.readout.out_features)
        self.to(of.readout.weight.dtype).load_state_dict(of.state_dict())

    def forward(self, features, tokens):
        drop = lambda x: F.dropout(x, self.chance, self.training)  # noqa: E731
        if self.inject == "input":
            _, state = self.recurrent(drop(features)[:, None])
        else:
            state = (features[None], torch.zeros_like(features)[None])
            state = state if isinstance(self.recurrent, nn.LSTM) else state[0]
        return self.readout(drop(self.recurrent(drop(self.embedding(tokens)), state)[0]))


@pytest.mark.parametrize("inject", ["input", "state"])
@pytest.mark.parametrize("cell", list(KINDS))
def test_it_equals_torch(cell, inject):
    model, words = network(cell=cell, inject=inject)
    tokens, targets = words.encode(WORDS)
    features = torch.randn(3, 6 if inject == "input" else 5, dtype=torch.float64, requires_grad=True)
    found = []
    for which in (model, Plain(model, cell)):
        logits = which(features, tokens)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100)
        rest = [p for name, p in sorted(which.named_parameters()) if not name.startswith("cnn")]
        found.append([logits, likelihood(logits, targets), loss, *torch.autograd.grad(loss, [features, *rest])])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[0][2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("inject", ["input", "state"])
def test_the_image_enters_exactly_once(inject):
    """From the state behind the image on, nothing asks for it: all of its gradient goes through that state, and a constant one
    leaves none. Every token's logits depend on it."""
    model, words = network(inject=inject)
    tokens, _ = words.encode(WORDS)
    images = torch.rand(3, 3, 28, 28, dtype=torch.float64, requires_grad=True)
    state = model.begin(look(model, images))
    logits, _ = model.speak(tokens, tuple(part.detach() for part in state))
    assert all(
        g is None for g in torch.autograd.grad(logits.sum(), [images, *model.cnn.parameters()], allow_unused=True)
    )
    behind = tuple(part.detach().requires_grad_() for part in state)
    weight = torch.randn(3, tokens.shape[1], words.size, dtype=torch.float64)
    back = torch.autograd.grad((model.speak(tokens, behind)[0] * weight).sum(), behind)
    (through,) = torch.autograd.grad(sum((a * b).sum() for a, b in zip(state, back)), images)
    (whole,) = torch.autograd.grad((model(look(model, images), tokens) * weight).sum(), images)
    torch.testing.assert_close(through, whole, rtol=1e-10, atol=1e-14)
    for t in range(tokens.shape[1]):
        (alone,) = torch.autograd.grad(model(look(model, images), tokens)[0, t].square().sum(), images)
        assert alone[0].any()
        assert not alone[1:].any()


def test_frames_are_looked_at_one_by_one_or_together():
    """The CNN of each frame of a film equals the CNN of all frames as one batch."""
    model, _ = network()
    film = torch.rand(2, 4, 3, 28, 28, dtype=torch.float64)
    together = look(model, film.flatten(0, 1)).view(2, 4, -1)
    alone = torch.stack([torch.stack([look(model, frame[None])[0] for frame in row]) for row in film])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(of_other_images(model, film[0])[1:], together[0, :-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inject", ["input", "state"])
def test_a_caption_is_said_token_by_token(inject):
    """The greedy caption from the whole text so far, and its probability as a product; cut behind the longest one known."""
    model, words = network(inject=inject)
    images = torch.rand(40, 3, 1, 1, dtype=torch.float64) * torch.rand(40, 3, 28, 28, dtype=torch.float64).round()
    with torch.no_grad():
        for p in model.recurrent.parameters():
            p.mul_(4)
        model.readout.weight.mul_(6)
        model.readout.bias[1] += 1.0  # END
    told = describe(model, images, words)
    assert len({caption for caption, _ in told}) > 3
    ends = 0
    for image, (caption, p) in zip(images, told):
        ids, total = [0], 1.0
        while len(ids) < words.longest + 2 and ids[-1] != 1:
            with torch.no_grad():
                row = model(look(model, image[None]), torch.tensor([ids]))[0, -1].softmax(-1)
            ids.append(int(row.argmax()))
            total *= float(row.max())
        ends += ids[-1] == 1
        assert caption == " ".join(words.tokens[i - 3] if i > 2 else "\ufffd" for i in ids[1:] if i != 1)
        assert p == pytest.approx(total, rel=1e-9)
    assert 0 < ends < 40
    assert exact([("a", 1.0), ("b", 1.0)], [("b", "a"), ("c",)]) == 0.5


def test_captions_become_tokens():
    words = Vocabulary.of(["ab", "b"], "characters")
    x, y = words.encode(["ab", "b", "bx"])
    assert x.tolist() == [[0, 3, 4], [0, 4, 1], [0, 4, 2]]
    assert y.tolist() == [[3, 4, 1], [4, 1, -100], [4, 2, 1]]
    assert (words.size, words.longest) == (5, 2)
    assert words.decode([4, 3, 1, 3]) == "ba"
    assert Vocabulary.of(["to be", "be"], "words").decode([4, 3, 2, 1]) == "to be \ufffd"
    assert Vocabulary(**words.state()).encode(["ab"])[0].tolist() == [[0, 3, 4]]


def test_classes_and_own_folders_are_read(tmp_path):
    assert [spelled(name) for name in ("0", "7", "T-shirt_top", "10")] == ["zero", "seven", "t-shirt top", "10"]
    digits = read("digits", 28)
    plain = etude.data.images("digits", 28)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert digits.test.captions == [(names[y],) for y in plain.test.y.tolist()]
    assert torch.equal(digits.validation.x, plain.validation.x)
    for end, mark, head in (
        ("captions.tsv", "\t", ""),
        ("captions.txt", ",", "image,caption"),
        ("captions.csv", "#0\t", ""),
    ):
        folder = tmp_path / end
        data = read(write(folder, end=end, mark=mark, head=head), 28)
        assert data.train.x.shape == (16, 3, 28, 28)
        assert data.train.captions[4] == (WORDS[1], f"it is {WORDS[1]}")
        assert data.validation.captions[0] == (WORDS[8 % 3], f"it is {WORDS[8 % 3]}")
        assert data.test.captions == [(WORDS[0],), (WORDS[1],)]
        middle = Image.open(folder / "09.png").crop((1, 0, 10, 9)).resize((28, 28), Image.Resampling.BILINEAR)
        difference = data.test.x[0].float() - torch.from_numpy(np.asarray(middle).copy()).permute(2, 0, 1)
        assert difference.abs().mean() < 12
    (folder / "captions.csv").write_text("00.png\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1, has no image and caption"):
        read(str(folder), 28)
    (folder / "captions.csv").write_text("00.png,a\nno.png,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="names the image no.png"):
        read(str(folder), 28)
    (folder / "captions.csv").write_text("00.png,a\n", encoding="utf-8")
    with pytest.raises(UserError, match="at least ten"):
        read(str(folder), 28)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"inject": "state", "cell": "gru", "level": "words", "examples": 7},
        {"dropout": 0.3, "clip_norm": 100.0, "level": "words"},
    ],
)
def test_loop_equals_a_plain_one(settings, tmp_path, monkeypatch):
    """Four updates with torch's decoder, Adam written out, on the same batches and dropout; every caption is learned."""
    judged = []
    monkeypatch.setattr(captioner, "exact", lambda said, captions: judged.append(captions) or exact(said, captions))
    result = run(tmp_path, **settings)
    config = Config(**{"data": write(tmp_path / "images"), **SMALL, **settings})
    data = read(config.data, 28)
    count = config.examples or len(data.train.x)
    pairs = [(i, c) for i in range(count) for c in data.train.captions[i]]
    words = Vocabulary.of([c for _, c in pairs], config.level)
    torch.manual_seed(fold(3, 0, 0, "init"))
    spec = Spec(data.spec.shape, (), data.spec.mean, data.spec.std, {"vocabulary": words.state()})
    ours = build(config, spec)["model"].double()
    model = Plain(ours, config.cell, config.dropout)
    order = Stream(len(pairs), 3, 3)
    moments = {k: (torch.zeros_like(p), torch.zeros_like(p)) for k, p in model.named_parameters()}
    losses = []
    for step in range(4):
        chosen = [pairs[i] for i in order.indices(step).tolist()]
        torch.manual_seed(fold(3, step, 0, "step"))  # dropout's
        tokens, targets = words.encode([caption for _, caption in chosen])
        x = data.train.x[[i for i, _ in chosen]].double() / 255
        logits = model(model.cnn(x), tokens)
        kept = targets != -100
        loss = -logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None]).mean()
        parameters = dict(model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shrink, k = min(1.0, config.clip_norm / (norm + 1e-6)), step + 1
        rate = 0.01 * (1 - (1 - config.final_learning_rate) * step / 4)
        with torch.no_grad():
            for key, p in parameters.items():
                g, (m, v) = gradients[key] * shrink, moments[key]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.sub_(rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8))
        losses.append(float(loss.detach()))
    trained = checkpoint.load(result.folder / "checkpoints")[1]["model"]
    for key, p in model.state_dict().items():
        torch.testing.assert_close(trained[key], p, rtol=1e-7, atol=1e-8, msg=key)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-8)
    ours.load_state_dict(model.state_dict())
    said = exact(describe(ours, data.validation.x, words), data.validation.captions)
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [3, 4]
    assert rows[-1]["validation_accuracy"] == said
    test = data.test.captions
    assert judged == [data.validation.captions] * 2 + [test, test]  # nothing is judged by what is learned


def test_reported_numbers_are_those_of_the_saved_network(tmp_path):
    """Caption by caption from the saved weights, on the digits' test images; the commonest caption is counted."""
    data = read("digits", 28)
    every = [c for row in data.train.captions for c in row]
    count = next(n for n in range(100, len(every)) if max(every[:n], key=every[:n].count) != every[0])
    every = every[:count]  # the first caption is not the commonest
    result = run(tmp_path, data="digits", steps=25, batch=32, width=24, learning_rate=0.01, examples=count)
    model = etude.load(result.folder).model
    words = Vocabulary.of(every, "characters")
    assert etude.load(result.folder).spec.extra["vocabulary"] == words.state()
    said = describe(model, data.test.x, words)
    right = [caption == theirs[0] for (caption, _), theirs in zip(said, data.test.captions)]
    total = count = 0
    with torch.no_grad():
        for x, (caption,) in zip(data.test.x, data.test.captions):
            ids = [3 + words.tokens.index(c) for c in caption]
            logs = model(look(model, x[None]), torch.tensor([[0, *ids]]))[0].log_softmax(-1)
            total -= float(logs[torch.arange(len(ids) + 1), torch.tensor([*ids, 1])].double().sum())
            count += len(ids) + 1
    commonest = max(dict.fromkeys(every), key=every.count)
    assert result.metrics["test_accuracy"] == pytest.approx(sum(right) / len(right))
    assert result.metrics["test_nats_per_token"] == pytest.approx(total / count, rel=1e-5)
    share = sum(row[0] == commonest for row in data.test.captions) / len(data.test.captions)
    assert result.metrics["test_commonest_accuracy"] == pytest.approx(share)
    assert total_nats(model, Part(data.test.x[:9], data.test.captions[:9]), words)[1] == sum(
        len(row[0]) + 1 for row in data.test.captions[:9]
    )


def test_pictures_get_captions(tmp_path):
    loaded = etude.load(run(tmp_path, level="words").folder)
    folder = tmp_path / "images"
    rows = loaded.predict(folder)
    assert [row["file"] for row in rows] == [str(folder / f"{i:02d}.png") for i in range(20)]
    data = read(str(folder), 28)
    words = Vocabulary(**loaded.spec.extra["vocabulary"])
    assert [rows[i]["caption"] for i in (9, 19)] == [c for c, _ in describe(loaded.model, data.test.x, words)]
    (alone,) = loaded.predict(str(folder / "09.png"))
    assert (alone["caption"], alone["probability"]) == (
        rows[9]["caption"],
        pytest.approx(rows[9]["probability"], rel=1e-5),
    )
    (array,) = loaded.predict(data.test.x[0])
    assert array["caption"] == alone["caption"]
    with pytest.raises(UserError, match="does not exist"):
        loaded.predict(tmp_path / "no.png")
