"""The Transformer's training step against torch.nn.Transformer, what leaving out the padding gains, beam search against Hugging
Face's generate, and recurrent networks against torch's modules and cells.

One CPU thread, and cost is CPU time of this process: on one thread that is the time the work takes on a quiet core,
and it does not count what other programs do. Run it as `python benchmarks/sequence.py`; `transformer`, `beam` or
`recurrent` behind it renews these rows alone.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from race import RESULTS, cpu, race, report

once = functools.partial(cpu, repeats=1)  # a call takes seconds
VOCABULARY, WIDTH, HEADS, LAYERS, BATCH, STEPS = 4000, 128, 4, 3, 64, 3


def rows(part: str = "") -> list[dict[str, Any]]:
    """All rows, or those of a part."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = {"transformer": _transformer, "beam": _beam, "recurrent": _recurrent}
    try:
        return [row for name, made in parts.items() if part in ("", name) for row in made()]
    finally:
        torch.set_num_threads(before)


def _transformer() -> list[dict[str, Any]]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    from etude.blocks.nn.positional import sinusoids
    from etude.sequence.parts.translating import BOS, EOS, PAD, Batch, padded
    from etude.sequence.transformer import Architecture, Transformer
    from etude.sequence.transformer.train import smoothed_nats

    class Peer(nn.Module):
        """The usual way to train torch.nn.Transformer: padded batches, masks, cross_entropy that ignores the padding."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, shape = nn.Embedding(VOCABULARY, WIDTH), (WIDTH, HEADS, 4 * WIDTH, 0.0)
            encoder, decoder = (
                kind(*shape, batch_first=True) for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
            )
            self.inner = nn.Transformer(
                WIDTH, HEADS, batch_first=True,
                custom_encoder=nn.TransformerEncoder(encoder, LAYERS, enable_nested_tensor=False),
                custom_decoder=nn.TransformerDecoder(decoder, LAYERS),
            )  # fmt: skip
            self.register_buffer("table", sinusoids(64, WIDTH), persistent=False)

        def forward(self, source, before):
            x, y = (self.embedding(ids) * math.sqrt(WIDTH) + self.table[: ids.shape[1]] for ids in (source, before))
            ahead = nn.Transformer.generate_square_subsequent_mask(before.shape[1], dtype=torch.bool)
            blank = source == PAD
            out = self.inner(
                x, y, tgt_mask=ahead, src_key_padding_mask=blank, memory_key_padding_mask=blank, tgt_is_causal=True
            )
            return out @ self.embedding.weight.T

    def with_padding(model: Transformer, batch: Batch):
        """Our network, computing the padding too."""
        mask = batch.source != PAD
        h = model.source_positions(model._embed(batch.source))
        for block in model.encoder:
            h = block(h, key_mask=mask)
        memory, h = h, model.target_positions(model._embed(batch.before))
        for block in model.decoder:
            h = block(h, memory, memory_key_mask=mask)
        return model._logits(h)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def batches(low: int, high: int) -> list[Batch]:
        """Sentences of `low` to `high` tokens on either side, in the order in which they come."""
        sides = [torch.randint(low, high + 1, (BATCH,)).tolist() for _ in range(2 * STEPS)]
        texts = [
            [torch.cat([torch.randint(3, VOCABULARY, (n - 1,)), torch.tensor([EOS])]) for n in side] for side in sides
        ]
        return [padded(list(zip(*texts[2 * i : 2 * i + 2]))) for i in range(STEPS)]

    def losses_of(model: nn.Module, data: list[Batch], loss_of: Any, optimizer: torch.optim.Optimizer) -> Any:
        found = []
        for batch in data:
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    def ours_of(model, batch):
        return smoothed_nats(
            model(batch.source, batch.lengths, batch.before, flat=True), batch.after[batch.after != PAD], 0.1
        )

    def torchs(logits, batch):
        return F.cross_entropy(logits.flatten(0, 1), batch.after.flatten(), ignore_index=PAD, label_smoothing=0.1)

    found, name = [], "torch.nn.Transformer"
    assert BOS != PAD
    for case, low, high, bar in (("lengths 8 to 24", 8, 24, 1.2), ("lengths 16", 16, 16, 1.0)):
        torch.manual_seed(0)
        data = batches(low, high)
        model = Transformer(Architecture(VOCABULARY, 64, LAYERS, HEADS, WIDTH, dropout=0.0))
        twin = Transformer(model.of)
        twin.load_state_dict(model.state_dict())
        peer = Peer()
        weights = {
            name.replace("encoder.", "inner.encoder.layers.").replace("decoder.", "inner.decoder.layers."): value
            for name, value in model.state_dict().items()
        }
        peer.load_state_dict(weights)
        share = sum(int((b.after != PAD).sum() + (b.source != PAD).sum()) for b in data)
        share /= sum(b.after.numel() + b.source.numel() for b in data)
        steps = {
            "ours": functools.partial(losses_of, model, data, ours_of, optimizer_of(model)),
            "peer": functools.partial(
                losses_of, peer, data, lambda m, b: torchs(m(b.source, b.before), b), optimizer_of(peer)
            ),
            "twin": functools.partial(
                losses_of, twin, data, lambda m, b: torchs(with_padding(m, b), b), optimizer_of(twin)
            ),
        }
        first = {key: run() for key, run in steps.items()}
        gap = max(float((first["ours"] - first[key]).abs().max()) for key in ("peer", "twin"))
        if gap > 1e-3:
            raise AssertionError(f"the losses of the first {STEPS} steps differ by {gap}")
        equal = (
            f"{LAYERS} + {LAYERS} layers, width {WIDTH}, {VOCABULARY} tokens, {BATCH} pairs, {share:.0%} of each batch text, "
            f"float32, fused Adam, post-norm, same weights and batches, 1 thread, CPU time of {STEPS} steps; losses of the "
            f"first {STEPS} steps agree within {gap:.0e}"
        )
        timed = {key: once(run) for key, run in steps.items()}
        version = torch.__version__
        title = f"transformer step, {case}"
        found.append(race(title, timed["ours"], timed["peer"], name, version, bar, equal, pairs=5))
        if low < high:
            other, title = "the same network with the padding", f"transformer step, text alone, {case}"
            found.append(race(title, timed["ours"], timed["twin"], other, version, 1.2, equal, pairs=5))
    return found


def _beam() -> list[dict[str, Any]]:
    """The same weights in both networks, tokens compared."""
    import torch
    import transformers
    from transformers.models.marian import modeling_marian as marian

    from etude.blocks.tokens.decoding import beam_search
    from etude.sequence.parts.translating import BOS, EOS, PAD
    from etude.sequence.transformer import Architecture, Transformer

    vocabulary, width, heads, layers, longest, beams, new = 8000, 256, 4, 3, 20, 4, 32
    sides = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (
        ("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))}  # fmt: skip
    torch.manual_seed(0)
    peer = marian.MarianMTModel(
        marian.MarianConfig(
            vocab_size=vocabulary, d_model=width, activation_function="relu", scale_embedding=True, pad_token_id=PAD,
            max_position_embeddings=128, decoder_start_token_id=BOS, eos_token_id=EOS, bos_token_id=BOS,
            share_encoder_decoder_embeddings=True, forced_eos_token_id=None, **sides,
        )
    ).eval()  # fmt: skip
    for name, parameter in peer.named_parameters():
        if "embed_positions" not in name and "norm" not in name:
            parameter.data.normal_(std=0.06 if parameter.ndim > 1 else 0.1)
    last: Any = peer.model.decoder.layers[-1]  # signs, so that the likeliest token is not the one that was just written
    last.final_layer_norm.weight.data.copy_(2 * torch.randn(width).sign())
    peer.tie_weights()
    order = torch.arange(width).view(2, -1).t().flatten()  # Marian's waves are [sines | cosines], ours alternate
    theirs = peer.state_dict()
    mine = {"embedding.weight": theirs["model.shared.weight"][:, order]}
    for side, kinds in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for layer in range(layers):
            old, ours = f"model.{side}.layers.{layer}.", f"{side}.{layer}."
            for kind, name in zip(kinds, ("self_attn", "multihead_attn")):
                inward = [theirs[f"{old}{kind}.{p}_proj.weight"][:, order] for p in "qkv"]
                mine[f"{ours}{name}.in_proj_weight"] = torch.cat(inward)
                mine[f"{ours}{name}.in_proj_bias"] = torch.cat([theirs[f"{old}{kind}.{p}_proj.bias"] for p in "qkv"])
            for one in ("weight", "bias"):
                for kind, name in zip(kinds, ("self_attn", "multihead_attn")):
                    mine[f"{ours}{name}.out_proj.{one}"] = theirs[f"{old}{kind}.out_proj.{one}"][order]
                for number, kind in enumerate((*kinds, "final"), 1):
                    mine[f"{ours}norm{number}.{one}"] = theirs[f"{old}{kind}_layer_norm.{one}"][order]
                mine[f"{ours}linear2.{one}"] = theirs[f"{old}fc2.{one}"][order]
            mine[f"{ours}linear1.weight"] = theirs[f"{old}fc1.weight"][:, order]
            mine[f"{ours}linear1.bias"] = theirs[f"{old}fc1.bias"]
    model = Transformer(Architecture(vocabulary, 128, layers, heads, width, dropout=0.0)).eval()
    model.load_state_dict(mine)

    found = []
    for batch in (1, 8):
        lengths = torch.randint(12, longest + 1, (batch,)) if batch > 1 else torch.tensor([longest])
        lengths[0] = longest
        source = torch.randint(3, vocabulary, (batch, longest))
        source[torch.arange(batch), lengths - 1] = EOS
        source[torch.arange(longest) >= lengths[:, None]] = PAD
        begin, asked = torch.full((batch,), BOS), {"attention_mask": (source != PAD).long(), "do_sample": False}
        asked |= {"num_beams": beams, "max_new_tokens": new, "length_penalty": 1.0, "early_stopping": True}

        @torch.no_grad()
        def search(source=source, lengths=lengths, begin=begin):
            return beam_search(model.step, model.begin(source, lengths), begin, new, beams=beams, stop=EOS, pad=PAD)

        def generate(source=source, asked=asked):
            return peer.generate(source, **asked)

        said, told = search(), generate()[:, 1:]
        if not torch.equal(said.tokens[:, 0, : told.shape[1]], told):
            raise AssertionError(f"the tokens of batch {batch} differ")
        different = len(set(told.flatten().tolist()))
        equal = (
            f"{layers} + {layers} layers, width {width}, {vocabulary} tokens, random weights, the same on both sides, sources of "
            f"{int(lengths.min())} to {longest} tokens, {beams} beams, {told.shape[1]} new tokens, float32, 1 thread, CPU time; "
            f"all tokens identical ({different} different ones)"
        )
        found.append(
            race(f"beam search batch {batch}", cpu(search, 3), cpu(generate, 3), "transformers generate",
                 transformers.__version__, 1.5, equal, pairs=9)
        )  # fmt: skip
    return found


def _recurrent() -> list[dict[str, Any]]:
    """Training in the same loop on both sides, generation against a loop over torch's cells; the same weights and dice."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from etude.blocks.nn.recurrent import Recurrent
    from etude.sequence.parts.steps import FEW, generate
    from etude.sequence.parts.text import CharacterModel

    vocabulary, width, batch, time, count = 65, 128, 32, 64, FEW
    found = []
    for cell, layer, single in (("lstm", nn.LSTM, nn.LSTMCell), ("gru", nn.GRU, nn.GRUCell)):
        torch.manual_seed(0)
        ours = CharacterModel(vocabulary, 64, Recurrent(cell, 64, width))  # type: ignore[arg-type]
        theirs = nn.ModuleDict(
            {"embedding": nn.Embedding(vocabulary, 64), "recurrent": layer(64, width, batch_first=True),
             "readout": nn.Linear(width, vocabulary)}
        )  # fmt: skip
        theirs.load_state_dict(ours.state_dict())
        data = torch.randint(vocabulary, (8, batch, time + 1))

        def peer_logits(x, theirs=theirs):
            return theirs["readout"](theirs["recurrent"](theirs["embedding"](x))[0])

        def steps(model, logits_of, optimizer, data=data):
            losses = []
            for rows in data:
                loss = F.cross_entropy(logits_of(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses)

        mine, its = (torch.optim.Adam(m.parameters(), 2e-3, fused=True) for m in (ours, theirs))
        train = functools.partial(steps, ours, lambda x, m=ours: m(x)[0], mine)
        plain = functools.partial(steps, theirs, peer_logits, its)
        gap = float((train() - plain()).abs().max())
        if gap > 1e-4:
            raise AssertionError(f"the losses of {cell} differ by {gap}")
        equal = (
            f"width {width}, {batch} x {time} characters, float32, fused Adam and clipping, same weights and batches, 1 thread, "
            f"CPU time of {len(data)} steps; losses of the first {len(data)} agree within {gap:.0e}"
        )
        name, version = f"torch.nn.{layer.__name__}", torch.__version__
        found.append(race(f"{cell} training", cpu(train, 3), cpu(plain, 3), name, version, 1.0, equal, pairs=9))

        one = single(64, width)
        one.load_state_dict({key.removesuffix("_l0"): value for key, value in ours.recurrent.state_dict().items()})
        ours.eval()

        @torch.no_grad()
        def loop(one=one, ours=ours):
            dice, state, token, said = torch.Generator().manual_seed(0), None, torch.zeros(1, dtype=torch.int64), []
            for _ in range(count):
                state = one(ours.embedding(token), state)
                logits = ours.readout(state[0] if isinstance(state, tuple) else state)
                token = torch.multinomial((logits / 0.8).softmax(-1), 1, generator=dice)[:, 0]
                said.append(token)
            return torch.cat(said)

        def write(ours=ours):
            dice = torch.Generator().manual_seed(0)
            return generate(ours, torch.zeros(1, 1, dtype=torch.int64), count, temperature=0.8, generator=dice)[0, 1:]

        if not torch.equal(loop(), write()):
            raise AssertionError(f"the characters written by {cell} differ")
        equal = f"width {width}, {count} characters, temperature 0.8, same weights and dice, 1 thread, CPU time; all identical"
        name = f"a loop over torch.nn.{single.__name__}"
        found.append(race(f"{cell} generation", cpu(write, 3), once(loop), name, version, 3.0, equal, pairs=9))
    return found


if __name__ == "__main__":
    chosen = " ".join(sys.argv[1:])
    known = json.loads((RESULTS / "sequence.json").read_text()) if chosen else []
    fresh = rows(chosen)
    names = {row["name"] for row in fresh}
    report("sequence", [row for row in known if row["name"] not in names] + fresh)
