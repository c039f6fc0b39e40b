"""Ensembles: several networks answer together, and are surer and more often right

Paper: Breiman, Bagging Predictors, 1996; Lakshminarayanan, Pritzel & Blundell, Simple and Scalable Predictive
Uncertainty Estimation using Deep Ensembles, 2016, arXiv:1612.01474; Lee et al., Why M Heads are Better than One, 2015,
arXiv:1511.06314; Huang et al., Snapshot Ensembles, 2017, arXiv:1704.00109; Izmailov et al., Averaging Weights Leads to
Wider Optima and Better Generalization, 2018, arXiv:1803.05407.

Equation: p(y | x) = (1/M) Σ_j p_j(y | x), or the class that most members put first. By Jensen's inequality, for every
    example,  −log p(y | x) ≤ (1/M) Σ_j −log p_j(y | x). Errors of variance σ² and pairwise correlation ρ leave
    Var[(1/M) Σ_j e_j] = ρσ² + (1 − ρ)σ²/M,  here over the test examples of e_j = 1 − p_j(y | x).

Algorithm:
1. make the members: `seeds` M initialisations; `bagging` these, each with N examples drawn with replacement from the N;
   `heads` M copies of the end of the network on one trunk; `snapshots` one network
2. at each step every member descends the cross-entropy of its own mini-batch; heads share one, and the trunk gets the
   sum of their gradients; of `snapshots` the network is kept at the end of each cycle of the rate (cyclic), or M times
   in the second half of the run (constant)
3. combine the answers of 1, 2, … M members; compare with one member, and with the one network of averaged weights,
   whose batch-norm statistics are estimated again

Differences:
- E22: M is the number of members, N of examples; drawing is with replacement; what averages is models, not policies.
  Their correlation bounds the gain, so ρ and both sides of the variance formula are reported.
- E23: the notes average any snapshots of SGD: they must come from a cyclic or constant rate, and batch normalisation
  needs new statistics behind an average of weights. The average is reported for every kind, to show where it works:
  0.92 for snapshots, 0.69 to 0.78 for five networks that began differently (0.92 each), 0.3 for deeper ones. Hence
  `--combine weights` is a choice for snapshots only (of basics/mlp and vision/lenet).
- Deep ensembles: no adversarial training (the paper's optional part); cross-entropy is a proper scoring rule already.
- Heads begin where `--split` says, each with initial weights of its own; TreeNets choose the place by experiment too.
- An accuracy may well not grow with M; the negative log-likelihood never rises above the members' mean.

Expect: one core, MNIST with 2,000 training images, 3 to 6 s: 5 networks of 256 units NLL 0.268 → 0.242 (seed 0), 5
    bootstrap samples 0.328 → 0.263; 54,000 images, 256-128 units: one network 0.091, 5 heads on one trunk 0.082 to
    0.089, 5 networks 0.076; averaged weights of the last 10 epochs 0.002 below the mean snapshot.
Command: `etude run basics/ensembles --preset mnist`; another classifier:
    `etude run basics/ensembles --of vision/lenet --ensemble heads --split classifier.1 --settings steps=200`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from etude import catalog
from etude import data as room
from etude.basics.parts.ensemble_pictures import pictures
from etude.blocks.classifying.batches import batches, subset, training_images
from etude.blocks.classifying.ensembles import (
    assemble,
    average_parameters,
    disagreement,
    mean_log_probability,
    member_networks,
    reestimate,
    spread,
    vote_log_share,
)
from etude.blocks.classifying.recipe import Recipe
from etude.blocks.classifying.scores import evaluate
from etude.blocks.classifying.updates import clip, clipped_together, losses, take_snapshot
from etude.blocks.metrics import accuracy, nll
from etude.catalog import Control, Experiment, method
from etude.core.config import Count, Few, replace
from etude.core.errors import UserError, nearest
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import set_lr


@dataclass(frozen=True)
class Config:
    of: str = "basics/mlp"
    """The classifier that is multiplied: a method's name in the catalogue (basics/mlp, vision/lenet)."""
    of_preset: str = "default"
    """Preset of that method."""
    settings: tuple[str, ...] = ()
    """Settings of that method that differ from its preset, each as name=value (widths=[256] steps=320 initializer=glorot)."""
    data: str = ""
    """Dataset or a folder of class-named image folders; empty takes what the preset of that method says."""
    examples: Count | None = None
    """Training images to learn from, drawn by the seed; None takes what that method says."""
    ensemble: Literal["seeds", "bagging", "heads", "snapshots"] = "seeds"
    """Members: other seeds, bootstrap samples, heads on one trunk, or snapshots of one network."""
    members: Few = 5
    """Number of members M."""
    combine: Literal["probability", "vote"] = "probability"
    """What the saved model answers: mean probability or majority vote."""
    split: str | None = None
    """Where heads begin, a child of the network's last Sequential (layers.3); None: the last linear layer."""


_MNIST = ("widths=[256]", "steps=320", "evaluate_every=0")  # 20 epochs of 2,000 images
_ALL = ("widths=[256,128]", "steps=844", "evaluate_every=0")  # 2 epochs of all training images
_DEEP = ("widths=[256,128]", "steps=320", "evaluate_every=0")

PRESETS = {
    "tiny": Config(of_preset="tiny", examples=200, members=3),  # 1 s
    "default": Config(settings=("steps=200", "evaluate_every=0"), examples=400),  # 2 s → NLL 0.159 → 0.138
    "mnist": Config(data="mnist", examples=2000, settings=_MNIST),  # 3 s → NLL 0.268 → 0.242
    "bagging": Config(data="mnist", examples=2000, settings=_MNIST, ensemble="bagging"),  # 0.328 → 0.263
    "deep": Config(data="mnist", examples=2000, settings=_DEEP),  # 0.284 → 0.237
    "trunk": Config(data="mnist", examples=2000, settings=_DEEP, ensemble="heads", split="layers.3"),
    "all_deep": Config(data="mnist", examples=54_000, settings=_ALL),  # 12 s → 0.091 → 0.076
    "all_trunk": Config(data="mnist", examples=54_000, settings=_ALL, ensemble="heads", split="layers.3"),  # 0.084
    "snapshots": Config(data="mnist", examples=2000, settings=_MNIST, ensemble="snapshots", members=10),
    "cyclic": Config(
        data="mnist", examples=2000, ensemble="snapshots", settings=(*_DEEP, "schedule=cyclic", "learning_rate=3e-3")
    ),
}

METRICS = {
    "test_accuracy": "accuracy of the ensemble on the test split, combined as --combine says",
    "test_loss": "mean cross-entropy of the ensemble on the test split, combined as --combine says (nats)",
    "test_probability_accuracy": "accuracy of the mean of the members' probabilities",
    "test_vote_accuracy": "accuracy of the majority of the members' votes",
    "test_member_accuracy": "mean accuracy of one member",
    "test_averaged_accuracy": "accuracy of one network with the mean of the members' weights",
    "test_nll": "negative log-likelihood of the mean of the members' probabilities (nats)",
    "test_member_nll": "mean negative log-likelihood of one member (nats)",
    "test_averaged_nll": "negative log-likelihood of one network with the mean of the members' weights (nats)",
    "nll_gain": "what the mean of probabilities saves of a member's negative log-likelihood (nats)",
    "averaged_gain": "accuracy of the averaged weights less that of a member",
    "averaged_nll_gain": "what averaged weights save of a member's negative log-likelihood (nats)",
    "jensen_slack": "the least gain of an example under the mean of probabilities; never below 0, by Jensen",
    "vote_slack": "the same under votes, where nothing keeps it above 0",
    "correlation": "correlation ρ of the members' errors in their probabilities",
    "variance": "mean variance σ² of one member's error",
    "variance_of_mean": "variance of the mean of the members; ρσ² + (1 − ρ)σ²/M",
    "disagreement": "share of pairs of members that answer an image differently",
}

EXPERIMENTS = (
    Experiment(
        "5 initialisations: NLL below one member's mean",
        preset="mnist",
        metric="nll_gain",
        bar=0.022,
        controls=(
            Control(
                "five equal members, on the same batches",
                swap={
                    "assemble": "etude.basics.parts.classifier_nulls.equal_members",
                    "batches": "etude.basics.parts.classifier_nulls.equal_batches",
                },
            ),
        ),
    ),
    Experiment(
        "Jensen, for every test image",
        preset="mnist",
        metric="jensen_slack",
        bar=-1e-12,
        notes="the smallest over 10,000 test images of mean member NLL minus NLL of the mean, in float64",
        controls=(Control("the vote in place of the mean probability", metric="vote_slack"),),
    ),
    Experiment(
        "5 bootstrap samples: NLL below one member's mean",
        preset="bagging",
        metric="nll_gain",
        bar=0.053,
        controls=(Control("the same members without bootstrap", flags={"ensemble": "seeds"}),),
    ),
    Experiment(
        "5 heads on one trunk: NLL below one head's mean",
        preset="trunk",
        metric="nll_gain",
        bar=0.03,
        controls=(
            Control("heads that begin alike", swap={"assemble": "etude.basics.parts.classifier_nulls.equal_members"}),
        ),
    ),
    Experiment(
        "5 heads on one trunk answer better than one network",
        preset="all_trunk",
        metric="test_nll",
        better="lower",
        bar=0.0893,
        notes="two epochs of 54,000 images, so that seeds differ little: one network 0.0901 to 0.0907",
        controls=(Control("one network", flags={"members": 1}),),
    ),
    Experiment(
        "5 networks answer better than 5 heads on one trunk",
        preset="all_deep",
        metric="test_nll",
        better="lower",
        bar=0.079,
        controls=(Control("5 heads on one trunk", preset="all_trunk"),),
    ),
    Experiment(
        "averaged weights of the last 10 epochs against the mean snapshot",
        preset="snapshots",
        metric="averaged_nll_gain",
        bar=0.0016,
        notes="NLL; both the average and the snapshots are one network each",
        controls=(Control("the weights of 10 networks that began differently", flags={"ensemble": "seeds"}),),
    ),
    Experiment(
        "the same with batch normalisation",
        preset="snapshots",
        flags={"settings": ("widths=[256]", "steps=320", "evaluate_every=0", "normalizer=batch")},
        metric="averaged_nll_gain",
        bar=0.0013,
        controls=(
            Control(
                "statistics of the last snapshot, as in the notes (E23)",
                swap={"reestimate": "etude.basics.parts.classifier_nulls.old_statistics"},
            ),
        ),
    ),
    Experiment(
        "5 cycles: NLL below the mean snapshot",
        preset="cyclic",
        metric="nll_gain",
        bar=0.018,
        published="3.4 % error on CIFAR-10, of snapshots of a DenseNet (Huang 2017); accuracy, so not comparable",
        controls=(
            Control(
                "snapshots of a constant rate",
                flags={"settings": ("widths=[256,128]", "steps=320", "evaluate_every=0", "learning_rate=3e-3")},
            ),
        ),
    ),
)

SETTINGS = {
    "of": "vision/lenet",
    "of_preset": {"settings": ("steps=5",), "of_preset": "default"},
    "settings": ("steps=10",),
    "data": "mnist",
    "split": {"ensemble": "heads", "settings": ("widths=[16,8]",), "split": "layers.3"},
}


def setting(text: str, preset: Any, known: list[str]) -> tuple[str, Any]:
    """``name=value`` in two; the value is JSON, or the text itself where the preset has text. Raises UserError."""
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if not equals:
        raise UserError(f"--settings has '{text}'; write name=value, such as steps=200 or widths=[256,128]")
    if name not in known:
        raise UserError(f"--settings {text}: there is no '{name}'{nearest(name, known)} (there are {', '.join(known)})")
    if isinstance(getattr(preset, name), str):
        return name, value
    try:
        return name, json.loads(value)
    except ValueError:
        return name, None if value in ("None", "none") else value


def classifier(config: Config) -> tuple[ModuleType, Any]:
    """The file of the method `config.of`, and its Config as it is to be used. Raises UserError in one sentence."""
    entry = catalog.find(config.of)
    module = catalog.load_method(entry)
    known = [field.name for field in dataclasses.fields(module.Config)]
    if not hasattr(module, "build") or {"data", "steps", "batch", "optimizer", "learning_rate"} - set(known):
        raise UserError(f"--of {config.of} learns no classifier of images; take one such as basics/mlp or vision/lenet")
    if config.of_preset not in module.PRESETS:
        near = nearest(config.of_preset, module.PRESETS)
        raise UserError(
            f"--of-preset: {entry.name} has no preset '{config.of_preset}'{near} (it has {', '.join(module.PRESETS)})"
        )
    preset, own = module.PRESETS[config.of_preset], ("ensemble", "members", "combine")
    values = dict(setting(text, preset, [name for name in known if name not in own]) for text in config.settings)
    values |= {name: value for name, value in (("data", config.data), ("examples", config.examples)) if value}
    chosen = replace(preset, values, entry.name)
    if getattr(chosen, "ensemble", "none") != "none":
        raise UserError(f"--of-preset {config.of_preset} is an ensemble itself; take a preset of one network")
    return module, chosen


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """The members for this data, drawn one behind the other, as one classifier."""
    module, of = classifier(config)

    def network() -> nn.Module:
        return module.build(of, spec)["model"]

    return {"model": assemble(network, config.ensemble, config.members, config.combine, config.split)}


@torch.no_grad()
def answers(networks: list[nn.Module], x: Tensor, device: torch.device, batch: int = 1000) -> Tensor:
    """Logits (M, N, C), float64 on the CPU, of M networks in evaluation mode for the images x (N, C, H, W)."""
    for network in networks:
        network.eval()
    rows = [torch.stack([network(part.to(device)).double().cpu() for network in networks]) for part in x.split(batch)]
    return torch.cat(rows, 1)


def worth(logits: Tensor, targets: Tensor) -> dict[str, list[float]]:
    """Scores of 1, 2, … M members together and of each alone: (M, N, C) logits, (N,) targets → lists of length M."""
    first = [mean_log_probability(logits[:m]) for m in range(1, len(logits) + 1)]
    votes = [vote_log_share(logits[:m]) for m in range(1, len(logits) + 1)]
    return {
        "accuracy": [float(accuracy(p, targets)) for p in first],
        "nll": [float(nll(p, targets)) for p in first],
        "vote_accuracy": [float(accuracy(p, targets)) for p in votes],
        "vote_nll": [float(nll(p, targets)) for p in votes],
        "single_accuracy": [float(accuracy(one, targets)) for one in logits],
        "single_nll": [float(nll(one, targets)) for one in logits],
    }


def jensen_slack(logits: Tensor, targets: Tensor, combine: Callable[[Tensor], Tensor] = mean_log_probability) -> Tensor:
    """(1/M) Σ_j −log p_j(y | x) − (−log p(y | x)) of every example, (N,).

    Never negative, up to rounding, for the mean probability; of anything else that `combine` may make of the logits
    (M, N, C) → (N, C), such as a vote, no inequality says so.
    """
    single = torch.stack([nll(one, targets, "none") for one in logits])
    return single.mean(0) - nll(combine(logits), targets, "none")


def summary(logits: Tensor, averaged: Tensor, targets: Tensor) -> dict[str, float]:
    """The numbers reported of M members' logits (M, N, C), those of their averaged weights (N, C), and labels (N,)."""
    found, share = worth(logits, targets), spread(logits, targets)
    slack = jensen_slack(logits, targets)
    mean = {name: sum(found[f"single_{name}"]) / len(logits) for name in ("accuracy", "nll")}
    right, lost = float(accuracy(averaged, targets)), float(nll(averaged, targets))
    return {
        "test_probability_accuracy": found["accuracy"][-1],
        "test_vote_accuracy": found["vote_accuracy"][-1],
        "test_member_accuracy": mean["accuracy"],
        "test_averaged_accuracy": right,
        "test_nll": found["nll"][-1],
        "test_member_nll": mean["nll"],
        "test_averaged_nll": lost,
        "nll_gain": mean["nll"] - found["nll"][-1],
        "averaged_gain": right - mean["accuracy"],
        "averaged_nll_gain": mean["nll"] - lost,
        "jensen_slack": float(slack.min()),
        "vote_slack": float(jensen_slack(logits, targets, vote_log_share).min()),
        "correlation": share.correlation,
        "variance": share.variance,
        "variance_of_mean": share.measured,
        "disagreement": disagreement(logits),
    }


@method("basics/ensembles", paper="arXiv:1612.01474", section="4.6", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    module, of = classifier(config)
    recipe = Recipe.of(of, ensemble=config.ensemble, members=config.members, combine=config.combine)
    if config.split is not None and config.ensemble != "heads":
        raise UserError(f"--split {config.split} says where heads begin; it needs --ensemble heads")
    data = subset(room.images(of.data, getattr(of, "size", None)), recipe.examples, run.seed)
    run.describe(data.spec, data)
    model = run.place(build(config, data.spec)["model"])  # line 1
    optimizer = recipe.make_optimizer(model, run)
    augment = module.augment(of) if hasattr(module, "augment") else None
    batch, together = batches(run, recipe, model, data, augment), clipped_together(model)
    run.track(model=model, optimizer=optimizer)
    model.train()
    for step in run.steps(recipe.steps):  # line 2
        set_lr(optimizer, recipe.rate(step))
        x, y = batch(step)
        with run.autocast():
            total, loss = losses(model, x, y)  # the sum over the members, and their mean
        optimizer.zero_grad()
        total.backward()
        run.average(model, loss=loss)
        clip(together, recipe.clip_norm, recipe.clip_value)
        optimizer.step()
        if step in recipe.moments:
            take_snapshot(run, model, data)
        run.log(loss=loss)
        if run.every(recipe.evaluate_every):
            run.log(**evaluate(run, model, data, "validation"))

    networks = member_networks(model)  # line 3, on the test split
    if config.ensemble == "snapshots":
        networks = networks[::-1]  # the latest first
    average = average_parameters(networks)
    reestimate(average, lambda: training_images(run, data))
    *logits, averaged = answers([*networks, average], data.test.x, run.device)
    found, y = torch.stack(logits), data.test.y
    what = f"{len(networks)} {config.ensemble} of {config.of} on {len(data.train):,} images of {data.name}"
    # members whose weights can be averaged: one network's, or linear heads (whose average has the mean logits)
    averages = config.ensemble == "snapshots" or (config.ensemble == "heads" and config.split is None)
    result = summary(found, averaged, y)
    pictures(run, result, worth(found, y), spread(found, y), averages, what)
    return result | evaluate(run, model, data, "test")
