"""Facts about `--source`: which network is found, that it is the trained one, and one sentence when there is none."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import etude
from etude import data as room
from etude.blocks.looking import sources
from etude.blocks.looking.sources import resolve
from etude.core.errors import UserError
from etude.core.run import Common, Run

TINY = {"preset": "tiny", "quiet": True, "threads": 1}
METHODS = ("robustness/fgsm", "insight/saliency", "insight/guided_backprop")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("ETUDE_DATA", raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "this").mkdir()
    return Run("test", None, Common(quiet=True, device="cpu"), tmp_path / "this")


def shapes(folder: Path, names: tuple[str, ...] = ("bar", "disc"), sides: tuple[int, ...] = (20, 24, 31)) -> Path:
    """A user's own folder: bars and discs (whatever has another name) of several sizes, 20 of each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(20):
            side = sides[i % len(sides)]
            rows, columns = np.mgrid[:side, :side] / side - 0.5
            ink = (np.hypot(rows, columns) < 0.2 + 0.01 * i) if name != "bar" else (abs(columns) < 0.05 + 0.01 * i)
            Image.fromarray((255 * ink).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def said(done: etude.core.launch.Finished) -> str:
    """All captions of a run."""
    return (done.folder / "artifacts" / "index.json").read_text()


def test_a_run_by_folder_and_by_name(run: Run, tmp_path: Path) -> None:
    """The latest run of a method, or the folder; the network has the weights that the run ended with."""
    first = etude.run("basics/mlp", **TINY, seed=1)
    second = etude.run("basics/mlp", **TINY, seed=2)
    by_name = resolve(run, "basics/mlp", "")
    by_folder = resolve(Run("other", None, run.common, tmp_path / "other"), str(first.folder), "")
    for source, done in ((by_name, second), (by_folder, first)):
        expected = etude.load(done.folder)
        weights = expected.model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in source.model.state_dict().items())
        assert source.steps == 0
        assert source.spec == expected.spec
        assert source.label == f"basics/mlp ({done.folder}) on digits, 360 test images"
        x, y = source.choose(10_000, 0)
        assert len(y) == 360
        assert torch.equal(x.sort(0).values, (room.images("digits").test.x.float() / 255).sort(0).values)
        right = (source.model(x).argmax(1) == y).float().mean()
        assert float(right) == pytest.approx(done.metrics["test_accuracy"], abs=0.003)  # float pixels as uint8 ones


def test_images_are_resized_to_what_the_network_takes(run: Run) -> None:
    etude.run("vision/lenet", **TINY)  # digits are 8 × 8, LeNet's input 28 × 28
    source = resolve(run, "lenet", "")
    x, y = source.choose(7, 3)
    assert x.shape == (7, 1, 28, 28)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert source.model(x).shape == (7, len(source.spec.classes))
    assert not torch.equal(x, source.choose(7, 4)[0])
    assert torch.equal(x, source.choose(7, 3)[0])
    assert y.dtype == torch.int64


@pytest.mark.parametrize(("network", "shape"), [("lenet", (1, 28, 28)), ("mlp", (1, 8, 8)), ("softmax", (1, 8, 8))])
def test_fresh_learns_in_the_run_s_first_steps(run: Run, network: str, shape: tuple[int, ...]) -> None:
    source = resolve(run, "fresh", "", network, steps=60, batch=64)
    assert source.steps == 60
    assert source.spec.shape == shape
    assert f"{network} trained for 60 steps on digits" in source.label
    losses = [float(source.learn(step)) for step in run.steps(source.steps)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_sentences(run: Run, tmp_path: Path) -> None:
    def again() -> Run:
        return Run("test", None, run.common, tmp_path / "this")

    with pytest.raises(UserError, match=r"--source vision/lenet: there is no run 'vision/lenet'.*--source fresh"):
        resolve(run, "vision/lenet", "")
    etude.run("games/cfr", **TINY)
    with pytest.raises(UserError, match="games/cfr, which holds no classifier of images"):
        resolve(again(), "games/cfr", "")
    for name in ("detection/overfeat", "detection/faster_rcnn", "segmentation/unet"):  # of windows, of boxes, of pixels
        etude.run(name, **TINY)
        with pytest.raises(UserError, match=f"{name}, which holds no classifier of images"):
            resolve(again(), name, "")
    folder = tmp_path / "this"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the folder of this run itself"):
        resolve(again(), str(folder), "")
    done = etude.run("basics/mlp", **TINY)
    shapes(tmp_path / "pictures", sides=(8,))
    with pytest.raises(
        UserError, match=r"pictures has the class 'bar', which the network of .* does not know.* 0, 1, 2"
    ):
        resolve(again(), str(done.folder), str(tmp_path / "pictures"))
    for file in (tmp_path / "pictures").glob("*/*.png"):
        Image.open(file).convert("RGB").save(file)
    with pytest.raises(
        UserError, match=r"has images \(3, 8, 8\) of 2 classes; the network of .* takes \(1, 8, 8\) of 10"
    ):
        resolve(again(), str(done.folder), str(tmp_path / "pictures"))


@pytest.mark.parametrize("method", METHODS)
def test_a_network_trained_on_a_folder_of_mixed_sizes(method: str, tmp_path: Path) -> None:
    """The run knows the size its network was trained with, its class names and its data; nothing is asked again."""
    folder = shapes(tmp_path / "shapes")
    etude.run("vision/lenet", **TINY, data=folder, size=28)
    mlp = etude.run("basics/mlp", **TINY, data=folder, size=12)
    for source, shape in (("vision/lenet", (1, 28, 28)), (str(mlp.folder), (1, 12, 12))):
        done = etude.run(method, **TINY, source=source)
        spec = json.loads((done.folder / "spec.json").read_text())
        assert tuple(spec["shape"]) == shape
        assert spec["classes"] == ["bar", "disc"]
        assert spec == json.loads((etude.core.launch.find_run(source) / "spec.json").read_text())  # its mean, too
        assert str(folder) in said(done)
        assert "digits" not in said(done)
        about = json.loads((done.folder / "about.json").read_text())["data"]
        assert about["name"] == str(folder)
        assert set(about["splits"]) == {"test"}  # what is examined; nothing is learnt
        assert set(about["splits"]["test"]["by class"]) == {"bar", "disc"}


def test_labels_go_by_the_names_of_classes(run: Run, tmp_path: Path) -> None:
    """A folder with two of the network's three classes: number 0 there is number 1 of the network."""
    trained = etude.run("basics/mlp", **TINY, data=shapes(tmp_path / "shapes", ("bar", "disc", "egg")), size=12)
    source = resolve(run, str(trained.folder), str(shapes(tmp_path / "other", ("disc", "egg"))))
    assert set(source.images.y.tolist()) == {1, 2}
    assert source.spec.classes == ("bar", "disc", "egg")


def test_a_folder_that_has_moved_is_named(run: Run, tmp_path: Path) -> None:
    trained = etude.run("basics/mlp", **TINY, data=shapes(tmp_path / "shapes"), size=12)
    (tmp_path / "shapes").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"learnt from .*/shapes, and .* does not exist.* name other images with --data"
    ):
        resolve(run, str(trained.folder), "")
    moved = Run("test", None, run.common, tmp_path / "that")
    assert "elsewhere" in resolve(moved, str(trained.folder), str(tmp_path / "elsewhere")).label


def test_a_run_of_a_copied_file(tmp_path: Path) -> None:
    """`etude copy vision/lenet mine.py`, changed and run: its own network is examined."""
    mine = tmp_path / "mine.py"
    text = Path(etude.catalog.find("vision/lenet").path).read_text()
    mine.write_text(text.replace("self.standardise(x)", "1 - self.standardise(x)"))
    trained = etude.run(str(mine), **TINY)
    done = etude.run("robustness/fgsm", **TINY, source=trained.folder)
    assert str(trained.folder) in said(done)
    model, test = etude.load(trained.folder).model, room.images("digits", 28).test
    order = sources.Source(model, None, test, "", 0, None).choose(40, 0)  # type: ignore[arg-type]
    with torch.no_grad():
        right = (model(order[0]).argmax(1) == order[1]).float().mean()
    assert done.metrics["clean_accuracy"] == pytest.approx(float(right))


def test_methods_take_a_run(tmp_path: Path) -> None:
    """Each of the three works on a trained run, as the command line would ask for it, and says whose network it is."""
    trained = etude.run("vision/lenet", **TINY)
    named = ("vision/lenet", trained, etude.load(trained.folder))
    for name, source in [*zip(METHODS, named, strict=True), *((METHODS[0], source) for source in named[1:])]:
        done = etude.run(name, **TINY, source=source)
        assert "vision/lenet" in said(done)
        assert etude.load(done.folder).step == 0  # nothing is trained


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_examination_comes_to_the_same_numbers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of it: the state is saved, and the resumed run examines all images again."""
    trained = etude.run("basics/mlp", **TINY)
    whole = etude.run(method, **TINY, source=trained)

    def interrupted(*words: object) -> Iterator[object]:
        yield next(iter(real(*words)))
        os.kill(os.getpid(), signal.SIGINT)
        yield from ()

    module = etude.catalog.load_method(etude.catalog.find(method))
    real = module.rounds
    with monkeypatch.context() as patch:
        patch.setattr(module, "rounds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            etude.run(method, **TINY, source=trained, out=tmp_path / "halted")
    assert etude.resume(tmp_path / "halted").metrics == whole.metrics


class Theirs(nn.Module):
    """A network that is none of ours: it scales its pixels itself and has a ReLU."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.LazyLinear(classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(2 * x - 1))


def test_methods_take_a_model_object(tmp_path: Path) -> None:
    model = Theirs()
    model(torch.zeros(1, 1, 8, 8))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in METHODS:
        done = etude.run(name, **TINY, source=model, data="digits")
        assert "Theirs object on digits, 360 test images" in said(done)
        assert '"source": "the model object Theirs"' in (done.folder / "config.json").read_text()
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    (done.folder / "done").unlink()
    with pytest.raises(UserError, match="examined the model object Theirs, which ended with its Python session"):
        etude.resume(done.folder)


@pytest.mark.parametrize(
    ("model", "settings", "sentence"),
    [
        (nn.Flatten(), {}, "source is a Flatten object, so say what to examine it on"),
        (
            nn.Flatten(),
            {"data": "digits"},
            r"returns \(2, 64\) for 2 images of digits; it must return logits \(2, 10\)",
        ),
        (
            nn.Linear(3, 10),
            {"data": "digits"},
            r"the Linear object cannot take images \(2, 1, 8, 8\) of digits: mat1",
        ),
        ("no/such/run", {}, "there is no run"),
    ],
)
def test_a_model_that_does_not_fit_gets_one_sentence(tmp_path: Path, model, settings, sentence) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        etude.run("insight/saliency", **TINY, **settings, source=model, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="basics/mlp has no setting 'source'"):
        etude.run("basics/mlp", source=nn.Linear(2, 2))


def test_a_resumed_run_keeps_its_source(tmp_path: Path) -> None:
    """A newer run of the same method does not take the place of the one that an interrupted run began with."""
    first = etude.run("basics/mlp", **TINY, seed=1)
    common = Common(quiet=True, device="cpu", save_every=1)
    (tmp_path / "this").mkdir()
    run = Run("test", None, common, tmp_path / "this")
    resolve(run, "basics/mlp", "")
    for _ in run.steps(2):
        pass
    etude.run("basics/mlp", **TINY, seed=2)
    resumed = Run("test", None, common, tmp_path / "this", resume=True)
    assert str(first.folder) in resolve(resumed, "basics/mlp", "").label


def test_guided_needs_a_relu(tmp_path: Path) -> None:
    etude.run("vision/lenet", **TINY, style="1998")
    with pytest.raises(UserError, match=r"--source vision/lenet: no ReLU is seen in LeNet"):
        etude.run("insight/guided_backprop", **TINY, source="vision/lenet")
