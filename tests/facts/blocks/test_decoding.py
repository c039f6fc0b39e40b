"""Sampling rules against enumeration and Hugging Face's, and the decoding loop against full re-evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.blocks.tokens.decoding import generate, keep_top_k, keep_top_p, pad_left, pick, stream


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in logits]


class Markov:
    """A decoder whose next-token logits depend on the last token and the number of tokens seen (padding not counted).

    It keeps what it reads.
    """

    def __init__(self, vocabulary: int = 5, context: int = 8, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(context + 1, vocabulary, vocabulary, generator=draw)
        self.context, self.read, self.starts = context, [], 0

    def start(self, batch):
        self.starts += 1
        return SimpleNamespace(length=0, pads=None)

    def advance(self, ids, cache):
        cache.length += ids.shape[1]
        assert cache.length <= self.context
        self.read.append(ids.clone())
        return self.table[cache.length if cache.pads is None else cache.length - cache.pads, ids[:, -1]]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.71, [0, 1, 3]), (0.9, [0, 1, 3]),
        (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    logits = logits_of(0.2, 0.4 + 1e-12, 0.1 - 1e-12, 0.3 + 1e-12)
    assert kept(keep_top_p(logits, p)) == [expected]


@settings(max_examples=100)
@given(st.lists(st.floats(-8, 8), min_size=1, max_size=9), st.floats(1e-6, 1.0))
def test_top_p_is_minimal_and_sufficient(values, p):
    logits = torch.tensor([values], dtype=torch.float64)
    probability = logits.softmax(-1)[0]
    chosen = kept(keep_top_p(logits, p))[0]
    masses = sorted((float(probability[i]) for i in chosen), reverse=True)
    assert len(masses) >= 1
    assert sum(masses) >= p - 1e-9  # sufficient
    assert p == 1 or sum(masses[:-1]) < p + 1e-9  # one fewer would not do
    others = [float(probability[i]) for i in range(len(values)) if i not in chosen]
    assert not others or max(others) <= masses[-1] + 1e-12  # the most probable ones


def test_top_p_always_leaves_one_token():
    assert kept(keep_top_p(torch.tensor([[0.0, -1e4, -1e4]]), 1e-30)) == [[0]]
    assert kept(keep_top_p(torch.zeros(2, 4), 1e-9)) == [[0], [0]]


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k(k, expected):
    assert kept(keep_top_k(logits_of(0.2, 0.4, 0.1, 0.3), k)) == [expected]


def test_top_k_keeps_exactly_k_under_ties():
    assert [len(row) for row in kept(keep_top_k(torch.zeros(3, 6), 2))] == [2, 2, 2]


def test_filters_do_not_touch_what_they_keep():
    logits = torch.randn(4, 9)
    for filtered in (keep_top_k(logits, 3), keep_top_p(logits, 0.6)):
        alive = torch.isfinite(filtered)
        assert torch.equal(filtered[alive], logits[alive])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: keep_top_k(x, 0), "top_k must be at least 1"),
        (lambda x: keep_top_p(x, 0.0), "top_p must lie in"),
        (lambda x: keep_top_p(x, 1.5), "top_p must lie in"),
        (lambda x: pick(x, temperature=0.0), "temperature must be positive"),
    ],
)
def test_impossible_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4))


def test_filters_equal_hugging_face():
    process = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    torch.manual_seed(0)
    logits = torch.randn(16, 50) * 3
    for p in (0.05, 0.5, 0.9, 0.999):
        assert torch.equal(keep_top_p(logits, p), process.TopPLogitsWarper(p)(None, logits))
    for k in (1, 7, 50):
        assert torch.equal(keep_top_k(logits, k), process.TopKLogitsWarper(k)(None, logits))


def frequencies(logits, count=40_000, **rules):
    drawn = pick(logits.expand(count, -1), generator=torch.Generator().manual_seed(0), **rules)
    return torch.bincount(drawn, minlength=logits.shape[-1]).double() / count


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [0.2, 0.4, 0.1, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [2 / 9, 4 / 9, 0, 3 / 9]),
        ({"temperature": 0.5}, [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),  # 16/29 + 9/29 = .86 ≥ .8
        ({"greedy": True, "temperature": 9.0}, [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(rules, expected):
    """40,000 draws: each frequency within 4.5 standard errors; what is filtered out never occurs."""
    found, expected = frequencies(logits_of(0.2, 0.4, 0.1, 0.3), **rules), torch.tensor(expected, dtype=torch.float64)
    error = (expected * (1 - expected) / 40_000).sqrt()
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() <= 4.5 * error + 1e-12).all()


def test_generate_feeds_the_prompt_once_and_each_token_once():
    model = Markov()
    prompt = torch.tensor([[0, 3, 1], [2, 2, 4]])
    out = generate(model, prompt, 5, greedy=True)
    assert [tuple(ids.shape) for ids in model.read] == [(2, 3), (2, 1), (2, 1), (2, 1), (2, 1)]
    expected = prompt
    for _ in range(5):
        token = model.table[expected.shape[1], expected[:, -1]].argmax(-1, keepdim=True)
        expected = torch.cat([expected, token], dim=1)
    assert torch.equal(out, expected)


def test_the_generator_decides():
    model, prompt = Markov(), torch.zeros(3, 1, dtype=torch.int64)

    def draw(seed):
        return generate(model, prompt, 7, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_stream_yields_tokens_as_they_come():
    model, prompt = Markov(), torch.zeros(2, 1, dtype=torch.int64)
    tokens = stream(model, prompt, 5, greedy=True)
    assert len(model.read) == 0
    first = next(tokens)
    assert first.shape == (2,)
    assert len(model.read) == 1
    rest = list(tokens)
    assert torch.equal(torch.stack([first, *rest], 1), generate(Markov(), prompt, 5, greedy=True)[:, 1:])


@pytest.mark.parametrize("keep", [1, 3, 7, 8, None])
def test_past_the_context_the_last_tokens_are_read_again(keep):
    """Reference: whenever the window is full, cut it to its last `keep` tokens, and evaluate from scratch."""
    model, prompt = Markov(context=8), torch.tensor([[1, 0, 2]])
    out = generate(model, prompt, 30, greedy=True, keep=keep)
    window, expected = prompt[0].tolist(), prompt[0].tolist()
    for _ in range(30):
        if len(window) > 8:
            window = window[-(keep or 4) :]
        token = int(model.table[len(window), window[-1]].argmax())
        window.append(token)
        expected.append(token)
    assert out[0].tolist() == expected
    reads = sum(ids.shape[1] for ids in model.read)
    assert reads <= {None: 3 + 2 * 30, 8: 8 * 30}.get(keep, 10_000)


def test_a_long_prompt_is_cut_to_the_context():
    model = Markov(context=4)
    prompt = torch.arange(10)[None] % 5
    out = generate(model, prompt, 1, greedy=True)
    assert torch.equal(model.read[0], prompt[:, -4:])
    assert torch.equal(out[:, :10], prompt)


def test_stop_ends_rows_and_then_the_loop():
    class Counting(Markov):
        """Row b emits 1, 1, …, and 0 (= stop) after b + 1 tokens."""

        def advance(self, ids, cache):
            super().advance(ids, cache)
            rows = torch.full((ids.shape[0], 5), -9.0)
            for b in range(ids.shape[0]):
                rows[b, 0 if cache.length == b + 2 else 1] = 9.0
            return rows

    out = generate(Counting(context=64), torch.ones(3, 1, dtype=torch.int64), 20, greedy=True, stop=0)
    assert out.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "at least one token"),
        (torch.zeros(3, dtype=torch.int64), {}, "at least one token"),
        (torch.zeros(1, 1, dtype=torch.int64), {"keep": 9}, "keep must lie in 1 … 8"),
        (torch.zeros(1, 1, dtype=torch.int64), {"keep": 0}, "keep must lie in 1 … 8"),
        (torch.zeros(2, 3, dtype=torch.int64), {"pads": torch.tensor([0, 3])}, "pads must be 2 numbers from 0 to 2"),
        (torch.zeros(2, 3, dtype=torch.int64), {"pads": torch.tensor([-1, 0])}, "pads must be 2 numbers from 0 to 2"),
        (torch.zeros(2, 3, dtype=torch.int64), {"pads": torch.tensor([0])}, "pads must be 2 numbers from 0 to 2"),
    ],
)
def test_wrong_calls_are_refused(prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(Markov(), prompt, 2, greedy=True, **settings)


def test_nothing_to_add():
    prompt = torch.tensor([[1, 2]])
    assert torch.equal(generate(Markov(), prompt, 0), prompt)


def test_padding_stands_on_the_left():
    ids, pads = pad_left([torch.tensor([1, 2]), torch.tensor([3, 4, 5, 6]), torch.tensor([7])], fill=9)
    assert ids.tolist() == [[9, 9, 1, 2], [3, 4, 5, 6], [9, 9, 9, 7]]
    assert pads.tolist() == [2, 0, 3]


@pytest.mark.parametrize("keep", [1, 3, 8, None])
@pytest.mark.parametrize("lengths", [(1, 5, 3), (4, 4, 4), (2, 8, 7), (11, 3, 20), (6, 1, 1)])
def test_rows_of_different_lengths_go_on_as_they_would_alone(lengths, keep):
    """Greedy and drawn, below the context of 8 and far past it, where the rows fill it at different times."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, (length,), generator=draw) for length in lengths]
    ids, pads = pad_left(rows)
    for rules in ({"greedy": True}, {"temperature": 0.7, "top_k": 3}):
        dice = [torch.Generator().manual_seed(b) for b in range(3)]
        together = generate(Markov(), ids, 30, pads=pads, keep=keep, generator=dice, **rules)
        for b, row in enumerate(rows):
            alone = generate(Markov(), row[None], 30, keep=keep, generator=torch.Generator().manual_seed(b), **rules)
            assert together[b, int(pads[b]) :].tolist() == alone[0].tolist()


def test_padding_costs_no_second_read_below_the_context():
    model = Markov(context=16)
    ids, pads = pad_left([torch.tensor([1, 2, 3, 0]), torch.tensor([1])])
    generate(model, ids, 12, pads=pads, greedy=True)
    assert [tuple(read.shape) for read in model.read] == [(2, 4), *[(2, 1)] * 11]
