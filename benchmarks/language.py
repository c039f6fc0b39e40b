"""GPT against Hugging Face's generate and a plain training loop, BERT against transformers' SDPA path, word2vec against gensim.

One CPU thread, and cost is CPU time of this process: on one thread that is the time the work takes on a quiet core,
and it does not count what other programs do. Run it as `python benchmarks/language.py`; `decoding`,
`training`, `bert` or `word2vec` behind it renews these rows alone.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from race import RESULTS, cpu, race, report

PROMPT, NEW = 32, 64
once = functools.partial(cpu, repeats=1)  # a call takes seconds


def rows(part: str = "") -> list[dict[str, Any]]:
    """All rows, or those of a part; float32 decoding is timed with the packing of the weights in every call."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = {"decoding": _decoding, "training": _training, "bert": _bert, "word2vec": _word2vec}
        return [row for name, made in parts.items() if part in ("", name) for row in made()]
    finally:
        torch.set_num_threads(before)


def _decoding() -> list[dict[str, Any]]:
    import copy

    import torch
    import transformers

    from etude.blocks.tokens.decoding import generate
    from etude.language.gpt import GPT, Architecture

    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    ours = GPT(Architecture(50257, 1024, 12, 12, 768, activation="gelu_tanh")).eval()
    ours.load_state_dict({name: value for name, value in peer.state_dict().items() if name != "lm_head.weight"})
    ours_low, peer_low = copy.deepcopy(ours).bfloat16(), copy.deepcopy(peer).bfloat16()
    name, version = "transformers generate", transformers.__version__
    found = []
    for batch in (1, 8):
        prompt = torch.randint(50000, (batch, PROMPT))
        asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        asked |= {"max_new_tokens": NEW, "min_new_tokens": NEW}

        def mine(model=ours, prompt=prompt, cache=None):
            return generate(model, prompt, NEW, greedy=True, cache=cache)

        def theirs(model=peer, prompt=prompt, asked=asked):
            return model.generate(prompt, **asked)

        if not torch.equal(mine(), theirs()):
            raise AssertionError(f"float32 tokens differ at batch {batch}")
        shape = f"GPT-2 small, random weights, prompt {PROMPT}, {NEW} new tokens, greedy, 1 thread, CPU time"
        equal = f"{shape}; all tokens identical; float32 on both sides"
        bar = 1.0 if batch == 1 else 1.2
        found.append(race(f"decode fp32 batch {batch}", once(mine), once(theirs), name, version, bar, equal, pairs=5))

        cache = ours_low.start(batch)

        def mine_low(model=ours_low, prompt=prompt, cache=cache, mine=mine):
            return mine(model, prompt, cache)

        def theirs_low(theirs=theirs):
            return theirs(peer_low)

        note = f"{shape}; NOT equal precision: bfloat16 against float32, weights laid out once beforehand"
        found.append(
            race(f"decode bf16 batch {batch}", once(mine_low), once(theirs), name, version, 2.0, note, pairs=5)
        )
        note = f"{shape}; bfloat16 on both sides (tokens not compared), our weights laid out once beforehand"
        found.append(
            race(
                f"decode bf16 batch {batch}, both", once(mine_low), once(theirs_low), name, version, 1.0, note, pairs=5
            )
        )
    return found


def _training() -> list[dict[str, Any]]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    from etude.language.gpt import GPT, Architecture, next_token_loss

    vocabulary, context, width, heads, layers = 65, 64, 128, 4, 4

    class PeerBlock(nn.Module):
        """The usual plain block: nn.Linear, one fused query-key-value layer, scaled_dot_product_attention, GELU."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            count, length, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
            q, k, v = (part.view(count, length, heads, -1).transpose(1, 2) for part in (q, k, v))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).contiguous().view(count, length, width))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks, self.norm = nn.ModuleList(PeerBlock() for _ in range(layers)), nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    def copy_into(peer: Peer, ours: GPT) -> None:
        """The same weights on both sides, so that losses can be compared."""
        parts = ours.transformer
        pairs = [(peer.tokens, parts["wte"]), (peer.positions, parts["wpe"]), (peer.norm, parts["ln_f"])]
        for block, mine in zip(peer.blocks, parts["h"]):
            pairs += [(block.norm1, mine.ln_1), (block.norm2, mine.ln_2)]
            pairs += [(block.qkv, mine.attn.c_attn), (block.out, mine.attn.c_proj)]
            pairs += [(block.up, mine.mlp.c_fc), (block.down, mine.mlp.c_proj)]
        with torch.no_grad():
            for theirs, mine in pairs:
                for key, value in mine.state_dict().items():
                    transposed = isinstance(theirs, nn.Linear) and key == "weight"
                    theirs.state_dict()[key].copy_(value.t() if transposed else value)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    found = []
    for batch in (12, 32):
        torch.manual_seed(0)
        ours, peer = GPT(Architecture(vocabulary, context, layers, heads, width)), Peer()
        copy_into(peer, ours)
        optimizers = {ours: optimizer_of(ours), peer: optimizer_of(peer)}
        data = torch.randint(vocabulary, (10, batch, context + 1))

        def ten_steps(model, optimizer, loss_of, data=data):
            losses = []
            for ids in data:
                loss = loss_of(model(ids[:, :-1]), ids[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses)

        def plain_loss(logits, targets):
            return F.cross_entropy(logits.view(-1, vocabulary), targets.reshape(-1))

        def mine(ours=ours, run=ten_steps, optimizers=optimizers):
            return run(ours, optimizers[ours], next_token_loss)

        def theirs(peer=peer, run=ten_steps, optimizers=optimizers, loss=plain_loss):
            return run(peer, optimizers[peer], loss)

        gap = float((mine() - theirs()).abs().max())
        if gap > 1e-3:
            raise AssertionError(f"the losses of the first ten steps differ by {gap}")
        equal = (
            f"4 layers, width 128, context 64, float32, fused AdamW and clipping on both sides, same weights and "
            f"batches, 1 thread, CPU time of 10 steps; losses of the first 10 steps agree within {gap:.0e}"
        )
        found.append(
            race(f"train step batch {batch}", once(mine), once(theirs), "plain nanoGPT-style loop", torch.__version__,
                 1.0, equal, pairs=7)
        )  # fmt: skip
    return found


def _bert() -> list[dict[str, Any]]:
    """The last layer's states of the same weights; ragged text without its padding; what the tokens cost beside them."""
    import torch
    import transformers

    from etude.data import texts
    from etude.language.parts.bert import Architecture, Bert
    from etude.language.parts.wordpiece import WordPiece

    vocabulary, layers, heads, width, batch, longest = 8000, 6, 6, 384, 16, 128
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, attn_implementation="sdpa",
    )  # fmt: skip
    peer = transformers.BertModel(config).eval()
    ours = Bert(Architecture(vocabulary, 512, layers, heads, width, 4 * width)).eval()
    ours.load_state_dict(peer.state_dict(), strict=False)
    found, name, version = [], "transformers, SDPA", transformers.__version__
    for case, lengths, bar in (
        ("full", torch.full((batch,), longest), 1.0),
        ("ragged", torch.randint(8, longest + 1, (batch,)), 1.5),
    ):
        mask = torch.arange(longest) < lengths[:, None]
        ids = torch.randint(1000, vocabulary, (batch, longest)) * mask

        @torch.no_grad()
        def mine(ids=ids, mask=mask):
            return ours(ids, None, mask)

        @torch.no_grad()
        def theirs(ids=ids, mask=mask):
            return peer(ids, attention_mask=mask.long()).last_hidden_state

        gap = float((mine() - theirs())[mask].abs().max())
        if gap > 1e-3:
            raise AssertionError(f"the states differ by {gap}")
        equal = (
            f"{layers} layers, width {width}, {batch} texts of {int(lengths.min())} to {longest} tokens, "
            f"{len(ids[mask]) / ids.numel():.0%} text, float32, same weights, 1 thread, CPU time; states agree within {gap:.0e}"
        )
        found.append(race(f"bert inference, {case}", once(mine), once(theirs), name, version, bar, equal, pairs=7))
    text = texts.house()
    tokens = WordPiece.learn(text, 1000)
    lines = [line for line in text.split("\n") if line.strip()][:200]

    def encode():
        fresh = WordPiece(tokens.tokens, tokens.lower)  # no word is known already
        return [fresh.encode(line) for line in lines]

    rows = encode()
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    seen = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]

    @torch.no_grad()
    def read():
        return ours(padded, None, seen)

    equal = f"{len(lines)} lines of the house text, {sum(map(len, rows))} tokens; how many times as long the encoder above takes"
    found.append(
        race("tokenising for bert", cpu(encode, 3), once(read), "the encoder itself", version, 10.0, equal, pairs=5)
    )
    return found


def _word2vec() -> list[dict[str, Any]]:
    """Seconds of a word read, from the difference of a long and a short run; similarity of words against PPMI's SVD.

    One thread by the CPU's clock; two by the wall's, which says something on a quiet machine only.
    """
    import gensim
    import torch

    import etude
    from etude import data
    from etude.data.texts import split
    from etude.language.word2vec.pairs import Vocabulary, split_words
    from etude.language.word2vec.scores import agreement, pair_counts, ppmi_vectors

    words = split_words(split(data.text("tiny_shakespeare").text)[0])
    vocabulary = Vocabulary(words, 5)
    known = set(vocabulary.words)
    kept = [word for word in words if word in known]
    passes, width, batch = 12, 100, 4000
    steps = passes * -(-len(kept) // batch)
    counts = pair_counts(vocabulary.encode(words), 500, 5, True)
    judge, quality = ppmi_vectors(counts, width), {}
    sentences = [kept[i : i + 1000] for i in range(0, len(kept), 1000)]

    def gensims(threads: int, clock: Callable[[], float]) -> float:
        model = gensim.models.Word2Vec(
            vector_size=width,
            window=5,
            min_count=5,
            sample=1e-3,
            sg=1,
            negative=5,
            workers=threads,
            alpha=0.05,
            min_alpha=5e-5,
            seed=1,
        )
        model.build_vocab(sentences)
        began = clock()
        model.train(sentences, total_examples=len(sentences), epochs=passes)
        spent = clock() - began
        table = torch.stack([torch.tensor(model.wv[word]) for word in vocabulary.words[:500]])
        quality["gensim"] = agreement(table, judge)
        return spent / (passes * len(kept))

    def ours(shared: int, threads: int, clock: Callable[[], float]) -> float:
        spent = []
        for count in (steps // 6, steps):
            with tempfile.TemporaryDirectory() as folder:
                began = clock()
                done = etude.run(
                    "language/word2vec", out=f"{folder}/run", quiet=True, threads=threads, preset="shakespeare", steps=count,
                    shared_negatives=shared, evaluate_every=0,
                )  # fmt: skip
                spent.append(clock() - began)
        quality[str(shared)] = done.metrics["ppmi_spearman"]
        return (spent[1] - spent[0]) / ((steps - steps // 6) * batch)

    found = []
    cases = [
        (case, *of, threads) for threads in (1, 2) for case, *of in (("exact", 0, 1.0), ("shared negatives", 16, 4.0))
    ]
    for case, shared, bar, threads in cases:
        clock = time.process_time if threads == 1 else time.perf_counter
        row = race(
            f"word2vec, {case}" + ("" if threads == 1 else f", {threads} threads"),
            functools.partial(ours, shared, threads, clock),
            functools.partial(gensims, threads, clock),
            "gensim Word2Vec",
            gensim.__version__,
            bar,
            "",
            pairs=5,
        )
        row["equal"] = (
            f"tiny Shakespeare, {len(kept)} words, {passes} passes, width {width}, window 5, 5 negatives, least count 5, "
            f"{'1 thread, CPU seconds' if threads == 1 else f'{threads} threads each, seconds'} a word; "
            f"rank correlation with PPMI's SVD {quality[str(shared)]:.2f}, gensim {quality['gensim']:.2f}"
        )
        found.append(row)
    return found


if __name__ == "__main__":
    chosen = " ".join(sys.argv[1:])
    known = json.loads((RESULTS / "language.json").read_text()) if chosen else []
    fresh = rows(chosen)
    names = {row["name"] for row in fresh}
    report("language", [row for row in known if row["name"] not in names] + fresh)
