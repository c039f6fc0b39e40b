"""Pictures of an ensemble: scores by the number of members, and the ways to put their answers together"""

from __future__ import annotations

from typing import TYPE_CHECKING

from etude.blocks.classifying.ensembles import Spread
from etude.blocks.pictures.panels import panels
from etude.blocks.pictures.plots import INK, PALETTE, WIDTH, bars
from etude.core.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pictures(
    run: Run, result: dict[str, float], found: dict[str, list[float]], share: Spread, averages: bool, what: str
) -> None:
    """Scores by number of members, the ways to put answers together, and both in numbers.

    `averages`: whether the members are such that the average of their weights means something.
    """
    caption = f"{what}: the first m members together (lines), member m alone (dots), mean of the members (dashed)"
    caption += "; snapshots count from the latest." if "snapshots" in what else "."
    line = {"accuracy": result["test_averaged_accuracy"], "nll": result["test_averaged_nll"]} if averages else {}
    run.artifact("members", _picture(found, line), caption)
    names = {
        "one member (mean)": result["test_member_accuracy"],
        "vote": result["test_vote_accuracy"],
        "mean probability": result["test_probability_accuracy"],
    }
    if averages:
        names["averaged weights"] = result["test_averaged_accuracy"]
    errors = [100 * (1 - value) for value in names.values()]
    run.artifact("errors", bars(list(names), errors, x="test error, %"), f"{what}: how the answers are put together.")
    variance = {"one member σ²": share.variance, "formula": share.formula, "mean of the members": share.measured}
    members = list(range(1, len(found["nll"]) + 1))
    table = {"members": members, **found, "variance": variance, "correlation": share.correlation}
    run.artifact("table", table, "The same in numbers, and the variance of the error 1 − p(y | x) over test images.")


def _picture(found: dict[str, list[float]], averaged: dict[str, float]) -> Figure:
    """Accuracy and negative log-likelihood against the number of members, one above the other."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = panels(rows=2, height=WIDTH * 1.1, sharex=True)
    m = range(1, len(found["nll"]) + 1)
    for axis, name, label in zip(axes, ("accuracy", "nll"), ("accuracy", "negative log-likelihood, nats")):
        single = found[f"single_{name}"]
        axis.plot(m, found[name], color=PALETTE[0], linewidth=1.8, label="mean probability")
        axis.plot(m, single, "o", color=PALETTE[7], markersize=4.5, label="member m alone")
        axis.axhline(sum(single) / len(single), color=PALETTE[7], linewidth=1, linestyle="--", label="their mean")
        if name == "accuracy":
            axis.plot(m, found["vote_accuracy"], color=PALETTE[1], linewidth=1.4, label="vote")
        if averaged:
            axis.axhline(averaged[name], color=PALETTE[2], linewidth=1.2, linestyle=":", label="averaged weights")
        axis.set_ylabel(label)
    axes[0].legend(
        frameon=False, fontsize=8, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2
    )
    axes[1].set_xlabel("members m")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
