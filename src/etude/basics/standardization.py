"""Standardising the inputs makes plain gradient descent many times shorter

Paper: LeCun, Bottou, Orr & Müller, Efficient BackProp, 1998, section 4.3.

Equation: x̄ = (x − μ) / σ per feature, μ and σ of the *training* split. Logistic regression on it,
    L(w) = (1/N) Σ log(1 + exp(−y wᵀx̄)) + (λ/2)‖w‖²,   w ← w − ∇L / ℓ,   ℓ = λ_max(¼ XᵀX/N + λI) ≥ λ_max(H)
where the number of steps grows with the condition number of H. Large means make one large eigenvalue, which all
features share; unequal scales make the others small.

Algorithm:
1. four copies of the data: raw, centred (x − μ), scaled (x / σ), standardised; each with a constant 1 added
2. the minimum of each by Newton's method
3. gradient descent on all four at once, each at its own safe rate 1/ℓ; the first step at which L − min L < `tolerance`
4. accuracy of the standardised copy's w on the test fifth, which μ, σ, w and λ have not seen

Differences:
- A constant feature has σ = 0 and becomes 0, not NaN; μ and σ stay frozen for the test split (the notes say neither).
- E07: without the L2 term separable data has no minimum to measure the distance to.
- λ acts on each copy's own w, so the four problems differ a little in their minima; each is measured from its own.
- A copy that has not arrived after `steps` steps counts with `steps`: `speedup` is then a lower bound.

Expect: one core, 6 s → standardised 175 steps, scaled only 6,148, raw not within 20,000 (breast cancer, 30 features).
Command: `etude run basics/standardization`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks.nn.norm import Standardise
from etude.blocks.pictures.panels import label, legend, panels
from etude.blocks.pictures.plots import PALETTE, SOFT
from etude.catalog import Control, Experiment, method
from etude.core.checkpoint import Box
from etude.core.config import Positive, Range
from etude.core.run import Run
from etude.core.spec import Spec
from etude.data.sets import stratified
from etude.optim.newton import solve


@dataclass(frozen=True)
class Config:
    steps: Annotated[int, Range(1, 10_000_000)] = 20_000
    """Steps of gradient descent."""
    tolerance: Positive = 1e-3
    """Loss above the minimum at which it has arrived."""
    l2: Annotated[float, Range(1e-9, 1e3)] = 0.01
    """λ."""
    features: Annotated[int, Range(1, 30)] = 30
    """How many of the 30 measurements of a tumour are used."""


PRESETS = {
    "tiny": Config(steps=500, features=5),  # 1 s
    "default": Config(),  # 6 s → at least 114 times fewer steps
}

METRICS = {
    "speedup": "steps on raw features over steps on standardised ones (a lower limit if the raw ones never arrived)",
    "speedup_*": "steps on raw features over steps on these",
    "steps_*": "steps of gradient descent until the loss is within --tolerance of its minimum; --steps if never",
    "condition_*": "condition number of the Hessian at the minimum",
    "gap_*": "loss above its minimum",
    "test_accuracy": "accuracy on the test split with standardised features",
}

EXPERIMENTS = (
    Experiment(
        "breast_cancer", preset="default", metric="speedup", bar=100.0,
        notes="At least: the raw copy has not arrived when the run ends.",
        controls=(
            Control("only centred", metric="speedup_centred"),
            Control("only scaled", metric="speedup_scaled"),
            Control("raw inputs in place of standardised ones", swap={"Standardise": "etude.basics.parts.statistics_nulls.Raw"}),
        ),
    ),
)  # fmt: skip

COPIES = ("raw", "centred", "scaled", "standardised")


def copies(x: Tensor, train: Tensor) -> Tensor:
    """(4, N, D + 1): x (N, D) raw, centred, scaled and standardised by the moments of `train`, with a constant."""
    fitted = Standardise.fit(train)
    scaled = x * fitted.scale
    whole = torch.stack([x, x - fitted.mean, scaled, fitted(x)])
    return torch.cat([whole, torch.ones(4, len(x), 1, dtype=x.dtype)], dim=-1)


def loss(w: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """L of each copy: w (C, D), x (C, N, D), y (N,) ±1 → (C,)."""
    margins = y * (x @ w[..., None])[..., 0]
    return F.softplus(-margins).mean(-1) + l2 / 2 * w.square().sum(-1)


def slope(w: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """∇L of each copy, (C, D)."""
    margins = y * (x @ w[..., None])[..., 0]
    pull = -y * torch.sigmoid(-margins) / len(y)
    return (pull[:, None] @ x)[:, 0] + l2 * w


def curvature(w: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """∇²L of each copy, (C, D, D)."""
    share = torch.sigmoid((x @ w[..., None])[..., 0])
    weighted = x * (share * (1 - share) / len(y))[..., None]
    return x.transpose(1, 2) @ weighted + l2 * torch.eye(x.shape[2], dtype=x.dtype)


def minima(x: Tensor, y: Tensor, l2: float) -> Tensor:
    """argmin L of each copy by Newton's method with the step halved until it descends: (C, D)."""
    w = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    for _ in range(60):
        g, bends = slope(w, x, y, l2), curvature(w, x, y, l2)
        step = torch.stack([solve(bend, down) for bend, down in zip(bends, g)])
        length = torch.ones(len(w), 1, dtype=x.dtype)
        for _ in range(40):
            worse = loss(w - length * step, x, y, l2) > loss(w, x, y, l2)
            length[worse] /= 2
        w = w - length * step
    return w


def build(config: Config, spec: Spec) -> dict[str, nn.Module]:
    """No network: the weights of four logistic regressions."""
    return {}


@method("basics/standardization", paper="LeCun et al. 1998", section="4.3", threads=1)
def train(config: Config, run: Run) -> dict[str, float]:
    from sklearn.datasets import load_breast_cancer

    data, target = load_breast_cancer(return_X_y=True)
    kept, held = stratified(target, len(target) // 5, run.seed)
    everything = torch.from_numpy(data[:, : config.features])
    y = torch.from_numpy(2.0 * target - 1)
    x, test = (copies(everything[rows], everything[kept]) for rows in (kept, held))  # line 1
    y, test_y = y[kept], y[held]
    lows = minima(x, y, config.l2)  # line 2
    lowest = loss(lows, x, y, config.l2)
    bound = torch.linalg.eigvalsh(x.transpose(1, 2) @ x / (4 * len(y)))[:, -1:] + config.l2
    weights = torch.zeros(len(COPIES), x.shape[2], dtype=x.dtype)
    seen = Box(weights=weights, gaps=np.zeros((config.steps, len(COPIES))))
    run.track(seen=seen)
    for step in run.steps(config.steps):  # line 3
        seen.weights -= slope(seen.weights, x, y, config.l2) / bound
        gaps = loss(seen.weights, x, y, config.l2) - lowest
        seen.gaps[step] = gaps
        if run.every(max(1, config.steps // 200)):
            run.log(**dict(zip([f"gap_{name}" for name in COPIES], gaps.clamp(min=1e-12).tolist())))
    bends = curvature(lows, x, y, config.l2)
    spectra = torch.linalg.eigvalsh(bends).clamp(min=config.l2)  # λ is in every eigenvalue; below it is rounding
    run.artifact("descent", figure(seen.gaps, spectra.numpy(), config), "Gradient descent on four copies of the data.")
    found = {}
    for i, name in enumerate(COPIES):
        arrived = np.flatnonzero(seen.gaps[:, i] < config.tolerance)
        found[f"steps_{name}"] = float(arrived[0] + 1) if len(arrived) else float(config.steps)
        found[f"condition_{name}"] = float(spectra[i, -1] / spectra[i, 0])
        found[f"gap_{name}"] = float(seen.gaps[-1, i])
    right = ((test @ seen.weights[..., None])[..., 0] * test_y > 0).double().mean(1)
    found["test_accuracy"] = float(right[-1])
    slow = found["steps_raw"]
    return {
        "speedup": slow / found["steps_standardised"],
        "speedup_centred": slow / found["steps_centred"],
        "speedup_scaled": slow / found["steps_scaled"],
    } | found


def figure(gaps: np.ndarray, spectra: np.ndarray, config: Config) -> Any:
    """Loss above the minimum against step, and the eigenvalues of the Hessian at the minimum."""
    picture, (left, right) = panels(2, width=9.6, height=3.9)
    inks = (PALETTE[1], PALETTE[4], PALETTE[3], PALETTE[0])
    steps = np.arange(1, len(gaps) + 1)
    for i, (name, ink) in enumerate(zip(COPIES, inks)):
        left.loglog(steps, np.maximum(gaps[:, i], 1e-9), color=ink, linewidth=1.7, label=name)
        right.semilogy(np.arange(1, spectra.shape[1] + 1), spectra[i, ::-1], ".-", color=ink, linewidth=1, label=name)
    left.axhline(config.tolerance, color=SOFT, linewidth=0.8, linestyle="--")
    left.set_ylim(config.tolerance / 100, 2)
    label(left, "breast cancer, logistic regression", "step of gradient descent", "loss − minimum (nats)")
    label(right, "curvature at the minimum", "rank", "eigenvalue of the Hessian")
    legend(right, loc="upper right")
    return picture
