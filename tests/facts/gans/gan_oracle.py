"""Plain torch, numpy and scipy for the whole-run tests of the GAN files: networks, batches, noise, rates, scores."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import nn

import etude
from etude import data
from etude.core.randomness import fold, generator
from etude.data.batches import Stream
from etude.gans.parts import judge, stages
from etude.gans.parts.ring import ring

SEED = 3


@contextlib.contextmanager
def small(monkeypatch):
    """float64 throughout, a judge of 5 steps, and few samples to score."""
    monkeypatch.setattr(judge, "JUDGE_STEPS", 5)
    for name, count in (("POINTS", 300), ("IMAGES", 120), ("PAIRS", 50), ("MOST", 100)):
        monkeypatch.setattr(stages, name, count)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run(name, folder, settings):
    return etude.run(name, out=folder / "run", seed=SEED, quiet=True, threads=1, **settings)


def start(module, config):
    """The data's spec (and images), and what `build` makes at the run's first moment."""
    images = None if config.data == "ring" else data.images(config.data, config.size)
    torch.manual_seed(fold(SEED, 0, 0, "init"))
    return images, module.build(config, images.spec if images else stages.RingStage.spec)


def twin(ours, layers):
    """The same weights in torch's own layers."""
    plain = (
        nn.Sequential(*layers, nn.Flatten(0))
        if layers[-1].__class__ in (nn.Linear, nn.Conv2d)
        else nn.Sequential(*layers)
    )
    plain.load_state_dict({name.removeprefix("main."): value for name, value in ours.state_dict().items()})
    return plain.train()


def plain_generator(ours, config):
    if config.data == "ring":
        hidden = (nn.Linear(config.latent, config.width), nn.ReLU(), nn.Linear(config.width, config.width), nn.ReLU())
        return nn.Sequential(*twin(ours, (*hidden, nn.Linear(config.width, 2)))[:5])
    w = config.width  # of 16 pixels
    net = twin(
        ours,
        (
            nn.ConvTranspose2d(config.latent, 2 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            nn.ConvTranspose2d(w, 1, 4, 2, 1, bias=False), nn.Tanh(),
        ),
    )  # fmt: skip
    return nn.Sequential(nn.Unflatten(1, (config.latent, 1, 1)), *net)


def plain_critic(ours, config, bias, normalizer="batch"):
    """`bias`: whether the last unit of a critic of points has one."""
    w = config.width
    if config.data == "ring":
        return twin(ours, (nn.Linear(2, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 1, bias=bias)))
    norm = {"batch": [nn.BatchNorm2d(2 * w)], "layer": [nn.GroupNorm(1, 2 * w)], "none": []}[normalizer]
    first = (nn.Conv2d(1, w, 4, 2, 1, bias=normalizer != "batch"), nn.LeakyReLU(0.2))
    second = (nn.Conv2d(w, 2 * w, 4, 2, 1, bias=normalizer == "none"), *norm, nn.LeakyReLU(0.2))
    return twin(ours, (*first, *second, nn.Conv2d(2 * w, 1, 4, 1, 0, bias=False)))


def batches(images, config, step, count):
    """`count` real batches of a step: of the ring from the step's own stream, of images one after the other."""
    m = config.batch
    if images is None:
        return ring(count * m, generator(SEED, step, 0, "ring")).split(m)
    stream = Stream(len(images.train.y), m, SEED)
    return [images.train.x[stream.indices(step * count + i)].double() / 127.5 - 1 for i in range(count)]


def rate(config, step):
    falls = {
        "constant": 1,
        "linear": 1 - step / config.steps,
        "cosine": (1 + math.cos(math.pi * step / config.steps)) / 2,
    }
    return config.learning_rate * falls[config.schedule]


def set_rate(optimizers, config, step):
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate(config, step)


def agree(loaded, **plain):
    """The weights and running statistics of the run are those of the plain networks."""
    for name, net in plain.items():
        ours, theirs = loaded.modules[name].state_dict(), net.state_dict()
        assert len(ours) == len(theirs)
        for (key, one), other in zip(ours.items(), theirs.values()):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder, *names):
    """What the run logged after each of its steps: names × steps."""
    found = [row for row in rows(folder) if row["step"] > 0]
    return torch.tensor([[row[name] for row in found] for name in names])


# ------------------------------------------------------------------------------------------------------------- scores


def frechet(a, b):
    """By scipy's matrix square root, of (mean, covariance) and (mean, covariance)."""
    root = sqrtm(a[1] @ b[1] + 1e-13 * np.eye(len(a[0]))).real
    return ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root)


def gaussian(x):
    return x.mean(0), np.cov(x.T)


def noise(kind, count, config):
    return torch.randn(count, config.latent, generator=generator(SEED, -1, 0, kind))


def point_scores(points, first):
    """modes, share, distance and ratio of points, against the ring in closed form."""
    angle = np.arange(8) * np.pi / 4
    near = np.linalg.norm(points[:, None] - 2 * np.stack([np.cos(angle), np.sin(angle)], 1), axis=2) <= 3 * 0.05
    true = np.zeros(2), np.eye(2) * (2**2 / 2 + 0.05**2)
    distance = frechet(true, gaussian(points))
    return {
        "modes": sum(near[:, k].sum() >= len(points) / 32 for k in range(8)),
        "share": near.any(1).mean(),
        "frechet_distance": distance,
        "frechet_ratio": distance / frechet(true, gaussian(first)),
    }


def judged(net, images):
    """Features before the last layer, and classes, of images in [0, 1] enlarged to 32 pixels."""
    x = nn.functional.interpolate(images, (32, 32), mode="bilinear")
    hidden = net.classifier[2](net.classifier[1](net.features(net.standardise(x)).flatten(1)))
    return hidden.numpy(), net.classifier[3](hidden).argmax(1).numpy()


def image_scores(net, images, made, first, split):
    """modes, distance and ratio of generated images, against a split of the data as the judge sees both."""
    real = gaussian(judged(net, split.x[:100] / 255)[0])
    features, classes = judged(net, (made + 1) / 2)
    distance = frechet(real, gaussian(features))
    fair = [(images.train.y == c).double().mean().item() for c in range(10)]
    return {
        "modes": sum((classes == c).mean() >= fair[c] / 4 for c in range(10)),
        "lenet_frechet_distance": distance,
        "frechet_ratio": distance / frechet(real, gaussian(judged(net, (first + 1) / 2)[0])),
    }


def reported(module, result):
    """What the run should have returned, and logged at its last step, from its saved state, the data and the seed."""
    loaded = etude.load(result.folder)
    config, G = loaded.config, loaded.modules["generator"]
    images, fresh = start(module, config)
    untrained, found = fresh["generator"].eval(), {}
    with torch.no_grad():
        for kind, count in (
            (("validation", 300), ("test", 300)) if images is None else (("validation", 120), ("test", 120))
        ):
            made, first = G(noise(kind, count, config)), untrained(noise("validation", count, config))
            if images is None:
                scores = point_scores(made.numpy(), first.numpy())
            else:
                net, split = loaded.modules["judge"], getattr(images, kind)
                scores = image_scores(net, images, made, first, split)
                if kind == "test":
                    right = judged(net, split.x[:100] / 255)[1] == split.y[:100].numpy()
                    scores["judge_accuracy"] = right.mean()
            found |= {f"{kind}_{name}": float(value) for name, value in scores.items()}
    return found


def check_reported(module, result, critic=""):
    """All that the run returned, and logged at its last step, is `reported` and, on the ring, `distances`."""
    found, last = reported(module, result), rows(result.folder)[-1]
    curves = {name: value for name, value in last.items() if name.startswith("validation_")}
    returned = {name: value for name, value in found.items() if name.startswith("test_")}
    if critic and etude.load(result.folder).config.data == "ring":
        returned |= distances(result, critic)
    assert result.metrics == pytest.approx(returned, rel=1e-5)
    assert len(curves) >= 3
    assert curves == pytest.approx({name: value for name, value in found.items() if name in curves}, rel=1e-5)


def distances(result, critic):
    """The exact distance of 50 fresh points of each kind, and the critic's as a multiple of it."""
    loaded = etude.load(result.folder)
    x = ring(50, generator(SEED, -1, 0, "test points"))
    with torch.no_grad():
        y = loaded.modules["generator"](noise("test", 300, loaded.config)[:50])
        estimate = loaded.modules[critic](x).mean() - loaded.modules[critic](y).mean()
    cost = cdist(x.numpy(), y.numpy())
    exact = cost[linear_sum_assignment(cost)].mean()
    return {"test_distance": exact, "test_distance_ratio": estimate.item() / exact}
