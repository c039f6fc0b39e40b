"""A recurrent language model's training written out with torch's own modules, against which the loops of the room are held.

Not a test itself: `runpy.run_path` brings it into the tests of the methods. Only the documented random streams are etude's: the
offset of a pass, and the seeds of the start and of a step.
"""

import importlib
import json
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import etude
from etude.core import checkpoint
from etude.core.randomness import fold, generator
from etude.core.spec import Spec
from etude.data import texts

SMALL = {"width": 6, "embedding": 5, "batch": 3, "context": 7, "steps": 9, "clip_norm": 0.1, "learning_rate": 0.03}
SMALL |= {"evaluate_every": 4, "beta2": 0.9, "final_learning_rate": 0.2}
LENGTH = 120
"""90 % of it: three rows of 36, four chunks of 7 in a pass, so that nine steps begin three passes."""


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return str(folder / "text.txt")


def run(name, folder, text=None, seed=3, **settings):
    return etude.run(
        f"sequence/{name}", out=folder / "run", seed=seed, quiet=True, threads=1,
        data=write(folder, text or texts.house()[:LENGTH]), **{**SMALL, **settings},
    )  # fmt: skip


def rows(result):
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def cut(text):
    a, b = math.floor(0.9 * len(text)), math.floor(0.95 * len(text))
    return text[:a], text[a:b], text[b:]


def numbers(text):
    """The token numbers of the whole text, how many characters are known, and where validation and test begin."""
    learned, validation, _ = cut(text)
    known = sorted({*learned, "\ufffd"})
    return (
        [known.index(a if a in known else "\ufffd") for a in text],
        known,
        len(learned),
        len(learned) + len(validation),
    )


class Plain(nn.Module):
    """Embedding, torch's recurrent module, a linear readout."""

    def __init__(self, kind, known, layers=1, dropout=0.0, **rest):
        super().__init__()
        self.embedding = nn.Embedding(known, 5)
        self.recurrent = kind(5, 6, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0, **rest)
        self.readout, self.chance = nn.Linear(6, known), dropout

    def forward(self, ids, state=None):
        h, state = self.recurrent(F.dropout(self.embedding(ids), self.chance, self.training), state)
        return self.readout(F.dropout(h, self.chance, self.training)), state


def nats_of(model, ids, begin, end):
    """−Σ log p of ids[begin:end], token by token: few enough here for one row, behind at most 256 tokens."""
    rows, training = max(64, -(-(end - begin) // 64)), model.training
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(begin, end, rows):
            first, last = start - 1 - min(256, begin - 1), min(end, start + rows)
            logits = model(torch.tensor([ids[max(first, 0) : last - 1]]))[0][0]
            ahead = start - 1 - max(first, 0)
            total -= sum(float(logits[ahead + t].log_softmax(-1)[ids[start + t]]) for t in range(last - start))
    model.train(training)
    return total


def counted(ids, known, learned, begin):
    """−Σ log p of ids[begin:] from the last two tokens, counted with dictionaries."""
    train = ids[:learned]
    counts = [Counter(tuple(train[i - k : i + 1]) for i in range(k, learned)) for k in range(3)]
    before = [Counter(tuple(train[i - k : i]) for i in range(k, learned)) for k in range(3)]
    total = 0.0
    for t in range(begin, len(ids)):
        p = 1 / known
        for k in range(3):
            context = tuple(ids[t - k : t])
            p = (counts[k][(*context, ids[t])] + p) / (before[k][context] + 1)
        total -= math.log(p)
    return total


def replay(name, kind, result, plain_settings=None, **settings):
    """Nine updates in plain arithmetic with torch's module `kind`; asserts that weights, log and numbers agree."""
    config = {**SMALL, "layers": 1, "dropout": 0.0, "carry": True, **settings}
    text = texts.house()[:LENGTH]
    ids, known, learned, held = numbers(text)
    module = importlib.import_module(f"etude.sequence.{name}")
    torch.manual_seed(fold(3, 0, 0, "init"))
    ours = module.build(module.Config(**{**SMALL, **settings}), Spec(extra={"vocabulary": len(known)}))["model"]
    model = Plain(kind, len(known), config["layers"], config["dropout"], **(plain_settings or {})).double()
    model.load_state_dict(ours.state_dict())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    length, context = learned // 3, 7
    table, passes = torch.tensor(ids[: 3 * length]).view(3, length), (length - context) // context
    state, losses, validations, norms = None, [], {}, []
    for step in range(9):
        turn, chunk = divmod(step, passes)
        offset = int(torch.randint(context, (), generator=generator(3, turn, 0, "offset")))
        begin = offset + chunk * context
        state = None if chunk == 0 or not config["carry"] else state
        torch.manual_seed(fold(3, step, 0, "step"))  # dropout's
        model.train()
        logits, state = model(table[:, begin : begin + context], state)
        state = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
        targets = table[:, begin + 1 : begin + context + 1]
        loss = -logits.log_softmax(-1).gather(2, targets[..., None]).mean()
        parameters = dict(model.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shrink, k = min(1.0, config["clip_norm"] / (norm + 1e-6)), step + 1
        rate = config["learning_rate"] * (1 - (1 - config["final_learning_rate"]) * step / 9)
        with torch.no_grad():
            for key, p in parameters.items():
                g, (m, v) = gradients[key] * shrink, moments[key]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(config["beta2"]).add_((1 - config["beta2"]) * g * g)
                p.sub_(rate * (m / (1 - 0.9**k)) / ((v / (1 - config["beta2"] ** k)).sqrt() + 1e-8))
        losses.append(float(loss.detach()))
        norms.append(norm)
        if k % 4 == 0 or k == 9:
            validations[k] = nats_of(model, ids, learned, held) / (held - learned)
    assert min(norms) > config["clip_norm"] or config["clip_norm"] > 1
    trained = checkpoint.load(result.folder / "checkpoints")[1]["model"]
    for key, p in model.state_dict().items():
        torch.testing.assert_close(trained[key], p, rtol=1e-9, atol=1e-9, msg=key)
    told = rows(result)
    assert [row["loss"] for row in told] == pytest.approx(losses, rel=1e-9)
    logged = {row["step"]: row["validation_nats_per_character"] for row in told if len(row) > 2}
    assert logged == pytest.approx(validations, rel=1e-9)
    expected = nats_of(model, ids, held, len(ids)) / (len(ids) - held)
    assert abs(result.metrics["test_nats_per_character"] / expected - 1) < 1e-9


def reported(name, folder, **settings):
    """In float32: the test part from the saved weights, in one row each; the counts from dictionaries."""
    text = texts.house()[:9000]
    result = run(name, folder, text, steps=3, **settings)
    ids, known, learned, held = numbers(text)
    model = etude.load(result.folder).model
    expected = nats_of(model, ids, held, len(ids)) / (len(ids) - held)
    assert abs(result.metrics["test_nats_per_character"] / expected - 1) < 1e-5
    expected = counted(ids, len(known), learned, held) / (len(ids) - held)
    assert abs(result.metrics["test_counted_nats_per_character"] / expected - 1) < 1e-9
    assert set(result.metrics) == {"test_nats_per_character", "test_counted_nats_per_character"}
    assert re.search(r".{30}", (result.folder / "artifacts" / "paragraph.txt").read_text())


def written(name, folder, **settings):
    """Prompts of all lengths side by side are continued as each alone, token by token from the whole text so far."""
    loaded = etude.load(run(name, folder, steps=2, **settings).folder)
    module, model = importlib.import_module(f"etude.sequence.{name}"), loaded.model.double()
    from etude.blocks.tokens.decoding import pick
    from etude.blocks.tokens.text import tokenizer

    tokens = tokenizer(loaded.spec.extra["tokenizer"])
    for rules in ({"temperature": 0.3}, {"greedy": True}, {"top_k": 2}, {"top_p": 0.5}):
        options = module.Sample(count=6, samples=2, seed=4, **rules)
        prompts = ["Befo", "re we proceed", "B"]
        together = module.generate(loaded, prompts, options)
        for i, prompt in enumerate(prompts):
            for index in range(2):
                ids, dice = tokens.encode(prompt)[None], torch.Generator().manual_seed(4 + index)
                for _ in range(6):
                    with torch.no_grad():
                        logits = model(ids)[0][:, -1]
                    drawn = pick(logits, generator=dice, **{"temperature": 0.8, **rules})
                    ids = torch.cat([ids, drawn[:, None]], 1)
                assert together[2 * i + index] == tokens.decode(ids[0])
        module.sample(loaded, module.Sample(prompt="Befo", count=6, samples=2, seed=4, **rules), folder)
        assert (folder / "sample.txt").read_text(encoding="utf-8") == "\n\n".join(together[:2]) + "\n"
