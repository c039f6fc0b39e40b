"""GPT's beam search against Hugging Face's generate with as many beams, on a tiny GPT-2 of random weights."""

from __future__ import annotations

import pytest
import torch

from etude.blocks.tokens.decoding import beam_search
from etude.language.gpt import GPT, Architecture

STOP, NEW = 0, 12


@pytest.fixture(scope="module")
def pair():
    """The same weights in both, in float64; the end of the text is likely enough to come at different times."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=24, n_embd=12, n_layer=2, n_head=3, initializer_range=0.25, bos_token_id=STOP,
        eos_token_id=STOP, pad_token_id=STOP,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval().double()
    ours = GPT(Architecture(17, 24, 2, 3, 12, activation="gelu_tanh")).eval().double()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"})
    return ours, theirs


@pytest.mark.long  # importing their package takes longer than all the rest
@pytest.mark.parametrize("exhaust", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.3])
def test_beams_are_hugging_faces(length_penalty, exhaust, pair):
    """Tokens and scores of every sentence, for two, three and five beams; with one beam it is greedy."""
    ours, theirs = pair
    prompt, lengths = torch.randint(1, 17, (10, 5)), set()

    def step(tokens, read):
        read = torch.cat([read, tokens[:, None]], 1)
        return ours(read)[:, -1], read

    for beams in (1, 2, 3, 5):
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=beams, max_new_tokens=NEW, do_sample=False,
            length_penalty=length_penalty, early_stopping="never" if exhaust and beams > 1 else beams > 1, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found = beam_search(
            step, prompt[:, :-1], prompt[:, -1], NEW, beams=beams, stop=STOP, pad=STOP, length_penalty=length_penalty,
            exhaust=exhaust,
        )  # fmt: skip
        wide = expected.sequences.shape[1] - 5
        assert torch.equal(found.tokens[:, 0, :wide], expected.sequences[:, 5:])
        assert not found.tokens[:, 0, wide:].any()
        if beams > 1:
            torch.testing.assert_close(found.scores[:, 0].float(), expected.sequences_scores.float())
        lengths |= set(found.lengths[:, 0].tolist())
    assert len(lengths) > 2


def test_a_wide_beam_finds_the_best_of_all():
    """With as many beams as there are texts of two tokens the best is that of plain enumeration."""
    torch.manual_seed(1)
    ours = GPT(Architecture(17, 24, 2, 3, 12)).eval().double()
    for parameter in ours.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    prompt = torch.randint(1, 17, (2, 4))

    def step(tokens, read):
        read = torch.cat([read, tokens[:, None]], 1)
        return ours(read)[:, -1], read

    found = beam_search(
        step, prompt[:, :-1], prompt[:, -1], 2, beams=17 * 17, stop=STOP, pad=STOP, length_penalty=0.0, exhaust=True
    )
    for row in range(2):
        with torch.no_grad():
            first = ours(prompt[row : row + 1])[0, -1].log_softmax(0)
            second = ours(torch.cat([prompt[row].expand(17, -1), torch.arange(17)[:, None]], 1))[:, -1].log_softmax(1)
        both = first[:, None] + second
        both[STOP] = -torch.inf
        best = max(float(first[STOP]), float(both.max()))
        assert float(found.scores[row, 0]) == pytest.approx(best)
