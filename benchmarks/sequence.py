"""The Transformer's training step against torch.nn.Transformer, and what leaving out the padding gains.

One CPU thread, and cost is CPU time of this process: on one thread that is the time the work takes on a quiet core,
and it does not count what other programs do. Run it as `python benchmarks/sequence.py`.
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from race import cpu, race, report

once = functools.partial(cpu, repeats=1)  # a call takes seconds
VOCABULARY, WIDTH, HEADS, LAYERS, BATCH, STEPS = 4000, 128, 4, 3, 64, 3


def rows() -> list[dict[str, Any]]:
    """All rows."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _transformer()
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


if __name__ == "__main__":
    report("sequence", rows())
