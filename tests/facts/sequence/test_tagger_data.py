"""What the tagger reads and how it is scored: own files, words and letters, a generated language, spans, baselines."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from etude.blocks.tokens.spans import are_spans, span_f1, spans
from etude.core.errors import UserError
from etude.data import tagged
from etude.data.tagged import Sentence
from etude.sequence.parts.baselines import commonest_tags, linear_tags
from etude.sequence.parts.people import people
from etude.sequence.parts.tagging import Lexicon, collate, score, share, words_of
from etude.sequence.tagger import forgotten


def write(folder):
    rows = [
        ("the cat sleeps", "DET NOUN VERB"), ("dogs bark", "NOUN VERB"), ("old dogs", "ADJ NOUN"), ("they sleep", "PRON VERB"),
        ("here", "ADV"), ("a dog", "DET NOUN"), ("walk", "VERB"), ("cats walk here", "NOUN VERB ADV"),
        ("a bird sings", "DET NOUN VERB"), ("the zebra sings oddly !", "DET NOUN VERB ADV PUNCT"),
    ]  # fmt: skip
    lines = []
    for words, tags in rows:
        lines += [
            f"{i}\t{w}\t_\t{t}\t{t[0]}\t_\t_\tr{t}\t_\t_"
            for i, (w, t) in enumerate(zip(words.split(), tags.split()), 1)
        ]
        lines += ["1-2\tboth\t_\tX" + "\t_" * 6, "1.1\tnone\t_\tX" + "\t_" * 6, ""]  # a multiword token, an empty node
    (folder / "own.conllu").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "own.conllu")


def test_rare_words_are_forgotten_as_often_as_asked():
    words, rare = torch.tensor([[1, 2, 3, 0]]).repeat(20000, 1), torch.tensor([2, 3])
    out = forgotten(words, rare, 0.3, torch.Generator().manual_seed(0))
    shares = (out == 0).double().mean(0).tolist()
    assert shares == pytest.approx([0.0, 0.3, 0.3, 1.0], abs=0.01)
    assert torch.equal(out[out > 0], words[out > 0])


def test_the_lexicon_numbers_what_the_training_part_shows():
    lexicon = Lexicon.of([Sentence(("b", "ab", "b"), (0, 0, 0)), Sentence(("c",), (0,))])
    assert lexicon.words == ("ab", "b", "c")
    assert lexicon.letters == "abc"
    assert lexicon.rare == {1, 3}
    batch = collate([Sentence(("b", "x"), (1, 2)), Sentence(("a" * 19 + "bc", "b", "b"), (0, 1, -100))], lexicon)
    assert batch.words.tolist() == [[2, 0, 0], [0, 2, 2]]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.tags.tolist() == [[1, 2, -100], [0, 1, -100]]
    assert batch.which.tolist() == [[0, 1, 0], [2, 0, 0]]
    assert batch.spelled_lengths.tolist() == [1, 1, 20]
    assert batch.spelled[2].tolist() == [1] * 18 + [2, 3]
    assert batch.spelled[1].tolist() == [0] * 20


def test_people_say_what_the_words_around_them_mean():
    """they: the last name before it; dear: the next behind it; a name by its last letter."""
    data = people()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1200, 150, 300]
    assert people() == data
    name = {tag: place for place, tag in enumerate(data.classes)}
    known = {w for s in data.train for w in s.words}
    new = []
    for words, tags in data.test:
        gender = [name["F" if w[-1] == "a" else "M"] if w[0].isupper() else None for w in words]
        assert gender[0] is not None
        assert gender[-1] is not None
        for t, (word, tag) in enumerate(zip(words, tags)):
            before, after = ([g for g in part if g is not None] for part in (gender[: t + 1], gender[t:]))
            if gender[t] is not None:
                assert tag == gender[t]
                new.append(word not in known)
            elif word == "they":
                assert tag == before[-1]
            elif word == "dear":
                assert tag == after[0]
            else:
                assert data.classes[tag] in ("VERB", "NOUN", "WORD")
    assert sum(new) / len(new) > 0.5


def test_own_files_are_read(tmp_path):
    data = tagged.read(write(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 1, 1)
    assert data.classes == ("ADJ", "ADV", "DET", "NOUN", "PRON", "VERB")
    assert data.validation == [Sentence(("a", "bird", "sings"), (2, 3, 5))]
    assert data.test[0].tags == (2, 3, 5, 1, -100)
    assert tagged.read(write(tmp_path), "xpos").classes == ("A", "D", "N", "P", "V")
    assert tagged.read(write(tmp_path), "deprel").classes[0] == "rADJ"
    file = tmp_path / "columns.txt"
    file.write_text("-DOCSTART- -X- O O\n\n" + "EU NNP B-NP B-ORG\nis VBZ O O\n\n" * 10, encoding="utf-8")
    data = tagged.read(str(file))
    assert data.classes == ("B-ORG", "O")
    assert data.train == [Sentence(("EU", "is"), (0, 1))] * 8
    file.write_text("a X\n\nb\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3, has no word and tag"):
        tagged.read(str(file))
    file.write_text("a X\n\nb Y\n", encoding="utf-8")
    with pytest.raises(UserError, match="at least ten"):
        tagged.read(str(file))
    with pytest.raises(UserError, match="name a file of tagged words"):
        tagged.read(str(tmp_path / "nothing.conllu"))
    with pytest.raises(UserError, match=r"\*-ud-train.conllu"):
        tagged.read(str(tmp_path))


def test_spans_are_read_as_seqeval_reads_them():
    """A brute force over all tag sequences of four words, and what seqeval 1.2.2 says of random ones."""

    def plain(tags):
        found, kinds = [], [None if t == "O" else t[2:] for t in tags]
        for low, high in itertools.combinations_with_replacement(range(len(tags)), 2):
            inside = kinds[low] is not None and all(k == kinds[low] for k in kinds[low : high + 1])
            inside = inside and all(t[0] == "I" for t in tags[low + 1 : high + 1])
            begins = tags[low][0] == "B" or low == 0 or kinds[low - 1] != kinds[low]
            ends = high + 1 == len(tags) or tags[high + 1][0] != "I" or kinds[high + 1] != kinds[high]
            if inside and begins and ends:
                found.append((kinds[low], low, high))
        return found

    known = ("O", "B-x", "I-x", "B-y", "I-y")
    for tags in itertools.product(known, repeat=4):
        assert spans(tags) == plain(tags)
    dice = random.Random(0)
    pairs = [tuple([dice.choice(known) for _ in range(dice.randint(1, 12))] for _ in range(2)) for _ in range(200)]
    pairs = [(one, (two * 12)[: len(one)]) for one, two in pairs]
    assert span_f1(pairs) == pytest.approx(SEQEVAL, abs=1e-12)
    assert span_f1([(["O"], ["O"])]) == 0.0
    assert are_spans(("B-x", "O"))
    assert not are_spans(("O", "X"))
    assert not are_spans(("B-x", "NOUN"))


SEQEVAL = 0.23842592592592593


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test": "# nothing\n"}, "no tagged sentence in its test part"),
        ({"train": "the cat\nsat\n"}, "no tagged sentence in its training part"),
        ({"test": "X"}, "the test part of .* has no tag that its training part has"),
        ({"train": "A", "dev": "A", "test": "A"}, "has the tag 'A': there is nothing to learn"),
        ({"train": "_", "dev": "_", "test": "_"}, "another --column may have some"),
    ],
)
def test_a_treebank_that_teaches_nothing_is_one_sentence(change, said, tmp_path):
    for split in tagged.SPLITS:
        words = "".join(f"{i}\tw{i}\t_\t{'AB'[i % 2]}" + "\t_" * 6 + "\n" for i in range(1, 4)) + "\n"
        given = change.get(split, words)
        if len(given) == 1:
            words = words.replace("\tA\t", f"\t{given}\t").replace("\tB\t", f"\t{given}\t")
        else:
            words = given
        (tmp_path / f"x-ud-{split}.conllu").write_text(words, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        tagged.read(str(tmp_path))


def test_without_a_new_word_none_is_scored():
    train = [Sentence(("run", "dogs"), (0, 1))]
    assert score(train, [[0, 1]], ("A", "B"), Lexicon.of(train)) == {"accuracy": 1.0}
    unasked = [Sentence(("run", "pigs"), (0, -100))]
    assert score(unasked, [[0, 1]], ("A", "B"), Lexicon.of(train)) == {"accuracy": 1.0}


def test_shares_and_baselines_are_counted():
    train = [Sentence(("run", "run", "dogs"), (0, 1, 2)), Sentence(("run", "cats", "Sing"), (1, 2, 0))]
    test = [Sentence(("run", "pigs", "sing", "x"), (1, 2, 0, -100))]
    said = commonest_tags(train, test)
    # of "run", of the endings "s" and "ing"; each tag was seen twice on the whole: the first
    assert said == [[1, 2, 0, 0]]
    assert share(test, said) == 1.0
    assert share(test, [[1, 0, 0, 0]]) == pytest.approx(2 / 3)
    assert share(test, [[1, 0, 0, 0]], ["run"]) == 0.5
    told = score(test, [[1, 0, 0, 0]], ("O", "B-x", "I-x"), Lexicon.of(train))
    assert told == {"accuracy": pytest.approx(2 / 3), "new_word_accuracy": 0.5, "span_f1": 0.0}
    told = score(test, [[1, 2, 0, 1]], ("O", "B-x", "I-x"), Lexicon.of(train))
    assert told["span_f1"] == pytest.approx(2 / 3)  # (x, 0, 1) of it, and (x, 3, 3) too many
    data = people((300, 1, 60))
    words = [w for s in data.test for w in s.words]
    said = [t for row in linear_tags(data.train, data.test) for t in row]
    true = [t for s in data.test for t in s.tags]
    assert all(
        a == b for w, a, b in zip(words, said, true) if w not in ("they", "dear")
    )  # linear in the word and its ending
    assert len({t for w, t in zip(words, said) if w == "dear"}) == 1  # and blind for the words around it


def test_text_is_cut_into_words():
    assert list(words_of("I don't know Paul's well-known dog.\n\nHere!")) == [
        ("I", "do", "n't", "know", "Paul", "'s", "well-known", "dog", "."), ("Here", "!"),
    ]  # fmt: skip
