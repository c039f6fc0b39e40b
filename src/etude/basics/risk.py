"""Risk: what a fit costs on new data, and why the risk on its own data is too low

Paper: Vapnik, Principles of Risk Minimization for Learning Theory, NIPS 4, 1992.

Equation: R(θ) = E_{x ~ p(x), y ~ p(y|x)} [L(x, y, θ)]        the risk
    R̂(θ) = (1/n) Σ_i L(x_i, y_i, θ)                           the empirical risk of n samples
    θ̂ = argmin_θ R̂(θ)                                         empirical risk minimisation
With y = w·x + ε, x ~ N(0, Σ) in d dimensions, ε ~ N(0, σ²) and L = (y − θ·x)², all of it has a closed form:
    R(θ) = σ² + (w − θ)ᵀ Σ (w − θ) ≥ R(w) = σ²
    E[R̂(θ)] = R(θ) for a θ that does not depend on the samples, but for the minimiser θ̂
    E[R̂(θ̂)] = σ² (1 − d/n)  <  σ²  <  E[R(θ̂)] = σ² (1 + d/(n − d − 1))

Algorithm:
1. for each n, draw many datasets of n samples from p(x, y)
2. θ̂ ← least squares on each of them (all in one call)
3. R̂(θ̂) on the samples that chose θ̂; R(θ̂) by the closed form; their difference is the generalisation gap
4. for one fixed θ̂, average L over fresh samples: the Monte-Carlo estimate of R(θ̂), which a test set gives

Differences:
- E01 (notes 2.1, Definition 2): "samples from the true 2 distribution" has a stray footnote mark. The samples come
  from the true distribution p(x, y), independently; then R̂(θ) is unbiased for every *fixed* θ, but not for θ̂.
- The notes define both risks for any loss. Here L is the squared error, for which nothing has to be estimated.
- Train risk below true risk holds on average. For a single fit only R̂(θ̂) ≤ R̂(w) and R(θ̂) ≥ R(w) hold always.

Expect: CPU 4 s → both curves within 2 % of their closed forms at every n, Monte-Carlo risk within 0.2 %; the loss of the
    same fit on the samples that chose it is 84 to 95 % too low.
Command: `etude run basics/risk --features 20 --sizes 24 30 40 80 160`
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import INK, PALETTE, SOFT
from etude.catalog import Control, Experiment, Idle, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Fraction, Positive, Range
from etude.core.errors import UserError
from etude.core.randomness import generator
from etude.core.run import Run
from etude.core.spec import Spec


@dataclass(frozen=True)
class Config:
    features: Annotated[int, Range(1, 1000)] = 10
    """Dimension d of the inputs."""
    noise: Positive = 0.5
    """Standard deviation σ of the noise in y."""
    correlation: Fraction = 0.6
    """Correlation ρ of neighbouring inputs: Σ_ij = ρ^|i−j|."""
    sizes: tuple[Count, ...] = (14, 16, 20, 25, 32, 40, 56, 80, 120, 200, 400)
    """Samples n in a dataset, one point of the curves each; at least d + 2, where E[R(θ̂)] becomes finite."""
    rounds: Annotated[int, Range(1, 100_000)] = 40
    """Rounds; each draws `datasets` datasets of every size and `fresh` fresh samples."""
    datasets: Count = 100
    """Datasets of each size in a round."""
    fresh: Count = 50_000
    """Fresh samples in a round for the Monte-Carlo risk of one fit."""


PRESETS = {
    "tiny": Config(rounds=8, datasets=50, fresh=20_000, sizes=(14, 25, 80)),  # 1 s
    "default": Config(),  # 4 s → within 2 % of the closed forms
}

SETTINGS = {
    "correlation": Idle("risks of least squares are the same for x and Ax; a test looks at the samples themselves"),
}

METRICS = {
    "monte_carlo_error": "relative error of the risk that fresh samples estimate",
    "own_samples_error": "relative error if the samples it was fitted to are used: too low",
    "train_risk_error": "largest relative deviation of the mean empirical risk from its closed form",
    "true_risk_error": "largest relative deviation of the mean true risk from its closed form",
    "overfitted": "share of the datasets of least size whose empirical risk is below the true one",
    "gap": "generalisation gap there: mean true risk less mean empirical risk",
}

EXPERIMENTS = (
    Experiment(
        "monte_carlo", preset="default", metric="monte_carlo_error", bar=0.0023, better="lower",
        controls=(Control("the samples that chose the fit, instead of fresh ones", metric="own_samples_error"),),
    ),
    Experiment(
        "train_risk", preset="default", metric="train_risk_error", bar=0.021, better="lower",
        controls=(
            Control(
                "one degree of freedom more is taken: σ² (1 − (d + 1)/n)",
                swap={"expected_train_risk": "etude.basics.parts.statistics_nulls.one_parameter_more"},
            ),
        ),
    ),
    Experiment(
        "true_risk", preset="default", metric="true_risk_error", bar=0.023, better="lower",
        controls=(
            Control(
                "the form for inputs that do not change: σ² (1 + d/n)",
                swap={"expected_true_risk": "etude.basics.parts.statistics_nulls.fixed_inputs"},
            ),
        ),
    ),
    Experiment(
        "overfitted", preset="default", metric="overfitted", bar=0.999,
        notes="Share of the fits to the fewest samples whose train risk lies below their true risk.",
        controls=(Control("400 samples for ten parameters", flags={"sizes": (400,)}),),
    ),
)  # fmt: skip


class Problem(NamedTuple):
    """y = w·x + ε with x ~ N(0, Σ) and ε ~ N(0, σ²): weight (d,) and covariance (d, d) float64, noise σ ≥ 0."""

    weight: Tensor
    covariance: Tensor
    noise: float

    def draw(self, shape: tuple[int, ...], stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """Independent samples of p(x, y): x (*shape, d), y (*shape,), float64."""
        white = torch.randn(*shape, len(self.weight), dtype=torch.float64, generator=stream)
        x = white @ torch.linalg.cholesky(self.covariance).T
        return x, x @ self.weight + self.noise * torch.randn(*shape, dtype=torch.float64, generator=stream)


def problem(features: int, noise: float, correlation: float, stream: torch.Generator) -> Problem:
    """A problem with Σ_ij = ρ^|i−j| and a weight drawn from N(0, I)."""
    place = torch.arange(features, dtype=torch.float64)
    covariance = correlation ** (place[:, None] - place).abs()
    return Problem(torch.randn(features, dtype=torch.float64, generator=stream), covariance, noise)


def empirical_risk(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """R̂(θ) = (1/n) Σ (y_i − θ·x_i)²: theta (..., d), x (..., n, d), y (..., n) → (...)."""
    return (y - (x @ theta.unsqueeze(-1)).squeeze(-1)).square().mean(-1)


def true_risk(problem: Problem, theta: Tensor) -> Tensor:
    """R(θ) = σ² + (w − θ)ᵀ Σ (w − θ): theta (..., d) → (...)."""
    error = problem.weight - theta
    return problem.noise**2 + ((error @ problem.covariance) * error).sum(-1)


def minimise(x: Tensor, y: Tensor) -> Tensor:
    """θ̂ = argmin R̂ of every dataset at once: x (..., n, d) of full column rank, y (..., n) → (..., d)."""
    return torch.linalg.lstsq(x, y.unsqueeze(-1), driver="gels").solution.squeeze(-1)


def expected_train_risk(problem: Problem, n: int) -> float:
    """E[R̂(θ̂)] = σ² (1 − d/n) for n ≥ d: the residual has n − d of n degrees of freedom."""
    return problem.noise**2 * (1 - len(problem.weight) / n)


def expected_true_risk(problem: Problem, n: int) -> float:
    """E[R(θ̂)] = σ² (1 + d/(n − d − 1)): E tr (Σ (XᵀX)⁻¹) is an inverse Wishart mean, finite from n = d + 2 on."""
    d = len(problem.weight)
    return problem.noise**2 * (1 + d / (n - d - 1))


@method("basics/risk", paper="Vapnik 1992", section="2.1", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    if not config.sizes:
        raise UserError("--sizes names none; give at least one number of samples")
    if min(config.sizes) < config.features + 2:
        raise UserError(
            f"--sizes has {min(config.sizes)}; with {config.features} features a dataset needs at least "
            f"{config.features + 2} samples, or the expected risk of the fit is infinite"
        )
    true = problem(config.features, config.noise, config.correlation, generator(run.seed, 0, 0, "problem"))
    own = true.draw((min(config.sizes),), generator(run.seed, 0, 0, "fixed fit"))
    fixed = minimise(*own)
    exact = float(true_risk(true, fixed))
    expected = torch.tensor(
        [(expected_train_risk(true, n), expected_true_risk(true, n)) for n in config.sizes], dtype=torch.float64
    )
    run.describe(Spec(extra={"weight": true.weight.tolist(), "noise": true.noise}))
    shape = (len(config.sizes), config.rounds, config.datasets)
    found = Box(
        train=torch.zeros(shape, dtype=torch.float64),
        true=torch.zeros(shape, dtype=torch.float64),
        fresh=torch.zeros(config.rounds, dtype=torch.float64),
    )
    run.track(found=found)
    for step in run.steps(config.rounds):
        stream = generator(run.seed, step, 0, "datasets")
        for place, n in enumerate(config.sizes):
            x, y = true.draw((config.datasets, n), stream)  # line 1
            theta = minimise(x, y)  # line 2
            found.train[place, step] = empirical_risk(theta, x, y)  # line 3
            found.true[place, step] = true_risk(true, theta)
        found.fresh[step] = empirical_risk(fixed, *true.draw((config.fresh,), stream))  # line 4
        so_far = slice(step + 1)
        means = torch.stack((found.train[:, so_far].mean((1, 2)), found.true[:, so_far].mean((1, 2))), 1)
        error = (means / expected - 1).abs().amax(0)
        average = float(found.fresh[so_far].mean())
        run.log(monte_carlo_error=abs(average / exact - 1), train_risk_error=error[0], true_risk_error=error[1])
    means = torch.stack((found.train.mean((1, 2)), found.true.mean((1, 2))), 1)
    error = (means / expected - 1).abs().amax(0)
    fewest = config.sizes.index(min(config.sizes))
    run.artifact(
        "learning_curve",
        curve_figure(true, config.sizes, found.train.flatten(1), found.true.flatten(1)),
        "Risk against the number of samples: dots are means over datasets, bands hold 80 % of them, lines are the "
        "closed forms. The distance between the curves is the generalisation gap.",
    )
    run.artifact(
        "minimisation",
        parabolas_figure(generator(run.seed, 0, 0, "one feature"), config.noise),
        "One parameter: each dataset has its own empirical risk. On average its minimum lies below the true risk there.",
    )
    run.artifact(
        "monte_carlo",
        fresh_figure(found.fresh, exact, config.fresh),
        "The average loss of one fit on fresh samples; the band is ±2 standard errors round its true risk.",
    )
    return {
        "monte_carlo_error": abs(float(found.fresh.mean()) / exact - 1),
        "own_samples_error": abs(float(empirical_risk(fixed, *own)) / exact - 1),
        "train_risk_error": float(error[0]),
        "true_risk_error": float(error[1]),
        "overfitted": float((found.train[fewest] < found.true[fewest]).double().mean()),
        "gap": float(means[fewest, 1] - means[fewest, 0]),
    }


def curve_figure(true: Problem, sizes: tuple[int, ...], train: Tensor, risk: Tensor) -> Any:
    """Mean and 10 %-90 % band of `train` and `risk` (sizes, datasets) against n, with the closed forms."""
    figure, (axes,) = panels()
    low, high = min(sizes), max(sizes)
    line = torch.logspace(0, 1, 200, base=high / low).mul(low) if high > low else torch.tensor([float(low)])
    for values, form, colour, name, law in (
        (risk, expected_true_risk, PALETTE[1], "true risk $R(\\hat\\theta)$", r"$\sigma^2(1+d/(n-d-1))$"),
        (train, expected_train_risk, PALETTE[0], r"train risk $\hat R(\hat\theta)$", r"$\sigma^2(1-d/n)$"),
    ):
        order = torch.tensor(sizes).argsort()
        n, values = torch.tensor(sizes)[order], values[order]
        band = torch.quantile(values, torch.tensor([0.1, 0.9], dtype=values.dtype), dim=1)
        axes.fill_between(n, *band, color=colour, alpha=0.15, linewidth=0)
        axes.plot(line, [form(true, float(m)) for m in line], color=colour, linewidth=1.4, label=law)  # type: ignore
        axes.plot(n, values.mean(1), "o", color=colour, markersize=4, label=name)
    axes.axhline(true.noise**2, color=INK, linewidth=0.9, linestyle=":")
    place = {"textcoords": "offset points", "fontsize": 8, "color": SOFT}
    axes.annotate(r"$\sigma^2$, the least risk", (low, true.noise**2), (4, 3), **place)
    axes.set_xscale("log")
    marks = [n for n in (10, 14, 20, 40, 80, 100, 200, 400, 1000, 10_000) if low <= n <= high] or [low]
    axes.set_xticks(marks, [str(n) for n in marks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.15 * max(expected_true_risk(true, low), 2 * true.noise**2))
    title = f"Least squares with d = {len(true.weight)} features: train risk and true risk"
    label(axes, title, "samples in the dataset n", "squared error")
    legend(axes)
    return figure


def parabolas_figure(stream: torch.Generator, noise: float, datasets: int = 8, n: int = 8) -> Any:
    """R̂(θ) of several datasets and R(θ), over the single parameter of a one-dimensional problem with w = 1."""
    one = Problem(torch.ones(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64), noise)
    x, y = one.draw((datasets, n), stream)
    best = minimise(x, y)
    theta = torch.linspace(1 - 3 * noise, 1 + 3 * noise, 121, dtype=torch.float64)
    figure, (axes,) = panels()
    for i in range(datasets):
        named = rf"empirical risks $\hat R$, n = {n}" if i == 0 else None
        curve = torch.stack([empirical_risk(t[None], x[i], y[i]) for t in theta])
        axes.plot(theta, curve, color=PALETTE[0], linewidth=0.8, alpha=0.6, label=named)
    axes.plot(best, empirical_risk(best, x, y), "o", color=PALETTE[0], markersize=4, label=r"their minima $\hat\theta$")
    axes.plot(theta, true_risk(one, theta[:, None]), color=PALETTE[1], linewidth=2.2, label="true risk $R$")
    axes.plot(1, noise**2, "o", color=PALETTE[1], markersize=6)
    axes.set_ylim(0, 5 * noise**2)
    title = "Empirical risk minimisation: each dataset has a minimum of its own"
    label(axes, title, r"parameter $\theta$ (the truth is w = 1)", "mean squared error")
    legend(axes, "upper right")
    return figure


def fresh_figure(means: Tensor, exact: float, count: int) -> Any:
    """Running Monte-Carlo estimate from `means` (rounds,), each over `count` fresh samples, against `exact`."""
    samples = count * torch.arange(1, len(means) + 1, dtype=means.dtype)
    error = 2 * sqrt(2) * exact / samples.sqrt()  # the loss is R(θ) times a χ² with one degree of freedom
    figure, (axes,) = panels(height=2.6)
    millions = samples / 1e6
    axes.fill_between(millions, exact - error, exact + error, color=PALETTE[1], alpha=0.15, linewidth=0)
    axes.axhline(
        exact, color=PALETTE[1], linewidth=1.4, label=r"closed form $\sigma^2+(w-\hat\theta)^T\Sigma(w-\hat\theta)$"
    )
    axes.plot(
        millions, means.cumsum(0) * count / samples, color=PALETTE[0], linewidth=1.4, label="average on fresh samples"
    )
    label(axes, "Monte-Carlo risk", "fresh samples (millions)", "risk of one fit")
    legend(axes)
    return figure
