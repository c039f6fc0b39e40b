"""The Transformer as torch holds it, on padded batches with masks: what the network and the loop of the room are held against.

Not a test itself: `runpy.run_path` brings it into the tests. Of etude only the table of sinusoids is used, which has tests of its own.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from etude.blocks.nn.positional import sinusoids

PAD, BOS, EOS = 0, 1, 2


class Plain(nn.Module):
    """Token vectors times √D and positions around `torch.nn.Transformer`; the softmax's matrix is the table of tokens."""

    def __init__(self, of):
        super().__init__()
        self.of, width, pre = of, of.width, of.norm_placement == "pre"
        self.embedding, self.chance = nn.Embedding(of.vocabulary, width), of.dropout
        shape = (width, of.heads, 4 * width, of.dropout)
        encoder, decoder = (
            kind(*shape, batch_first=True, norm_first=pre)
            for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        )
        norms = [nn.LayerNorm(width) if pre else None for _ in range(2)]  # the paper has none behind the last layer
        self.inner = nn.Transformer(
            width, of.heads, batch_first=True,
            custom_encoder=nn.TransformerEncoder(encoder, of.layers, norms[0], enable_nested_tensor=False),
            custom_decoder=nn.TransformerDecoder(decoder, of.layers, norms[1]),
        )  # fmt: skip
        for side in ("source", "target"):
            if of.positions in ("learned", "concatenated"):
                setattr(self, f"{side}_table", nn.Parameter(torch.empty(of.context, width)))
            if of.positions in ("concatenated", "appended"):
                setattr(
                    self, f"{side}_join", nn.Linear(2 * width if of.positions == "concatenated" else width + 1, width)
                )

    def load(self, state):
        """Weights by etude's names."""
        named = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if first in ("encoder", "decoder"):
                name = f"inner.{first}.layers.{rest}"
            elif first in ("encoder_norm", "decoder_norm"):
                name = f"inner.{first.removesuffix('_norm')}.norm.{rest}"
            elif first in ("source_positions", "target_positions"):
                name = f"{first.removesuffix('_positions')}_{rest}".removesuffix(".weight" if "table" in rest else "\n")
            named[name] = value
        self.load_state_dict(named)

    def named_like_ours(self):
        """(etude's name, parameter)."""
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            if parts[0] == "inner":
                name = ".".join([parts[1], *parts[3:]] if parts[2] == "layers" else [f"{parts[1]}_norm", *parts[3:]])
            elif parts[0].endswith(("_table", "_join")):
                side, kind = parts[0].split("_")
                name = ".".join([f"{side}_positions", kind, *(parts[1:] or ["weight"])])
            yield name, parameter

    def placed(self, ids, side):
        x, of = self.embedding(ids) * math.sqrt(self.of.width), self.of
        count = ids.shape[1]
        if of.positions == "sinusoidal":
            x = x + sinusoids(count, of.width, dtype=torch.float64).to(x.dtype)
        elif of.positions == "learned":
            x = x + getattr(self, f"{side}_table")[:count]
        elif of.positions == "concatenated":
            beside = getattr(self, f"{side}_table")[:count].expand(len(ids), -1, -1)
            x = getattr(self, f"{side}_join")(torch.cat([x, beside], 2))
        elif of.positions == "appended":
            beside = (torch.arange(count, dtype=x.dtype) / of.context)[None, :, None].expand(len(ids), -1, 1)
            x = getattr(self, f"{side}_join")(torch.cat([x, beside], 2))
        return F.dropout(x, self.chance, self.training)

    def forward(self, source, before):
        """Logits (B, T, V) from ids with PAD behind the text."""
        blank, ahead = source == PAD, torch.ones(before.shape[1], before.shape[1], dtype=torch.bool).triu(1)
        memory = self.inner.encoder(self.placed(source, "source"), src_key_padding_mask=blank)
        given = {"tgt_mask": ahead, "memory_key_padding_mask": blank}
        states = self.inner.decoder(self.placed(before, "target"), memory, **given)
        return states @ self.embedding.weight.T


@torch.no_grad()
def written(model, source, count, beams, penalty):
    """The best translation of one sentence (S,), without EOS: beam search over lists, everything computed anew for each token."""
    live, done = [([], 0.0)], []
    for t in range(1, count + 1):
        grown = []
        for tokens, total in live:
            told = model(source[None], torch.tensor([[BOS, *tokens]]))[0, -1].log_softmax(-1)
            grown += [([*tokens, token], total + chance) for token, chance in enumerate(told.tolist())]
        grown.sort(key=lambda one: -one[1])
        ending = [one for one in grown[:beams] if one[0][-1] == EOS or t == count]
        done += [(tokens, total / t**penalty) for tokens, total in ending]
        live = [one for one in grown[: 2 * beams] if one[0][-1] != EOS][:beams]
        if len(done) >= beams or t == count:
            break
    best = max(done, key=lambda one: one[1])[0]
    return best[:-1] if best[-1] == EOS else best
