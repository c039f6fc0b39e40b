"""WordPiece against Hugging Face's BertTokenizer on odd texts, learning against a plain re-count, files."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from etude.core.errors import UserError
from etude.data import texts
from etude.language.parts.wordpiece import SPECIALS, WordPiece

ODD = (
    "Héllo, wörld! don't U.S.A. $5.00 (a)b [x] naïve İstanbul ΣΊΣΥΦΟΣ\u00a0space\ttab\r\nline \u200bzero\u00ad "
    "中文字 mixed中text \ufffd\x00bad 😀 ½ ﬁ ² ’quotes‘ — dash… ünïcödé e\u0301 \u2028 " + "a" * 100 + " " + "b" * 101
)


@pytest.mark.parametrize("lower", [True, False])
def test_encoding_equals_hugging_face(lower, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sample = texts.house()[:6000] + ODD
    ours = WordPiece.learn(sample, 400, lower)
    (tmp_path / "vocab.txt").write_text("\n".join(ours.tokens) + "\n", encoding="utf-8")
    theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=lower)
    for text in (*texts.house()[:20000].split("\n"), ODD, "a [MASK] b[MASK]", ""):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False), text
    again = WordPiece.load(tmp_path / "vocab.txt", lower)
    assert again.tokens == ours.tokens
    state = ours.state()
    assert torch.equal(WordPiece(state["tokens"], state["lower"]).encode(ODD), ours.encode(ODD))


def test_learning_joins_the_most_frequent_pair():
    """Against counting all pairs anew before each join."""
    text = "low low low lower lowest newest newest widest aaaa aaaa"
    words = Counter(text.split())
    spelled = {w: [w[0], *("##" + c for c in w[1:])] for w in words}
    tokens = [*SPECIALS, *sorted({p for w in spelled.values() for p in w})]
    expected = list(tokens)
    while True:
        pairs: Counter = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(p for p, n in pairs.items() if n == max(pairs.values()))
        for parts in spelled.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1][2:]]
                i += 1
        expected.append(best[0] + best[1][2:])
    assert WordPiece.learn(text, 1000).tokens == list(dict.fromkeys(expected))
    assert WordPiece.learn(text, len(tokens) + 2).tokens == list(dict.fromkeys(expected))[: len(tokens) + 2]


def test_decoding_and_refusals(tmp_path):
    tokens = WordPiece([*SPECIALS, "un", "##aff", "##able", "!"])
    ids = tokens.encode("Unaffable! xyz")
    assert ids.tolist() == [5, 6, 7, 8, tokens.unknown]
    assert tokens.decode(ids) == "unaffable ! [UNK]"
    assert tokens.size == 9
    with pytest.raises(UserError, match=r"has no \[CLS\]"):
        WordPiece(["[PAD]", "[UNK]", "[SEP]", "[MASK]"])
    with pytest.raises(UserError, match="a vocabulary of 7 is too small"):
        WordPiece.learn("abc", 7)
    with pytest.raises(UserError, match="cannot be read as a vocabulary"):
        WordPiece.load(tmp_path / "none")
