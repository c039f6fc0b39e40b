"""ELMo's network against loops over letters, words and gates; what neither direction may see; the mixture of the layers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from etude.language.elmo import Config, Tags, unigram
from etude.language.parts.company import CLASSES, company
from etude.language.parts.elmo import Architecture, BiLM, Lexicon, Mixture, Spelled, backwards, collate
from etude.language.parts.tasks import Item
from etude.language.parts.words import commonest_tags, share, shuffled, words_of

plain = runpy.run_path(str(Path(__file__).with_name("plain_elmo.py")))
SENTENCES = [
    ("the", "old", "cat", "sleeps"),
    ("a", "dog"),
    ("unheardof", "cats", "walk", "the", "old", "dog", "x"),
    ("ö",),
]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(**changes):
    torch.manual_seed(0)
    lexicon = Lexicon.of(SENTENCES[:2], 4)
    of = {
        "words": lexicon.size,
        "letters": len(lexicon.letters),
        "read": "letters",
        "spelling": 3,
        "filters": (2, 3, 0, 2),
    }
    of |= {"highways": 2, "width": 6, "projection": 4, "layers": 2, "dropout": 0.0}
    model = BiLM(Architecture(**{**of, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    if model.spelled is not None:
        model.spelled.letters.weight.data[0] = 0
    return model, lexicon


def told(sentence):
    """A sentence as the plain network wants it: "=" before each word, so that none is taken for a mark."""
    return [f"={word}" for word in sentence]


@pytest.mark.parametrize(
    "changes", [{}, {"projection": 6, "layers": 3, "highways": 0}, {"read": "words"}, {"width": 5, "layers": 1}]
)
def test_it_equals_a_plain_one(changes):
    """Features of all layers, both likelihoods and all gradients, sentence by sentence, letter by letter, gate by gate.

    E70: ←h of layer j beside →h of layer j, and the token layer, j = 0, among them.
    """
    model, lexicon = network(**changes)
    batch = collate(SENTENCES, lexicon)
    weights = dict(model.named_parameters())
    if model.of.read == "letters":  # named by their place, not by their size
        assert [c.kernel_size[0] for c in model.spelled.convolutions] == [1, 2, 4]
    read = model.of.read
    expected = torch.cat([plain["features"](weights, told(s), lexicon, read) for s in SENTENCES])
    assert expected.shape == (14, model.of.layers + 1, 2 * model.of.projection)
    torch.testing.assert_close(model.features(batch), expected, rtol=1e-10, atol=1e-12)
    ahead, back = model.nats(batch)
    both = [plain["nats"](weights, told(s), lexicon, read) for s in SENTENCES]
    one, two = (torch.stack([n for pair in both for n in pair[side]]) for side in (0, 1))
    torch.testing.assert_close(ahead, one, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(back, two, rtol=1e-10, atol=1e-12)
    parameters = list(model.parameters())
    mine = torch.autograd.grad(ahead.sum() + 2 * back.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(one.sum() + 2 * two.sum(), parameters, allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs):
        if not name.endswith("letters.weight"):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
        else:
            torch.testing.assert_close(a[1:], b[1:], rtol=1e-8, atol=1e-10)


def test_neither_direction_sees_what_it_predicts():
    """∂→h_t/∂x_s is exactly 0 for s > t and ←h_t's for s < t, in every layer; so is that of −log p(w_k) by x_k, both ways."""
    model, lexicon = network(layers=3)
    batch = collate(SENTENCES[2:3], lexicon)
    given = torch.randn(1, 9, 4)
    model.vectors = lambda _: given  # type: ignore[method-assign]
    given.requires_grad_()
    for ahead, back in model(batch)[1:]:
        for t in range(9):
            for state, unseen, seen in ((ahead, slice(t + 1, 9), slice(t + 1)), (back, slice(t), slice(t, 9))):
                reach = torch.autograd.grad(state[0, t].square().sum(), given, retain_graph=True)[0][0].abs().amax(1)
                assert (reach[unseen] == 0).all()
                assert (reach[seen] > 0).all()
    ahead, back = model.nats(batch)
    assert len(ahead) == len(back) == 8
    for k in range(8):
        forward = torch.autograd.grad(ahead[k], given, retain_graph=True)[0][0].abs().amax(1)  # of word k + 1
        assert (forward[k + 1 :] == 0).all()
        assert (forward[: k + 1] > 0).all()
        backward = torch.autograd.grad(back[k], given, retain_graph=True)[0][0].abs().amax(1)  # of word k
        assert (backward[: k + 1] == 0).all()
        assert (backward[k + 1 :] > 0).all()


def test_a_sentence_gets_what_it_gets_alone():
    model, lexicon = network()
    together, alone = model.features(collate(SENTENCES, lexicon)), []
    for sentence in SENTENCES:
        alone.append(model.features(collate([sentence], lexicon)))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    nats = model.nats(collate(SENTENCES, lexicon))
    apart = [model.nats(collate([sentence], lexicon)) for sentence in SENTENCES]
    for side in (0, 1):
        torch.testing.assert_close(nats[side], torch.cat([n[side] for n in apart]), rtol=1e-12, atol=1e-12)


def test_backwards_turns_each_row_by_itself():
    x = torch.arange(12.0).view(2, 6, 1)
    turned = backwards(x, torch.tensor([4, 6]))[..., 0].tolist()
    assert turned == [[3.0, 2.0, 1.0, 0.0, 4.0, 5.0], [11.0, 10.0, 9.0, 8.0, 7.0, 6.0]]
    assert torch.equal(backwards(backwards(x, torch.tensor([4, 6])), torch.tensor([4, 6])), x)


def test_the_mixture_is_a_weighted_mean_of_all_layers():
    """E70: the sum begins at j = 0, the weights are softmax(s): s = 0 is the mean; γ scales; s → ∞ picks one layer."""
    layers = torch.randn(5, 3, 4)
    mixture = Mixture(3)
    assert torch.allclose(mixture(layers), layers.mean(1))
    mixture.gamma.data.fill_(-2.5)
    assert torch.allclose(mixture(layers), -2.5 * layers.mean(1))
    mixture.s.data.copy_(torch.tensor([0.3, -1.0, 2.0]))
    share = torch.tensor([0.3, -1.0, 2.0]).exp()
    share /= share.sum()
    expected = -2.5 * sum(share[j] * layers[:, j] for j in range(3))
    assert torch.allclose(mixture(layers), expected)
    mixture.s.data.copy_(torch.tensor([0.0, 60.0, 0.0]))
    assert torch.allclose(mixture(layers), -2.5 * layers[:, 1])
    normed = Mixture(3, "layer")
    each = (layers - layers.mean(-1, keepdim=True)) / (layers.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(normed(layers), each.mean(1))


@pytest.mark.parametrize(("features", "kept"), [("mixture", [0, 1, 2]), ("last", [2]), ("token", [0])])
def test_tags_read_the_layers_that_were_asked_for(features, kept):
    tags = Tags(Config(features=features, projection=4, normalizer="none", dropout=0.0), 5)
    layers = torch.randn(7, 3, 8, requires_grad=True)
    logits = tags(layers)
    assert logits.shape == (7, 5)
    assert torch.allclose(logits, tags.readout(layers[:, kept].mean(1)))
    reach = torch.autograd.grad(logits.square().sum(), layers)[0].abs().amax((0, 2))
    assert reach.nonzero()[:, 0].tolist() == kept


def test_dropout_acts_in_training_and_never_on_frozen_features():
    model, lexicon = network(dropout=0.5)
    batch = collate(SENTENCES, lexicon)
    still = model.eval().features(batch)
    quiet = model(batch)
    model.train()
    assert torch.equal(model.features(batch), still)
    assert model.training
    noisy = model(batch)
    gone = noisy[0][0] == 0
    assert 0.2 < gone.double().mean() < 0.8
    assert torch.allclose(noisy[0][0][~gone], 2 * quiet[0][0][~gone])
    for layer in (1, 2):
        for side in (0, 1):
            assert 0.2 < (noisy[layer][side] == 0).double().mean() < 0.8


def test_highways_let_everything_pass_at_first():
    fresh = Spelled(network()[0].of)
    for highway in fresh.highways:
        assert (highway.gate.bias == -2).all()
        x = torch.randn(4, 7)
        t = torch.sigmoid(x @ highway.gate.weight.t() - 2)
        new = (x @ highway.transform.weight.t() + highway.transform.bias).clamp(min=0)
        assert torch.allclose(highway(x), t * new + (1 - t) * x)


def test_the_lexicon_counts():
    lexicon = Lexicon.of([("b", "a", "a"), ("c", "b", "Zz"), ("d",)], 3)
    assert lexicon.words == ("a", "b", "Zz")
    assert lexicon.letters == "Zabcdz"
    batch = collate([("a", "d"), ("b", "Q", "a")], lexicon)
    assert batch.words.tolist() == [[1, 3, 0, 2, 0], [1, 4, 0, 3, 2]]
    assert batch.lengths.tolist() == [4, 5]
    assert batch.inside.tolist() == [[False, True, True, False, False], [False, True, True, True, False]]
    rows = [batch.spelled[int(place)].tolist() for place in batch.which[1]]
    assert rows == [[2, 4, 3], [2, 8, 3], [2, 1, 3], [2, 7, 3], [2, 5, 3]]
    state = lexicon.state()
    assert Lexicon(tuple(state["words"]), state["letters"]) == lexicon
    items = [Item(("a", "a", "c"), tags=(0, 1, 1)), Item(("b",), tags=(1,))]
    often = torch.tensor([2.0, 3, 3, 3, 2, 1])
    assert torch.allclose(unigram(items, lexicon), (often / often.sum()).log())


def test_words_without_a_network():
    train = [Item(("a", "b", "a"), tags=(2, 1, 2)), Item(("a", "c"), tags=(1, 1))]
    test = [Item(("a", "b", "new"), tags=(2, 0, -100)), Item(("c",), tags=(1,))]
    assert commonest_tags(train, test) == [[2, 1, 1], [1]]
    assert share(test, [[2, 1, 1], [1]]) == pytest.approx(2 / 3)
    assert share(test, [[2, 1, 1], [1]], {"b", "c"}) == 1.0
    assert words_of("They don't, Mr.X's 3.5!") == ("They", "do", "n't", ",", "Mr.X", "'s", "3.5", "!")
    lexicon = Lexicon.of(SENTENCES, 99)
    mixed, kept = shuffled(SENTENCES, lexicon), collate(SENTENCES, lexicon)
    assert torch.equal(mixed.words.sort(1).values, kept.words.sort(1).values)
    assert not torch.equal(mixed.words, kept.words)


def test_the_generated_words_are_known_by_their_neighbours_alone():
    task = company()
    assert task == company()
    assert [len(part) for part in (task.train, task.validation, task.test)] == [800, 60, 120]
    tag_of: dict[str, int] = {}
    for item in (*task.train, *task.test):
        names = [task.classes[tag] for tag in item.tags]
        clauses = " ".join(names).replace("DET", "|DET").split("|")[1:]
        assert len(clauses) == 2
        for clause in clauses:
            bare = [name for name in clause.split() if name not in ("ADJ", "ADV")]
            assert bare == ["DET", "NOUN", "VERB"]
        for word, tag in zip(item.first, item.tags):
            assert tag_of.setdefault(word, tag) == tag
    assert len(tag_of) == sum(CLASSES.values())
    assert {len(word) for word in tag_of} == {5}
