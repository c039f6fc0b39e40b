"""What `etude sample` does with a run that has learned to write, long texts in machine code"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from etude.blocks.tokens import writing
from etude.blocks.tokens.text import Tokenizer
from etude.blocks.tokens.writing import Sample
from etude.core.run import Loaded
from etude.sequence.parts import steps
from etude.sequence.parts.text import CharacterModel

__all__ = ["Sample", "generate", "sample", "write"]


def sample(loaded: Loaded, options: Sample, folder: Path) -> str:
    """See `etude.blocks.tokens.writing.sample`."""
    return writing.sample(loaded, options, folder, steps.stream)


def generate(loaded: Loaded, prompts: list[str], options: Sample) -> list[str]:
    """See `etude.blocks.tokens.writing.generate`."""
    return writing.generate(loaded, prompts, options, steps.generate)


def write(model: nn.Module, tokens: Tokenizer, prompt: Tensor, count: int, dice: torch.Generator) -> str:
    """A prompt (P,) and `count` tokens drawn after it at temperature 0.8, as text; the model's mode is put back."""
    training = model.training
    model.eval()
    ids = steps.generate(cast(CharacterModel, model), prompt[None], count, temperature=0.8, generator=dice)
    model.train(training)
    return tokens.decode(ids[0])
