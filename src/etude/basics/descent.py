"""Nine optimizers descend one narrow valley and leave one saddle, side by side

Paper: Cauchy 1847 (gradient descent); Polyak 1964 (momentum) and Lessard, Recht & Packard 2016, arXiv:1408.3595, table 1
(the best settings on a quadratic); Dauphin et al., Identifying and Attacking the Saddle Point Problem, 2014,
arXiv:1406.2572; Jin et al., How to Escape Saddle Points Efficiently, 2017, arXiv:1703.00887 (noise). The update rules and
their papers are in `etude.optim`.

Equation: valley ½ uᵀ diag(1, κ) u with u = Rᵀθ, R a turn by `angle`;  saddle x² − y² + y⁴/4: flat at 0, where a minimum
along x meets a maximum along y; its minima are (0, ±√2).
    gradient descent   α = 2 / (1 + κ)                      contracts by (κ − 1)/(κ + 1) a step: about κ ln(1/ε)/2 steps
    heavy ball         α = 4 / (1 + √κ)², μ = ((√κ − 1)/(√κ + 1))²           by √μ = (√κ − 1)/(√κ + 1): about √κ ln(1/ε)/2
    Nesterov           α = 4 / (3κ + 1), μ = (√(3κ+1) − 2)/(√(3κ+1) + 2)     by 1 − 2/√(3κ + 1)
    Newton             θ − H⁻¹∇L                             one step for any κ; at a saddle, a step *to* the saddle

Algorithm:
1. all optimizers stand at the start of each problem: the valley; the saddle from (1.2, 0.01), beside the ridge where
   y = 0; the ridge itself, from (1.2, 0)
2. g ← ∇L(θ) of every optimizer in every problem; the noisy one adds ξ ~ N(0, σ²I)
3. θ ← θ − α u(g), u the optimizer's own rule, with its own memory in each problem

Differences:
- E08: the notes solve for the critical point of the local quadratic without a condition. Plain Newton converges to the
  saddle, which every other optimizer leaves; damping (H + λI, λ > 2 here) makes its step a descent step, and costs it
  the single step in the valley.
- E09: on the ridge ∂L/∂y is 0 at every step, so s = 0 and the notes' g/√s is 0/0; with ε outside the root AdaGrad,
  RMSProp and Adam just stay on it.
- E11: the notes call Adam's early steps very small without the correction. With it the first step is α in every
  coordinate that has a gradient, however small; without it 3.16 α.
- RMSProp at a constant rate does not converge: it ends in a cycle of ±α/2 in each coordinate. What does not arrive has
  no `steps_…` in the result.
- The valley is turned by 30° because a diagonal scaling undoes an upright one: with `--angle 0` AdaGrad arrives after
  87 steps instead of 952. Newton, gradient descent and both kinds of momentum take the same path, turned.

Expect: one core, 7 s → steps to 1e-6: gradient descent 726, Adam 292, Nesterov 141, momentum 89, Newton 1.
Command: `etude run basics/descent`, or in an upright valley `etude run basics/descent --angle 0`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.blocks.pictures.panels import film, label, panels
from etude.blocks.pictures.plots import INK, PALETTE, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Count, NonNegative, Positive, Range, Whole
from etude.core.errors import RunError, UserError
from etude.core.run import Run
from etude.core.spec import Spec
from etude.optim import adagrad, adam, momentum, newton, rmsprop, sgd
from etude.optim.chain import Rule, Signal, State


@dataclass(frozen=True)
class Config:
    kappa: Annotated[float, Range(1)] = 100.0
    """Condition number of the valley: its curvature across, over 1 along."""
    angle: Annotated[float, Range(-360, 360)] = 30.0
    """Turn of the valley against the axes, in degrees."""
    steps: Count = 1000
    """Steps that every optimizer takes."""
    tolerance: Positive = 1e-6
    """Distance to the minimum of the valley at which an optimizer has arrived."""
    rmsprop_learning_rate: Positive = 0.03
    """RMSProp's α (the other rates of the valley follow from κ)."""
    adagrad_learning_rate: Positive = 0.5
    """AdaGrad's α."""
    adam_learning_rate: Positive = 0.1
    """Adam's α."""
    saddle_learning_rate: Positive = 0.05
    """α of gradient descent, momentum and Nesterov at the saddle."""
    noise: NonNegative = 0.3
    """σ of the noise in the noisy optimizer's gradient."""
    damping: Positive = 3.0
    """λ of the damped Newton method."""
    frames: Whole = 150
    """Frames of the animation (0: none)."""


PRESETS = {
    "tiny": Config(kappa=20.0, steps=160, frames=12),  # 1 s
    "default": Config(),  # 7 s → momentum arrives 8 times sooner than gradient descent
    "upright": Config(angle=0.0),  # 7 s → AdaGrad arrives as early as momentum
}

QUICK = {"frames": 0}  # a control draws no animation
METRICS = {
    "steps_*": "steps after which this optimizer stays within --tolerance of the valley's minimum; missing if it never does",
    "momentum_speedup": "steps of gradient descent over steps of momentum, in the valley",
    "escaped": "optimizers (Newton and the noisy one not counted) that left the saddle from their start beside it",
    "saddle_distance_newton": "distance of undamped Newton from the saddle at the end: it is drawn to it",
    "ridge_escaped_noisy": "1 if gradient descent with noise left the saddle from its ridge",
    "ridge_escaped_others": "optimizers without noise that left the saddle from its ridge",
}

EXPERIMENTS = (
    Experiment(
        "momentum", preset="default", metric="momentum_speedup", bar=8.157, better="near", tolerance=0.5, seeds=(0,),
        published="√κ = 10 as κ → ∞", notes="no noise reaches it, so one seed",
        controls=(Control("momentum switched off", QUICK, swap={"settings": "etude.basics.parts.training_nulls.no_momentum"}),),
    ),
    Experiment(
        "newton", preset="default", metric="steps_newton", bar=1.0, better="lower", seeds=(0,),
        controls=(Control("damped", metric="steps_damped"),),
    ),
    Experiment(
        "newton_at_the_saddle", preset="default", metric="saddle_distance_newton", bar=1e-8, better="lower", seeds=(0,),
        controls=(Control("|H| in place of H", QUICK, swap={"curvatures": "etude.basics.parts.training_nulls.without_signs"}),),
    ),
    Experiment(
        "escapes", preset="default", metric="escaped", bar=8.0, notes="of the 8 others",
        controls=(Control("hardly any damping", {"damping": 1e-6, "frames": 0}),),
    ),
    Experiment(
        "noise_leaves_the_ridge", preset="default", metric="ridge_escaped_noisy", bar=1.0,
        controls=(Control("no noise", {"noise": 0.0, "frames": 0}),),
    ),
    Experiment(
        "noiseless_stay", preset="default", metric="ridge_escaped_others", bar=0.0, better="lower", seeds=(0,),
        controls=(Control("beside the ridge", QUICK, swap={"starts": "etude.basics.parts.training_nulls.beside_the_ridge"}),),
    ),
)  # fmt: skip

NAMES = ("sgd", "noisy", "momentum", "nesterov", "rmsprop", "adagrad", "adam", "newton", "damped")
LABELS = (
    "gradient descent", "with noise", "momentum", "Nesterov", "RMSProp", "AdaGrad", "Adam", "Newton", "damped Newton",
)  # fmt: skip
INKS = (PALETTE[0], PALETTE[5], PALETTE[1], PALETTE[1], *PALETTE[2:5], INK, INK)
STROKES = ("-", "-", "-", "--", "-", "-", "-", "-", "--")
PROBLEMS = ("valley", "saddle", "ridge")
OTHERS = [i for i, name in enumerate(NAMES) if name != "newton"]


def turn(degrees: float) -> Tensor:
    """R, (2, 2) float64: counter-clockwise by `degrees`."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def valley(theta: Tensor, kappa: float, angle: float) -> Tensor:
    """½ uᵀ diag(1, κ) u with u = Rᵀθ: (…, 2) → (…), least (0) at 0."""
    u = theta @ turn(angle)
    return (u[..., 0] ** 2 + kappa * u[..., 1] ** 2) / 2


def saddle(theta: Tensor) -> Tensor:
    """x² − y² + y⁴/4: (…, 2) → (…); 0 at the saddle 0, −1 at the minima (0, ±√2)."""
    x, y = theta[..., 0], theta[..., 1]
    return x**2 - y**2 + y**4 / 4


def losses(theta: Tensor, kappa: float, angle: float) -> Tensor:
    """(3, 2) points, one in each problem, or (…, 3, 2) → (…, 3) losses."""
    return torch.cat([valley(theta[..., :1, :], kappa, angle), saddle(theta[..., 1:, :])], dim=-1)


def curvatures(theta: Tensor, kappa: float, angle: float) -> Tensor:
    """(3, 2) points, one in each problem → (3, 2, 2) Hessians: R diag(1, κ) Rᵀ, and diag(2, 3y² − 2) twice."""
    r = turn(angle)
    bends = torch.diag_embed(torch.stack([torch.full_like(theta[:, 1], 2.0), 3 * theta[:, 1] ** 2 - 2], dim=-1))
    bends[0] = r @ torch.diag(torch.tensor([1.0, kappa], dtype=r.dtype)) @ r.T
    return bends


def starts(angle: float) -> Tensor:
    """(3, 2) where everybody stands before the first step."""
    points = torch.tensor([[-2.0, 0.2], [1.2, 0.01], [1.2, 0.0]], dtype=torch.float64)
    points[0] = turn(angle) @ points[0]
    return points


def settings(config: Config) -> tuple[list[Rule | None], Tensor]:
    """Each optimizer's rule (None for the Newton methods, whose rule needs H) and rates α (9, 3) by problem."""
    kappa, root, nesterov = config.kappa, math.sqrt(config.kappa), math.sqrt(3 * config.kappa + 1)
    plain, heavy, ahead = 2 / (1 + kappa), (2 / (1 + root)) ** 2, 4 / (3 * kappa + 1)
    at = config.saddle_learning_rate
    rules: list[Rule | None] = [
        sgd.rule(),
        sgd.rule(),
        momentum.rule(((root - 1) / (root + 1)) ** 2),
        momentum.rule((nesterov - 2) / (nesterov + 2), nesterov=True),
        rmsprop.rule(0.9),
        adagrad.rule(),
        adam.rule(),
        None,
        None,
    ]
    own = (config.rmsprop_learning_rate, config.adagrad_learning_rate, config.adam_learning_rate, 1.0, 1.0)
    rates = [[plain, at, at], [plain, at, at], [heavy, at, at], [ahead, at, at], *([rate] * 3 for rate in own)]
    return rules, torch.tensor(rates, dtype=torch.float64)


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network: what moves is a point in the plane."""
    return {}


@method("basics/descent", paper="Cauchy 1847; Polyak 1964; arXiv:1406.2572", section="3.1, 3.2, 3.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    far = float(starts(config.angle)[0].norm())
    if config.tolerance >= far:
        raise UserError(
            f"--tolerance is {config.tolerance:g}, but the valley's start is only {far:.3g} from its minimum"
        )
    rules, rates = settings(config)

    def value(theta: Tensor) -> Tensor:
        return losses(theta, config.kappa, config.angle)

    slope = torch.func.grad(lambda theta: value(theta).sum())
    theta = starts(config.angle).repeat(len(NAMES), 1, 1)  # line 1: (optimizers, problems, 2)
    memories: list[State] = [{} for _ in NAMES]
    path = np.zeros((config.steps + 1, *theta.shape))
    path[0] = theta
    held = Box(theta=theta, memories=memories, path=path)
    run.track(held=held)
    for step in run.steps(config.steps):
        theta = held.theta
        g = slope(theta)  # line 2
        g[1] += config.noise * torch.randn(g[1].shape, generator=run.generator("noise", step), dtype=g.dtype)
        for i, rule in enumerate(rules):  # line 3
            if rule is None:
                damping = config.damping if NAMES[i] == "damped" else 0.0
                bends = curvatures(theta[i], config.kappa, config.angle)
                try:
                    u = torch.stack([newton.solve(bend, slant, damping) for bend, slant in zip(bends, g[i])])
                except RuntimeError as error:
                    raise RunError(f"step {step} of {LABELS[i]} was not made: {error}") from error
            else:
                signal = Signal(g[i], g[i], theta[i], step + 1, g[i].norm)
                (u, *_), held.memories[i] = rule(signal, held.memories[i])
            theta[i] -= rates[i, :, None] * u
        held.path[step + 1] = theta
        away = np.hypot(*held.path[step + 1, :, 0].T)
        run.log(
            arrived=(away <= config.tolerance).sum(),
            escaped=escaped(held.path[step + 1])[OTHERS, 0].sum(),
            distance_noisy=away[NAMES.index("noisy")],
        )
    if config.frames:
        frames = movie(held.path, config)
        run.artifact("descent", frames, "The first steps of all optimizers at once; early steps are shown slower.")
    gaps = value(torch.from_numpy(held.path)).numpy()[..., :2] - [0.0, -1.0]
    run.artifact(
        "paths", paths_figure(held.path, config), "Paths on level lines; a dot is the start, crosses are ends."
    )
    run.artifact("losses", losses_figure(gaps, config), "Loss above its minimum, step by step.")
    return measures(held.path, config)


def escaped(points: np.ndarray) -> np.ndarray:
    """Who of (9, 3, 2) points is nearer to a minimum than to the saddle: (9, 2) bool, at the saddle and on the ridge."""
    x, y = points[:, 1:, 0], points[:, 1:, 1]
    return np.hypot(x, np.abs(y) - math.sqrt(2)) < np.hypot(x, y)


def measures(path: np.ndarray, config: Config) -> dict[str, float]:
    """Steps to the bottom of the valley (of those that arrive), and who left the saddle; `path` (steps + 1, 9, 3, 2)."""
    distance = np.hypot(path[:, :, 0, 0], path[:, :, 0, 1])
    steps: dict[str, float] = {}
    for i, name in enumerate(NAMES):
        if distance[-1, i] <= config.tolerance:  # and never left it again
            steps[f"steps_{name}"] = float(np.flatnonzero(distance[:, i] > config.tolerance)[-1] + 1)
    found = {}
    if {"steps_sgd", "steps_momentum"} <= set(steps):
        found["momentum_speedup"] = steps["steps_sgd"] / steps["steps_momentum"]
    down = escaped(path[-1])
    quiet = [i for i, name in enumerate(NAMES) if name != "noisy"]
    return (
        found
        | steps
        | {
            "escaped": float(down[OTHERS, 0].sum()),
            "saddle_distance_newton": float(np.hypot(*path[-1, NAMES.index("newton"), 1])),
            "ridge_escaped_noisy": float(down[NAMES.index("noisy"), 1]),
            "ridge_escaped_others": float(down[quiet, 1].sum()),
        }
    )


# ----------------------------------------------------------------------------------------------------------- pictures


def _ground(axes: Any, config: Config, problem: str) -> None:
    """Level lines of one problem and the marks of its critical points."""
    window = (-2.3, 0.8, -1.6, 0.65) if problem == "valley" else (-0.75, 1.45, -0.55, 1.75)
    if problem == "valley" and config.angle != 30:
        window = (-2.4, 2.4, -1.75, 1.75) if config.angle else (-2.3, 0.8, -1.1, 1.1)
    x, y = np.meshgrid(np.linspace(*window[:2], 301), np.linspace(*window[2:], 301))
    points = torch.from_numpy(np.stack([x, y], -1))
    height = valley(points, config.kappa, config.angle) if problem == "valley" else saddle(points)
    levels = np.geomspace(0.02, 100, 12) if problem == "valley" else np.linspace(-0.96, 2, 17)
    axes.contour(x, y, height.numpy(), levels=levels, colors="#cfc9bc", linewidths=0.7, linestyles="solid")
    axes.grid(False)
    axes.set(xlim=window[:2], ylim=window[2:], aspect="equal")
    marks = [(0.0, 0.0, "minimum")] if problem == "valley" else [(0, 0, "saddle"), (0, math.sqrt(2), "minimum")]
    for left, up, name in marks:
        axes.plot(left, up, "*" if name == "minimum" else "X", color=SOFT, markersize=9, zorder=1)
        axes.annotate(name, (left, up), (-6, 7), textcoords="offset points", ha="right", fontsize=8, color=SOFT)
    title = f"valley, κ = {config.kappa:g}" if problem == "valley" else "saddle x² − y² + y⁴/4"
    label(axes, title, "θ₁", "θ₂")


def _shown(path: np.ndarray, problem: int) -> np.ndarray:
    """(steps + 1, 9, 2) of a problem, those that end in the lower minimum of the saddle mirrored into the window."""
    points = path[:, :, problem].copy()
    if problem == 1:
        points[..., 1] *= np.where(points[-1, :, 1] < 0, -1, 1)
    return points


def paths_figure(path: np.ndarray, config: Config) -> Any:
    """Both grounds with all paths, and one legend."""
    figure, both = panels(2, width=9.6, height=4.5)
    for problem, axes in enumerate(both):
        _ground(axes, config, PROBLEMS[problem])
        points = _shown(path, problem)
        for i, name in enumerate(LABELS):
            width = 0.6 if i < 2 else 1.2
            axes.plot(*points[:, i].T, color=INKS[i], linestyle=STROKES[i], linewidth=width, label=name)
            axes.plot(*points[-1, i], "x", color=INKS[i], markersize=6)
        axes.plot(*points[0, 0], "o", color=INK, markersize=5)
    _legend(figure, both[0])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    lines, names = axes.get_legend_handles_labels()
    shown = figure.legend(
        lines, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, labelcolor=INK
    )
    for line in shown.get_lines():
        line.set_linewidth(2.0)


def losses_figure(gaps: np.ndarray, config: Config) -> Any:
    """Loss above the minimum against step; `gaps` (steps + 1, 9, 2)."""
    figure, both = panels(2, width=9.6, height=4.1)
    for problem, axes in enumerate(both):
        last = len(gaps) if problem == 0 else min(len(gaps), 201)
        for i, name in enumerate(LABELS):
            curve = np.clip(gaps[:last, i, problem], 1e-17, 1e17)  # one that flies off leaves the picture
            axes.semilogy(curve, color=INKS[i], linestyle=STROKES[i], linewidth=1.3, label=name)
        axes.set_ylim(1e-13 if problem == 0 else 1e-6, None)
        title = f"valley, κ = {config.kappa:g}" if problem == 0 else "saddle, from beside its ridge"
        label(axes, title, "step", "loss − minimum")
    both[0].axhline(config.tolerance**2 / 2, color=SOFT, linewidth=0.8, linestyle=":")
    _legend(figure, both[0])
    return figure


def movie(path: np.ndarray, config: Config) -> list[Any]:
    """The first 160 steps as frames for a GIF; positions between steps are interpolated, early steps shown slower.

    In the valley a path fades after 24 steps, for the zigzags would cover each other.
    """
    figure, both = panels(2, width=6.4, height=3.7)
    figure.set_dpi(130)
    shown, lines, dots = [_shown(path, problem) for problem in (0, 1)], [], []
    for problem, axes in enumerate(both):
        _ground(axes, config, PROBLEMS[problem])
        lines.append([axes.plot([], [], color=c, linestyle=s, linewidth=1.2)[0] for c, s in zip(INKS, STROKES)])
        dots.append([axes.plot([], [], "o", color=c, markersize=5)[0] for c in INKS])
    for name, ink, stroke in zip(LABELS, INKS, STROKES):
        both[0].plot([], [], color=ink, linestyle=stroke, label=name)
    _legend(figure, both[0])
    clock = both[1].text(0.98, 0.03, "", transform=both[1].transAxes, ha="right", fontsize=9, color=INK)

    def show(time: float) -> None:
        whole, part = int(time), time - int(time)
        for points, group, heads, tail in zip(shown, lines, dots, (24, 1000)):
            now = points[whole] + part * (points[min(whole + 1, len(points) - 1)] - points[whole])
            for i, (line, head) in enumerate(zip(group, heads)):
                line.set_data(*np.vstack([points[max(0, whole - tail) : whole + 1, i], now[i]]).T)
                head.set_data(*now[i][:, None])
        clock.set_text(f"step {whole}")

    still = min(20, config.frames // 5)  # the last frames stand
    ease = np.linspace(0, 1, config.frames - still) ** 2.2 * min(160, len(path) - 1)
    moving = [artist for group in (*lines, *dots) for artist in group] + [clock]
    return film(figure, moving, [*ease, *[ease[-1]] * still], show)
