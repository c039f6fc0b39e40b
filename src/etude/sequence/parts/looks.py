"""Where a translator looked, as pictures, and what it wrote, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from etude.sequence.parts.translating import EOS, Pairs, Special, Task, Translator, padded, translate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_maps", "names_of", "shown_pairs", "table"]


def names_of(tokens: Special, ids: Tensor) -> list[str]:
    """Each token as it reads, and the end as ⏎."""
    return ["⏎" if int(i) == EOS else tokens.decode([int(i)]).strip() or "␣" for i in ids]


def attention_maps(maps: Sequence[tuple[Tensor, list[str], list[str]]]) -> Figure:
    """Weights α (T, S) of several translations side by side: rows are written, columns are read; dark is 1."""
    from matplotlib.colors import LinearSegmentedColormap

    from etude.blocks.pictures.panels import INK, PAPER, label, panels

    shades = LinearSegmentedColormap.from_list("ink", [PAPER, INK])
    tall = max(0.9 + 0.19 * len(written) for _, written, _ in maps)
    figure, axes = panels(len(maps), width=max(6.4, sum(0.9 + 0.19 * len(read) for _, _, read in maps)), height=tall)
    for place, (weights, written, read) in zip(axes, maps):
        place.imshow(weights.detach().cpu().float().numpy(), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        place.set_xticks(range(len(read)), read, fontsize=7, rotation=90, parse_math=False)
        place.set_yticks(range(len(written)), written, fontsize=7, parse_math=False)
        place.tick_params(length=0)
        place.spines[:].set_visible(False)
        place.grid(visible=False)
        label(place, "", "read", "written")
    return figure


def shown_pairs(task: Task, count: int = 3, most: int = 24) -> Pairs:
    """Of the validation pairs the first with the longest sources that a picture has room for."""
    room = [pair for pair in task.validation[:200] if max(len(task.tokens.encode(side)) for side in pair) <= most]
    return sorted(room or task.validation[:200], key=lambda pair: -len(pair[0]))[:count]


def table(model: Translator, task: Task, pairs: Pairs, **rules: Any) -> str:
    """Sources, given translations and the network's, as lines; `rules` are those of `translate`."""
    told = translate(model, task, [a for a, _ in pairs], longest=task.longest, **rules)
    return "\n\n".join(f"source  {a}\ngiven   {b}\nours    {c}" for (a, b), c in zip(pairs, told)) + "\n"


def as_batch(task: Task, source: str, target: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pair as the network reads it: source (1, S), lengths, before and after (1, T)."""
    return tuple(padded([(task.tokens.encode(source), task.tokens.encode(target))]))  # type: ignore[return-value]
