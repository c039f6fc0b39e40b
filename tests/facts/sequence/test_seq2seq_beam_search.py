"""Beam search against enumeration, a slow plain search, greedy decoding and Hugging Face's; forced decoding's probabilities."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from etude.blocks.tokens.decoding import beam_search, follow, forced, select

STOP = 0


class Table:
    """A step whose logits depend on the whole history of a row and on its sentence: a state that is not reordered is seen."""

    def __init__(self, vocabulary=4, seed=0, spread=2.0, nudge=0.0):
        self.vocabulary, self.spread, self.nudge = vocabulary, spread, nudge
        draw = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(8, 8, generator=draw, dtype=torch.float64)
        self.embedding = torch.randn(12, 8, generator=draw, dtype=torch.float64)
        self.readout = torch.randn(8, vocabulary, generator=draw, dtype=torch.float64) * spread
        self.rows = []

    def begin(self, size):
        return torch.full((size,), 11), torch.arange(size, dtype=torch.float64)[:, None].expand(size, 8)

    def __call__(self, tokens, state):
        assert len(tokens) == len(state)
        self.rows.append(len(tokens))
        state = torch.tanh(state @ self.matrix + self.embedding[tokens])
        logits = state @ self.readout
        logits[:, STOP] += self.nudge
        return logits, state


def log_prob(model, sentence, tokens):
    """Σ log p of one sequence, from the beginning."""
    begin, state = model.begin(sentence + 1)
    given = torch.tensor([tokens])
    return float(forced(model, state[sentence:], begin[sentence:], given).sum())


def strings(vocabulary, count):
    """All hypotheses: those that end with STOP within `count` tokens, and those of `count` tokens that do not end."""
    others = [v for v in range(vocabulary) if v != STOP]
    for length in range(1, count + 1):
        for head in itertools.product(others, repeat=length - 1):
            yield (*head, STOP)
    yield from itertools.product(others, repeat=count)


def plain_beam(model, sentence, count, beams, length_penalty, exhaust):
    """The search as its docstring tells it, one sentence and one hypothesis at a time."""
    live, finished = [((), 0.0)], []
    for t in range(count):
        children = []
        for tokens, total in live:
            for v in range(model.vocabulary):
                child = (*tokens, v)
                children.append(
                    (
                        child,
                        total + log_prob(model, sentence, child) - (log_prob(model, sentence, tokens) if tokens else 0),
                    )
                )
        children.sort(key=lambda child: -child[1])
        for tokens, total in children[:beams]:
            if tokens[-1] == STOP or t + 1 == count:
                finished.append((total / len(tokens) ** length_penalty, tokens))
        finished = sorted(finished, reverse=True)[:beams]
        live = [child for child in children if child[0][-1] != STOP][:beams]
        if not exhaust and len(finished) == beams:
            break
    return finished


def told(found, sentence):
    rows = zip(found.tokens[sentence].tolist(), found.lengths[sentence].tolist(), found.scores[sentence].tolist())
    return [(score, tuple(tokens[:length])) for tokens, length, score in rows if math.isfinite(score)]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("exhaust", [False, True])
def test_as_many_beams_as_strings_is_enumeration(length_penalty, exhaust):
    """E55: the score is divided by the hypothesis's own length, and hypotheses that have ended do not block the beam."""
    model, count = Table(vocabulary=3, seed=1), 4
    begin, state = model.begin(2)
    found = beam_search(
        model, state, begin, count, beams=3**count, stop=STOP, length_penalty=length_penalty, exhaust=exhaust, best=12
    )
    for sentence in range(2):
        every = [(log_prob(model, sentence, s) / len(s) ** length_penalty, s) for s in strings(3, count)]
        best = sorted(every, reverse=True)[:12]
        assert [tokens for _, tokens in told(found, sentence)] == [tokens for _, tokens in best]
        assert [score for score, _ in told(found, sentence)] == pytest.approx([score for score, _ in best], abs=1e-12)


@pytest.mark.parametrize("exhaust", [False, True])
@pytest.mark.parametrize(
    ("beams", "length_penalty", "nudge"), [(2, 1.0, 0.0), (3, 1.0, 2.0), (3, 0.0, 1.0), (4, 0.7, -2.0)]
)
def test_equals_a_slow_plain_search(beams, length_penalty, nudge, exhaust):
    for seed in range(3):
        model = Table(vocabulary=5, seed=seed, nudge=nudge)
        begin, state = model.begin(3)
        found = beam_search(
            model, state, begin, 5, beams=beams, stop=STOP, length_penalty=length_penalty, exhaust=exhaust, best=1
        )
        for sentence in range(3):
            score, tokens = plain_beam(model, sentence, 5, beams, length_penalty, exhaust)[0]
            assert told(found, sentence)[0][1] == tokens
            assert told(found, sentence)[0][0] == pytest.approx(score, abs=1e-12)


def test_all_hypotheses_of_a_plain_search_come_back():
    model = Table(vocabulary=5, seed=3, nudge=1.0)
    begin, state = model.begin(2)
    found = beam_search(model, state, begin, 5, beams=4, stop=STOP, best=4)
    for sentence in range(2):
        assert [tokens for _, tokens in told(found, sentence)] == [
            t for _, t in plain_beam(model, sentence, 5, 4, 1.0, False)
        ]


def test_one_beam_is_greedy():
    for seed in range(5):
        model = Table(vocabulary=6, seed=seed)
        begin, state = model.begin(4)
        greedy = follow(model, state, begin, 9, stop=STOP, pad=7, greedy=True)
        found = beam_search(model, state, begin, 9, beams=1, stop=STOP, pad=7)
        assert torch.equal(found.tokens[:, 0, : greedy.shape[1]], greedy)
        assert (found.tokens[:, 0, greedy.shape[1] :] == 7).all()


def test_more_beams_never_find_less_by_the_sum():
    """With the sum as score and nothing given up, many beams find at least what greedy finds."""
    for seed in range(5):
        model = Table(vocabulary=4, seed=seed)
        begin, state = model.begin(2)
        search = {
            k: beam_search(model, state, begin, 6, beams=k, stop=STOP, length_penalty=0.0, exhaust=True)
            for k in (1, 64)
        }
        assert (search[64].scores >= search[1].scores - 1e-12).all()


def test_scores_and_log_probs_are_those_of_the_tokens():
    model = Table(vocabulary=6, seed=2, nudge=1.0)
    begin, state = model.begin(3)
    found = beam_search(model, state, begin, 7, beams=3, stop=STOP, best=3, length_penalty=0.8)
    for n in range(3):
        each = forced(model, state, begin, found.tokens[:, n])
        real = torch.arange(7) < found.lengths[:, n, None]
        torch.testing.assert_close(found.log_probs[:, n], each.masked_fill(~real, 0.0))
        torch.testing.assert_close(found.scores[:, n], found.log_probs[:, n].sum(-1) / found.lengths[:, n] ** 0.8)


def test_each_sentence_is_searched_as_it_would_be_alone():
    """Sentences are done at different times and leave the batch; those that stay keep their states."""
    model = Table(vocabulary=6, seed=4, nudge=1.0)
    begin, state = model.begin(8)
    together = beam_search(model, state, begin, 12, beams=3, stop=STOP, best=2)
    assert len(set(model.rows)) > 2  # some were done early
    assert len(set(together.lengths[:, 0].tolist())) > 1
    for b in range(8):
        alone = beam_search(model, state[b : b + 1], begin[:1], 12, beams=3, stop=STOP, best=2)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        torch.testing.assert_close(alone.scores[0], together.scores[b])


def test_the_first_step_reads_one_hypothesis_a_sentence():
    model = Table(vocabulary=6, seed=0)
    begin, state = model.begin(3)
    beam_search(model, state, begin, 3, beams=4, stop=STOP)
    assert model.rows[0] == 3
    assert max(model.rows[1:]) == 12


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_constant_token_score_gives_an_equal_mean(length_penalty):
    """The prompt and the padding are in no length: with p = 1/V everywhere, the mean is −log V whatever the length."""
    begin = torch.tensor([1, 1])
    found = beam_search(
        lambda tokens, state: (torch.zeros(len(tokens), 4, dtype=torch.float64), state), None, begin, 5, beams=6, stop=STOP,
        best=6, length_penalty=length_penalty,
    )  # fmt: skip
    lengths = found.lengths.double()
    torch.testing.assert_close(found.scores, -math.log(4) * lengths ** (1 - length_penalty))


def test_an_end_that_is_certain_at_once():
    """The first token is `stop` with probability 1: one hypothesis of one token, no −∞ and no NaN among what is found."""
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    found = beam_search(
        lambda tokens, state: (logits.expand(len(tokens), 4), state),
        None,
        torch.tensor([1, 1]),
        5,
        beams=3,
        stop=STOP,
        pad=9,
        best=3,
    )
    assert found.tokens[0].tolist() == [[0, 9, 9, 9, 9], [9] * 5, [9] * 5]
    assert found.scores[0].tolist() == [0.0, -torch.inf, -torch.inf]
    assert found.lengths[1].tolist() == [1, 0, 0]


def test_a_longer_hypothesis_that_wins_is_waited_for():
    """p(stop) = .4 at once (mean −.92), or one of two tokens and then .98 each time: `exhaust` finds the longer one.

    Without it the search is over when as many hypotheses as beams have finished.
    """
    first, then = torch.tensor([0.4, 0.6, 1e-9]).log(), torch.tensor([0.01, 0.98, 0.01]).log()
    end = torch.tensor([0.98, 0.01, 0.01]).log()

    def step(tokens, state):
        state = state + 1
        return torch.stack([first if n == 1 else end if n == 5 else then for n in state[:, 0].tolist()]), state

    asked = {"beams": 2, "stop": STOP}
    short, long = (
        beam_search(step, torch.zeros(1, 1), torch.tensor([1]), 8, exhaust=e, **asked) for e in (False, True)
    )
    assert short.lengths[0, 0] == 1 or short.scores[0, 0] <= long.scores[0, 0]
    assert long.tokens[0, 0, :5].tolist() == [1, 1, 1, 1, 0]


def test_states_of_any_shape_follow_the_beams():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: list

    class Own:
        def __init__(self, seen=()):
            self.seen = seen

        def select(self, rows, sentences):
            return Own((rows.tolist(), None if sentences is None else sentences.tolist()))

    state = {"x": Pair(torch.arange(3), [torch.arange(6).view(3, 2)]), "y": (Own(), None)}
    new = select(state, torch.tensor([2, 0, 2]), torch.tensor([0]))
    assert new["x"].a.tolist() == [2, 0, 2]
    assert new["x"].b[0].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert new["y"][0].seen == ([2, 0, 2], [0])
    assert new["y"][1] is None


@pytest.mark.parametrize(
    "wrong", [{"beams": 0}, {"beams": 2, "best": 3}, {"beams": 2, "best": 0}, {"beams": 2, "length_penalty": -0.1}]
)
def test_impossible_settings_are_refused(wrong):
    model = Table()
    begin, state = model.begin(1)
    with pytest.raises(ValueError, match="must be at least 1"):
        beam_search(model, state, begin, 3, stop=STOP, **wrong)
    with pytest.raises(ValueError, match="count 0"):
        beam_search(model, state, begin, 0, stop=STOP, beams=1)


def test_the_probabilities_of_all_strings_sum_to_one():
    """Row 6.3.1: over all Vᵀ strings of T tokens, and over all that end or reach T."""
    model = Table(vocabulary=3, seed=5)
    whole = sum(math.exp(log_prob(model, 0, tokens)) for tokens in itertools.product(range(3), repeat=4))
    assert whole == pytest.approx(1, abs=1e-12)
    ending = sum(math.exp(log_prob(model, 0, tokens)) for tokens in strings(3, 4))
    assert ending == pytest.approx(1, abs=1e-12)


def test_draws_have_the_probabilities_that_forced_decoding_gives():
    """Row 6.3.1: 20,000 ancestral samples; the share of each string within 4.5 standard errors of exp Σ log p."""
    model, rows = Table(vocabulary=3, seed=6, spread=0.5), 20_000
    begin, state = model.begin(1)
    drawn = follow(
        model,
        state.expand(rows, 8),
        begin.expand(rows),
        3,
        stop=STOP,
        pad=9,
        generator=torch.Generator().manual_seed(0),
    )
    counts = {}
    for row in drawn.tolist():
        tokens = tuple(row[: row.index(STOP) + 1] if STOP in row else row)
        counts[tokens] = counts.get(tokens, 0) + 1
    for tokens in strings(3, 3):
        p = math.exp(log_prob(model, 0, tokens))
        assert abs(counts.pop(tokens, 0) / rows - p) <= 4.5 * math.sqrt(p * (1 - p) / rows)
    assert not counts


def test_follow_stops_when_every_row_has():
    model = Table(vocabulary=4, seed=0, nudge=50.0)
    begin, state = model.begin(2)
    assert follow(model, state, begin, 9, stop=STOP, greedy=True).tolist() == [[0], [0]]
    assert follow(model, state, begin, 0, stop=STOP, greedy=True).shape == (2, 0)


@pytest.fixture(scope="module")
def marian():
    """A random tiny encoder-decoder of Hugging Face's that ends its translations, and never writes padding."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=29, eos_token_id=2,
        decoder_start_token_id=29, forced_eos_token_id=None, init_std=0.6,
    )  # fmt: skip
    model = transformers.MarianMTModel(config).eval().double()
    torch.nn.init.normal_(model.final_logits_bias, std=1.0)
    model.final_logits_bias[:, 29] = -1e9
    model.final_logits_bias[:, 2] += 2.0
    return model


@pytest.mark.long  # importing their package takes longer than all the rest
@pytest.mark.parametrize("exhaust", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.5])
def test_equals_hugging_face_on_marian(length_penalty, exhaust, marian):
    from transformers.modeling_outputs import BaseModelOutput

    source = torch.randint(3, 29, (12, 7))
    for beams in (2, 4):
        theirs = marian.generate(
            source, num_beams=beams, length_penalty=length_penalty, max_new_tokens=12, do_sample=False,
            early_stopping="never" if exhaust else True, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip

        def step(tokens, state):
            memory, before = state
            before = torch.cat([before, tokens[:, None]], 1)
            out = marian(encoder_outputs=BaseModelOutput(memory), decoder_input_ids=before, use_cache=False)
            return out.logits[:, -1], (memory, before)

        state = (marian.model.encoder(source)[0], torch.empty(12, 0, dtype=torch.int64))
        ours = beam_search(
            step, state, torch.full((12,), 29), 12, beams=beams, stop=2, pad=29, length_penalty=length_penalty,
            exhaust=exhaust,
        )  # fmt: skip
        wide = theirs.sequences.shape[1] - 1
        assert torch.equal(ours.tokens[:, 0, :wide], theirs.sequences[:, 1:])
        torch.testing.assert_close(ours.scores[:, 0].float(), theirs.sequences_scores.float())
        assert len(set(ours.lengths[:, 0].tolist())) > 1
