"""GPT against Hugging Face's generate, and its training step against a plain nanoGPT-style loop.

One CPU thread, and cost is CPU time of this process: on one thread that is the time the work takes on a quiet core,
and it does not count what other programs do. Run it as `python benchmarks/language.py`.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from race import cpu, race, report

PROMPT, NEW = 32, 64
once = functools.partial(cpu, repeats=1)  # a call takes seconds


def rows() -> list[dict[str, Any]]:
    """All rows; float32 decoding is timed with the packing of the weights in every call."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_decoding(), *_training()]
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


if __name__ == "__main__":
    report("language", rows())
