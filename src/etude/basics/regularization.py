"""Regularisation: the L2 penalty, and its reading as a Gaussian prior (MAP)

Paper: Hoerl & Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems, 1970; Krogh & Hertz, A Simple
Weight Decay Can Improve Generalization, 1991; MacKay, Bayesian Interpolation, 1992 (the prior).

Equation: by Bayes' rule p(θ | D) ∝ p(D | θ) p(θ). With the prior θ ~ N(0, σ²I) its negative logarithm is, up to constants,
    J(θ) = −Σ_i log p(y_i | x_i, θ) + λ ‖θ‖²,   λ = 1/(2σ²);   ∇J = −Σ_i ∇ log p(y_i | x_i, θ) + 2λθ
    Gaussian likelihood, unit noise:   −log p(y | x, θ) = ½ (y − θ·x)² + const       (diabetes)
    Bernoulli likelihood, y = ±1:      −log p(y | x, θ) = log(1 + exp(−y θ·x))       (breast cancer)

Algorithm:
1. a fifth of the examples is for testing; split the others at random, several times, into training and validation
2. standardise the features on the training examples; the target of a regression too, so no intercept is needed
3. for λ from large to small: θ(λ) ← argmin J by Newton's method, from the last θ (θ ← θ − (∇²J)⁻¹ ∇J, halved while J rises)
4. the error of each θ(λ) on the training and on the validation examples
5. choose the λ with the least mean validation error; score it on the test examples, once
6. the same at one λ on all the data; and by gradient descent, once with λ‖θ‖² in the loss, once with weight decay 2λ

Differences:
- E04 (notes 2.3.1): the notes end with "… − λ‖θ‖²". The sign is +: −log p(θ) = +λ‖θ‖² + const. With −, a classifier's J
  falls for ever.
- E05 (notes 2.3.1): "if Σ_θ(x) = I" is about the *likelihood*: it makes −log p(y | x, θ) half the squared error. The
  prior gives λ = 1/(2σ²), which multiplies the penalty beside the *sum* over examples; beside their mean it is λ/N.
  PyTorch's `weight_decay` is 2λ for SGD (and for Adam, where AdamW's decay is something else).
- E06 (notes 2.3.1): θ̂ is the mode of the posterior, a point estimate (MAP). Bayesian inference would average
  over p(θ | D); where that is skewed, its mean is another θ (the cross in the picture).
- scikit-learn leaves the ½ out of ridge regression: Ridge(alpha) is α = 2λ = 1/σ². LogisticRegression(C) is C = 1/(2λ) = σ².

Expect: CPU 4 s → diabetes, 30 training examples: λ = 10 is chosen, its test error (0.52 to 0.86 of the variance, by the
    test examples drawn) is 30 to 31 % below that of λ = 0.001 and of λ = 10⁴; breast cancer, 100 training examples: 58 to
    62 % below; λ = ½ and all 569 examples: J = 37.877766 after 9 Newton steps.
Command: `etude run basics/regularization --preset breast_cancer`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import INK, PALETTE, PAPER, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, Range
from etude.core.errors import RunError, UserError
from etude.core.randomness import generator
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim.newton import newton_step
from etude.optim.sgd import SGD


@dataclass(frozen=True)
class Config:
    data: Literal["diabetes", "breast_cancer"] = "diabetes"
    """diabetes (442 patients, regression) or breast_cancer (569 tumours, two classes); both come with scikit-learn."""
    examples: Count = 30
    """Training examples of a split; of the others a fixed fifth of all is for testing and the rest validates."""
    splits: Annotated[int, Range(1, 1000)] = 10
    """Random splits into training and validation examples; errors are averaged over them."""
    smallest: Annotated[float, Range(1e-6, 1e6)] = 1e-3
    """The smallest λ of the path."""
    largest: Annotated[float, Range(1e-6, 1e6)] = 1e4
    """The largest λ of the path."""
    values: Annotated[int, Range(2, 1000)] = 29
    """Values of λ, evenly spaced on a logarithmic axis."""
    l2: Annotated[float, Range(1e-6, 1e6)] = 0.5
    """λ of the fit to all the data and of the pictured prior, whose variance is 1/(2λ)."""
    sgd_steps: Annotated[int, Range(1, 100_000)] = 300
    """Steps of gradient descent in the comparison with weight decay; `sgd_distance` says how far it still is from θ."""


PRESETS = {
    "tiny": Config(values=8, splits=2, sgd_steps=30),  # 1 s
    "default": Config(),  # 4 s → test error 30 % below that of the least and the largest λ, at λ = 10
    "breast_cancer": Config(data="breast_cancer", examples=100, splits=4),  # 5 s → J = 37.877766 at λ = ½
}

SETTINGS = {"splits": 3}

UNPENALISED = Control("no penalty", swap={"posterior": "etude.basics.parts.statistics_nulls.unpenalised"})
PRINTED = Control(
    "− λ‖θ‖², as the notes print it", swap={"posterior": "etude.basics.parts.statistics_nulls.printed_sign"}
)
TRAINING = Control(
    "λ is chosen by the training error", swap={"choose": "etude.basics.parts.statistics_nulls.by_training_error"}
)
SAME = Control("weight decay λ, not 2λ", swap={"weight_decay": "etude.basics.parts.statistics_nulls.same_number"})
TOLD = "All the data and nothing drawn: one seed says all."
METRICS = {
    "test_error": "mean squared error on the test examples of the λ that validation chose",
    "test_gain": "share of the test error that this λ takes from the better end of the path",
    "validation_error": "mean squared error on the validation examples of the chosen λ",
    "best_l2": "the λ of least validation error",
    "norm_ratio": "largest ‖θ‖ at a λ over that at the next smaller one; below 1: a larger λ always pulls harder",
    "objective": "the regularised loss at its minimum",
    "newton_steps": "Newton steps taken to that minimum",
    "decay_gap": "largest difference of θ between gradient descent on the penalty and with weight decay; 0",
    "sgd_distance": "distance of gradient descent's last θ from the minimum",
}

EXPERIMENTS = (
    Experiment(
        "norm", preset="default", metric="norm_ratio", bar=0.99999, better="lower", controls=(UNPENALISED,),
        notes="Largest ratio of a ‖θ(λ)‖ to that of the next smaller λ: below 1 the norm falls all along the path.",
    ),
    Experiment("gain", preset="default", metric="test_gain", bar=0.25, controls=(UNPENALISED, TRAINING)),
    Experiment("weight_decay", preset="default", metric="decay_gap", bar=1e-12, better="lower", controls=(SAME,)),
    Experiment(
        "cancer", preset="breast_cancer", metric="objective", bar=37.877766, better="near", tolerance=1e-6, seeds=(0,),
        published="37.877766", notes=TOLD, controls=(PRINTED,),
    ),
    Experiment(
        "cancer_newton", preset="breast_cancer", metric="newton_steps", bar=10, better="lower", seeds=(0,), notes=TOLD,
        controls=(
            Control("gradient descent", swap={"newton_step": "etude.basics.parts.statistics_nulls.gradient_step"}),
        ),
    ),
    Experiment("cancer_gain", preset="breast_cancer", metric="test_gain", bar=0.5, controls=(TRAINING,)),
)  # fmt: skip

Likelihood = Callable[[Tensor, Tensor, Tensor], Tensor]


def gaussian(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """−Σ log p(y | x, θ) without its constant, for y ~ N(θ·x, 1): theta (d,), x (n, d), y (n,) → ()."""
    return (y - x @ theta).square().sum() / 2


def bernoulli(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """−Σ log p(y | x, θ) for p(y | x, θ) = 1 / (1 + exp(−y θ·x)) with y = ±1: theta (d,), x (n, d), y (n,) → ()."""
    return F.softplus(-y * (x @ theta)).sum()


def posterior(likelihood: Likelihood, x: Tensor, y: Tensor, l2: float) -> Callable[[Tensor], Tensor]:
    """J(θ) = −Σ log p(y | x, θ) + λ ‖θ‖², whose minimum is the MAP estimate."""
    return lambda theta: likelihood(theta, x, y) + l2 * theta.square().sum()


def prior_scale(l2: float) -> float:
    """The σ of the prior N(0, σ²I) that belongs to λ = 1/(2σ²)."""
    return 1 / sqrt(2 * l2)


def weight_decay(l2: float) -> float:
    """The `weight_decay` of PyTorch's SGD, a factor of θ in the gradient, that equals the penalty λ ‖θ‖²."""
    return 2 * l2


def minimise(
    loss: Callable[[Tensor], Tensor], theta: Tensor, tolerance: float = 1e-9, most: int = 100
) -> tuple[Tensor, int]:
    """Newton's method from `theta` (d,) until ‖∇J‖ ≤ tolerance; the step is halved while the loss rises. Returns θ and
    the number of steps. Raises RunError after `most` steps and where the Hessian is singular."""
    for taken in range(most):
        if torch.func.grad(loss)(theta).norm() <= tolerance:
            return theta, taken
        rate, before = 1.0, loss(theta)
        try:
            new = newton_step(loss, theta, rate)
            while not loss(new) <= before + 1e-12 * before.abs() and rate > 1e-6:
                rate /= 2
                new = newton_step(loss, theta, rate)
        except RuntimeError as error:
            raise RunError(f"Newton's method stops after {taken} steps: {error}") from error
        theta = new
    raise RunError(f"Newton's method has not converged after {most} steps")


def descend(
    loss: Callable[[Tensor], Tensor], theta: Tensor, rate: float, steps: int, l2: float = 0.0, decay: float = 0.0
) -> Tensor:
    """Every θ of gradient descent on loss + `l2` ‖θ‖² with SGD's weight decay `decay`: (steps, d)."""
    parameter = theta.clone().requires_grad_()
    optimizer, path = SGD([parameter], rate, weight_decay=decay), []
    for _ in range(steps):
        optimizer.zero_grad()
        (loss(parameter) + l2 * parameter.square().sum()).backward()
        optimizer.step()
        path.append(parameter.detach().clone())
    return torch.stack(path)


class Data(NamedTuple):
    """x (n, d), y (n,) float64, the names of the features, and −Σ log p(y | x, θ)."""

    x: Tensor
    y: Tensor
    names: tuple[str, ...]
    likelihood: Likelihood


def load(name: str) -> Data:
    """One of scikit-learn's datasets as it is bundled; classes are −1 (malignant) and 1."""
    from sklearn import datasets

    bunch = datasets.load_diabetes() if name == "diabetes" else datasets.load_breast_cancer()
    y = bunch.target.astype("float64") if name == "diabetes" else 2.0 * bunch.target - 1
    names = tuple(map(str, bunch.feature_names))
    return Data(torch.from_numpy(bunch.data), torch.from_numpy(y), names, gaussian if name == "diabetes" else bernoulli)


def standardised(data: Data, train: Tensor) -> Data:
    """Features to mean 0 and deviation 1 on the examples `train` (a regression's target too). What is constant there,
    as a rare value can be in a small split, becomes 0 everywhere."""

    def scale(values: Tensor) -> Tensor:
        mean, deviation = values[train].mean(0), values[train].std(0, correction=0)
        constant = deviation <= 1e-12 * values.abs().amax(0)
        return (values - mean) / deviation.masked_fill(constant, torch.inf)

    return data._replace(x=scale(data.x), y=scale(data.y) if data.likelihood is gaussian else data.y)


def mean_error(likelihood: Likelihood, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The squared error, or the nats, per example."""
    return likelihood(theta, x, y) * (2 if likelihood is gaussian else 1) / len(y)


def choose(errors: Tensor) -> int:
    """The place on the path with the least mean validation error: errors (values, splits, 2), training and validation."""
    return int(errors[..., 1].mean(1).argmin())


@method("basics/regularization", paper="Hoerl & Kennard 1970; MacKay 1992", section="2.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    raw = load(config.data)
    n, d = raw.x.shape
    order = torch.randperm(n, generator=generator(run.seed, 0, 0, "test"))
    test, others = order[: n // 5], order[n // 5 :]  # line 1
    if not 2 <= config.examples < len(others):
        raise UserError(
            f"--examples is {config.examples}; {config.data} has {n}, a fifth of them for testing and one at least for "
            f"validation, so give between 2 and {len(others) - 1}"
        )
    if config.smallest >= config.largest:
        raise UserError(f"--smallest is {config.smallest:g}; it must be below --largest, {config.largest:g}")
    splits = []
    for i in range(config.splits):
        mixed = others[torch.randperm(len(others), generator=generator(run.seed, i, 0, "split"))]
        splits.append((mixed[: config.examples], mixed[config.examples :]))
    scaled = [standardised(raw, inside) for inside, _ in splits]  # line 2
    path = torch.logspace(
        torch.tensor(config.largest).log10(), torch.tensor(config.smallest).log10(), config.values, dtype=torch.float64
    )
    run.describe(Spec(extra={"features": list(raw.names)}))
    found = Box(
        theta=torch.zeros(config.values, config.splits, d, dtype=torch.float64),
        error=torch.zeros(config.values, config.splits, 2, dtype=torch.float64),
    )
    run.track(found=found)
    for step in run.steps(config.values):
        taken = 0
        for i, (data, parts) in enumerate(zip(scaled, splits)):
            inside = parts[0]
            loss = posterior(data.likelihood, data.x[inside], data.y[inside], float(path[step]))
            theta, count = minimise(loss, found.theta[max(step - 1, 0), i].clone())  # line 3
            taken += count
            found.theta[step, i] = theta
            for place, part in enumerate(parts):  # line 4
                found.error[step, i, place] = mean_error(data.likelihood, theta, data.x[part], data.y[part])
        train_error, validation_error = found.error[step].mean(0)
        run.log(
            l2=path[step],
            norm=found.theta[step].norm(dim=1).mean(),
            train_error=train_error,
            validation_error=validation_error,
            newton_steps=taken / config.splits,
        )
    best = choose(found.error)  # line 5

    first, chosen, last = (
        torch.stack(
            [mean_error(data.likelihood, theta, data.x[test], data.y[test]) for data, theta in zip(scaled, thetas)]
        )
        for thetas in (found.theta[0], found.theta[best], found.theta[-1])
    )
    test_error = float(chosen.mean())
    whole = standardised(raw, torch.arange(n))  # line 6
    bare = posterior(whole.likelihood, whole.x, whole.y, 0.0)
    full = posterior(whole.likelihood, whole.x, whole.y, config.l2)
    start = torch.zeros(d, dtype=torch.float64)
    theta, taken = minimise(full, start)
    steepest = torch.linalg.eigvalsh(whole.x.T @ whole.x)[-1] / (1 if whole.likelihood is gaussian else 4)
    rate = 1 / float(steepest + 2 * config.l2)
    with_penalty = descend(bare, start, rate, config.sgd_steps, l2=config.l2)
    with_decay = descend(bare, start, rate, config.sgd_steps, decay=weight_decay(config.l2))
    norms = found.theta.norm(dim=2)
    run.artifact(
        "path",
        path_figure(path, found.theta[:, 0], found.error, best, test_error, scaled[0]),
        "Above: one training set has a MAP estimate for every λ, and a larger λ pulls it to 0. Below: thin lines are "
        "splits, thick ones their mean. The training error only rises with λ; the validation error is least in between, "
        "and the λ that it chooses is scored once on the test examples (square).",
    )
    run.artifact(
        "posterior",
        posterior_figure(raw, splits[0][0], config.l2),
        "Two correlated features and eight examples leave a valley of equally likely θ; the prior picks from it. Shades: "
        "log densities within ½, 2 and 4½ of the highest.",
    )
    return {
        "test_error": test_error,
        "test_gain": 1 - test_error / min(float(first.mean()), float(last.mean())),
        "validation_error": float(found.error[best, :, 1].mean()),
        "best_l2": float(path[best]),
        "norm_ratio": float((norms[:-1] / norms[1:]).max()),
        "objective": float(full(theta)),
        "newton_steps": float(taken),
        "decay_gap": float((with_penalty - with_decay).abs().max()),
        "sgd_distance": float((with_decay[-1] - theta).norm()),
    }


def path_figure(penalties: Tensor, path: Tensor, error: Tensor, best: int, test: float, data: Data) -> Any:
    """Coefficients (values, d), and errors (values, splits, 2) on training and validation examples, by λ (values,).

    `best` is the chosen place on the path and `test` the test error there.
    """
    figure, (upper, lower) = panels(rows=2, height=5.4, sharex=True, height_ratios=(1.2, 1))
    named = path.abs().amax(0).argsort(descending=True)[: 10 if path.shape[1] <= 10 else 6].tolist()
    for i in range(path.shape[1]):
        place = named.index(i) if i in named else None
        colour = RULED if place is None else PALETTE[place % len(PALETTE)]
        style = "-" if place is None or place < len(PALETTE) else "--"
        feature = None if place is None else data.names[i]
        upper.plot(
            penalties, path[:, i], style, color=colour, linewidth=1.2, label=feature, zorder=1 if place is None else 2
        )
    upper.axhline(0, color=SOFT, linewidth=0.6)
    label(upper, "Coefficients against the penalty", y="coefficient (per standard deviation)")
    legend(upper, fontsize=6.5, ncols=2)
    mean = error.mean(1)
    for place, (colour, name) in enumerate(zip(PALETTE, ("training examples", "validation examples"))):
        lower.plot(penalties, error[..., place], color=colour, linewidth=0.6, alpha=0.35)
        lower.plot(penalties, mean[:, place], color=colour, linewidth=2, label=name)
    lower.plot(penalties[best], mean[best, 1], "o", color=PALETTE[1], markersize=5)
    lower.plot(penalties[best], test, "s", color=INK, markersize=5, label="test examples, at the chosen λ")
    lower.set_ylim(0, 1.4 * float(mean[0].max()))
    for axes in (upper, lower):
        axes.axvline(penalties[best], color=PALETTE[1], linewidth=0.8, linestyle=":")
    lower.set_xscale("log")
    regression = data.likelihood is gaussian
    label(
        lower,
        rf"Error against the penalty; validation is least at $\lambda$ = {float(penalties[best]):.2g}",
        r"penalty $\lambda$  (prior variance $1/2\lambda$)",
        "squared error / variance of y" if regression else "−log p(y | x, θ), nats per example",
    )
    legend(lower, "lower right")
    return figure


RULED = "#d3cdc0"


def posterior_figure(raw: Data, inside: Tensor, l2: float, count: int = 8, side: int = 161) -> Any:
    """Prior, likelihood and posterior of two coefficients, with their maxima and the posterior's mean."""
    few = inside[:count]
    correlation = torch.corrcoef(raw.x.T).fill_diagonal_(0).triu()
    i, j = divmod(int((correlation - 0.9).abs().argmin()), len(correlation))
    two = standardised(raw._replace(x=raw.x[:, [i, j]]), inside)
    x, y, scale = two.x[few], two.y[few], prior_scale(l2)
    line = torch.linspace(-3.2 * scale, 3.2 * scale, side, dtype=torch.float64)
    theta = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    prior = l2 * theta.square().sum(1)
    likelihood = torch.func.vmap(lambda t: two.likelihood(t, x, y))(theta)
    joint = prior + likelihood
    mode, _ = minimise(posterior(two.likelihood, x, y, l2), torch.zeros(2, dtype=torch.float64))
    mean = (-joint).softmax(0) @ theta
    figure, every = panels(3, width=6.4, height=2.7, sharex=True, sharey=True)
    titles = (r"prior $p(\theta)$", rf"likelihood $p(D \mid \theta)$, n = {count}", r"posterior $p(\theta \mid D)$")
    shades = ("#12304f", PALETTE[0], "#9dbad8")
    for axes, heights, title in zip(every, (prior, likelihood, joint), titles):
        above = (heights - heights.min()).view(side, side)
        axes.contourf(line, line, above, levels=[0, 0.5, 2, 4.5], colors=shades)
        axes.axhline(0, color=SOFT, linewidth=0.5)
        axes.axvline(0, color=SOFT, linewidth=0.5)
        axes.set_aspect("equal")
        second = rf"$\theta_2$: {raw.names[j]}" if axes is every[0] else ""
        label(axes, title, rf"$\theta_1$: {raw.names[i]}", second)
    top = theta[likelihood.argmin()]
    ring = {"markersize": 7, "markeredgecolor": PAPER, "linestyle": "none"}
    every[0].plot(0, 0, "o", color=INK, label="mode", **ring)
    if top.abs().max() < line[-1]:  # otherwise the likelihood has its maximum outside the picture, or none
        every[1].plot(*top, "s", color=PALETTE[1], label="maximum likelihood", **ring)
        every[2].plot(*top, "s", color=PALETTE[1], label="maximum likelihood", **ring)
    every[2].plot(*mode, "o", color=PALETTE[4], label="MAP", **ring)
    every[2].plot(*mean, "X", color=PALETTE[2], label="mean", **ring)
    legend(every[2], "upper left", fontsize=6.5)
    return figure
