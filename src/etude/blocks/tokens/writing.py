"""What `etude sample` does with a model that writes: texts, token by token, or many prompts side by side"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.blocks.tokens import decoding
from etude.blocks.tokens.text import UNKNOWN, Tokenizer, pieces, tokenizer
from etude.core.config import Count, Positive, Probability
from etude.core.errors import UserError
from etude.core.run import Loaded

__all__ = ["Sample", "generate", "sample"]


@dataclass(frozen=True)
class Sample:
    prompt: str = ""
    """What the text begins with; empty: a new line, or the first of the known characters where there is none."""
    count: Count = 500
    """Number of tokens to write."""
    temperature: Positive = 0.8
    """Below 1: more cautious; above 1: wilder."""
    top_k: Count | None = None
    """Draw among the k most probable tokens only."""
    top_p: Probability | None = None
    """Draw among the fewest tokens that hold this much probability."""
    greedy: bool = False
    """Always take the most probable token."""
    samples: Count = 1
    """Texts to write."""
    seed: int = 0
    """Same seed, same texts."""


def sample(
    loaded: Loaded, options: Sample, folder: Path, stream: Callable[..., Iterator[Tensor]] = decoding.stream
) -> str:
    """Write texts to the terminal as they arise, and all of them to sample.txt; `stream` draws as `decoding.stream` does.

    Raises UserError where the options leave no token.
    """
    model: Any = loaded.model.eval()
    tokens: Any = tokenizer(loaded.spec.extra["tokenizer"])
    prompt, written = options.prompt or _opening(tokens), []
    for index in range(options.samples):
        ids = tokens.encode(prompt)[None].to(next(model.parameters()).device)
        dice = torch.Generator().manual_seed(options.seed + index)
        drawn = stream(model, ids, options.count, generator=dice, **_rules(options))
        written.append(prompt)
        sys.stdout.write(prompt)
        for piece in pieces(tokens, (int(token) for token in drawn)):
            written[-1] += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    (folder / "sample.txt").write_text("\n\n".join(written) + "\n", encoding="utf-8")
    return ""


def generate(
    loaded: Loaded, prompts: list[str], options: Sample, draw: Callable[..., Tensor] = decoding.generate
) -> list[str]:
    """Each prompt and what the model writes after it, all side by side: `options.samples` texts a prompt, in order.

    Every text is the one that its prompt would get alone, whatever the lengths of the others; `options.prompt` stands
    where a prompt is empty; `draw` draws as `decoding.generate` does. Raises UserError where the options leave no token.
    """
    model: Any = loaded.model.eval()
    tokens: Any = tokenizer(loaded.spec.extra["tokenizer"])
    begun = [prompt or options.prompt or _opening(tokens) for prompt in prompts for _ in range(options.samples)]
    if not begun:
        return []
    device = next(model.parameters()).device
    ids, pads = decoding.pad_left([tokens.encode(prompt).to(device) for prompt in begun])
    dice = [torch.Generator().manual_seed(options.seed + i % options.samples) for i in range(len(begun))]
    whole = draw(model, ids, options.count, pads=pads, generator=dice, **_rules(options))
    told, asked = ([tokens.decode(row[pad:]) for row, pad in zip(rows, pads.tolist())] for rows in (whole, ids))
    return [prompt + text[len(before) :] for prompt, text, before in zip(begun, told, asked)]


def _opening(tokens: Tokenizer) -> str:
    known = getattr(tokens, "alphabet", "\n").replace(UNKNOWN, "")
    return "\n" if "\n" in known else known[0]


def _rules(options: Sample) -> dict[str, Any]:
    if options.top_p == 0:
        raise UserError("--top-p is 0, which leaves no token; give a share above 0, or --greedy")
    names = ("temperature", "top_k", "top_p", "greedy")
    return {name: getattr(options, name) for name in names}
