"""Tokenizers: round trips, GPT-2's file format, streaming of split characters; windows and splits by index."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.blocks.tokens.text import UNKNOWN, BytePairs, Characters, pieces, starts, tokenizer, windows
from etude.core.errors import UserError

SAMPLE = "Füße, naïve café — 你好! 🙂\nto be or not to be, that is the question.\n" * 20


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_characters_round_trip(text):
    tokens = Characters.of(text)
    ids = tokens.encode(text)
    assert ids.dtype == torch.int64
    assert len(ids) == len(text)
    assert tokens.decode(ids) == text
    assert [tokens.alphabet[i] for i in ids.tolist()] == list(text)
    assert tokens.size == len(set(text))


def test_characters_are_numbered_in_sorted_order():
    tokens = Characters("cab")
    assert tokens.encode("abcba").tolist() == [0, 1, 2, 1, 0]
    assert tokens.encode("").tolist() == []
    assert tokens.decode([2, 0]) == "ca"


@pytest.mark.parametrize(("text", "bad"), [("abz", "'z' .position 2"), ("Zab", "'Z' .position 0")])
def test_unknown_character_is_named(text, bad):
    with pytest.raises(UserError, match=bad):
        Characters("abc").encode(text)


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_bad_alphabet(alphabet):
    with pytest.raises(ValueError, match="alphabet"):
        Characters(alphabet)


@pytest.fixture(scope="module")
def pairs() -> BytePairs:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra text)")
    return BytePairs.learn(SAMPLE, 300)


def test_byte_pairs_write_any_text(pairs):
    assert pairs.size == 300
    for text in (SAMPLE, " leading and trailing ", "unseen: ζ🙃\x00", ""):
        assert pairs.decode(pairs.encode(text)) == text
    assert len(pairs.encode(SAMPLE)) < 0.6 * len(SAMPLE.encode())  # it does compress what it learned


def test_byte_pairs_need_the_bytes():
    with pytest.raises(UserError, match="at least 256"):
        BytePairs.learn("x", 255)


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_state_rebuilds_the_tokenizer(kind, pairs):
    tokens = Characters.of(SAMPLE) if kind == "characters" else pairs
    again = tokenizer(json.loads(json.dumps(tokens.state())))
    assert type(again) is type(tokens)
    assert again.size == tokens.size
    assert torch.equal(again.encode(SAMPLE), tokens.encode(SAMPLE))


def test_files_of_gpt2_equal_hugging_face(pairs, tmp_path):
    """vocab.json and merges.txt written here in GPT-2's form; transformers' own GPT-2 tokenizer must agree."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = json.loads(pairs.definition)["model"]
    vocabulary = dict(model["vocab"]) | {"<|endoftext|>": len(model["vocab"])}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    ours = BytePairs.load(tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    for text in (SAMPLE, "Hello  world, it's 1999!", "one<|endoftext|>two"):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert ours.token("<|endoftext|>") == 300
    assert ours.token("no such token") is None
    (tmp_path / "tokenizer.json").write_text(ours.definition, encoding="utf-8")
    assert torch.equal(BytePairs.load(tmp_path).encode(SAMPLE), ours.encode(SAMPLE))


def test_missing_tokenizer_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json, or both vocab\.json and merges\.txt"):
        BytePairs.load(tmp_path)


def test_pieces_join_to_the_text_and_never_show_half_a_character():
    tokens = BytePairs.learn("x", 256)  # one byte a token, so most characters are split
    ids = tokens.encode(SAMPLE).tolist()
    shown = list(pieces(tokens, iter(ids)))
    assert "".join(shown) == SAMPLE
    assert not any("\ufffd" in piece for piece in shown)


@pytest.fixture
def words():
    """A tokenizer of GPT-1's kind: `</w>` ends a word, and the space is written when the next one comes."""
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    inner = package.Tokenizer(package.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
    inner.decoder = package.decoders.BPEDecoder(suffix="</w>")
    trainer = package.trainers.BpeTrainer(
        vocab_size=45, show_progress=False, special_tokens=["<unk>"], end_of_word_suffix="</w>"
    )
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 5, trainer)
    return inner


def test_pieces_keep_the_spaces_between_words(words):
    tokens = BytePairs(words.to_str())
    ids = tokens.encode("the lazy fox over the quick dog").tolist()
    assert len(ids) > 7  # some words are several tokens
    assert "".join(pieces(tokens, ids)) == tokens.decode(ids) == "the lazy fox over the quick dog"


def test_words_are_not_read_as_bytes(words, tmp_path):
    words.model.save(str(tmp_path))
    with pytest.raises(UserError, match=r"vocab\.json is of GPT-1's kind"):
        BytePairs.load(tmp_path)
    words.save(str(tmp_path / "tokenizer.json"))
    assert BytePairs.load(tmp_path).decode(BytePairs.load(tmp_path).encode("the fox")) == "the fox"


def test_truncation_and_padding_of_a_published_file_are_left_out(pairs):
    inner = pytest.importorskip("tokenizers").Tokenizer.from_str(pairs.definition)
    inner.enable_truncation(5)
    inner.enable_padding(length=12)
    assert torch.equal(BytePairs(inner.to_str()).encode(SAMPLE), pairs.encode(SAMPLE))
    assert len(BytePairs(inner.to_str()).encode("a")) == 1


def test_pieces_let_invalid_bytes_pass():
    tokens = BytePairs.learn("x", 256)
    half = tokens.encode("🙂").tolist()[:2]
    text = "".join(pieces(tokens, half + tokens.encode("ab").tolist()))
    assert text.endswith("ab")
    assert "\ufffd" in text
    assert "".join(pieces(Characters("ab"), [0, 1, 1])) == "abb"


def test_pieces_arrive_at_once():
    tokens, asked = Characters("abc"), []

    def source():
        for token in (0, 1, 2):
            asked.append(token)
            yield token

    stream = pieces(tokens, source())
    assert next(stream) == "a"
    assert asked == [0]


def test_an_unknown_character_is_written_as_what_stands_for_it():
    tokens = Characters.of("abc" + UNKNOWN)
    assert tokens.encode("aécz", UNKNOWN).tolist() == [0, 3, 2, 3]
    assert tokens.decode([0, 3]) == "a" + UNKNOWN
    with pytest.raises(UserError, match="'é' .position 1.*it knows 'abc'"):
        tokens.encode("aé")
    with pytest.raises(UserError, match=r"'\\udcff' .position 0"):  # what a terminal makes of a byte that is no UTF-8
        tokens.encode("\udcff")


def test_windows_shift_the_targets_by_one():
    x, y = windows(torch.arange(100, 120), torch.tensor([0, 7]), 5)
    assert x.tolist() == [[100, 101, 102, 103, 104], [107, 108, 109, 110, 111]]
    assert torch.equal(y, x + 1)


def test_starts_cover_every_place_and_stay_inside():
    drawn = starts(10, 7, 2000, torch.Generator().manual_seed(0))
    assert sorted(set(drawn.tolist())) == [0, 1, 2]  # 2 + 7 is the last index, 9
    assert torch.equal(drawn, starts(10, 7, 2000, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, starts(10, 7, 2000, torch.Generator().manual_seed(1)))
