"""Facts about `--source`: which network is found, that it is the trained one, and one sentence when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import etude
from etude.blocks.sources import resolve
from etude.core.errors import UserError
from etude.core.run import Common, Run

TINY = {"preset": "tiny", "quiet": True, "threads": 1}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETUDE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("ETUDE_DATA", raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("test", None, Common(quiet=True, device="cpu"), tmp_path / "this")


def test_a_run_by_folder_and_by_name(run: Run, tmp_path: Path) -> None:
    """The latest run of a method, or the folder; the network has the weights that the run ended with."""
    first = etude.run("basics/mlp", **TINY, seed=1)
    second = etude.run("basics/mlp", **TINY, seed=2)
    by_name = resolve(run, "basics/mlp", "")
    by_folder = resolve(Run("other", None, run.common, tmp_path / "other"), str(first.folder), "")
    for source, done in ((by_name, second), (by_folder, first)):
        expected = etude.load(done.folder).model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in source.model.state_dict().items())
        assert source.steps == 0
        assert source.data.name == "digits"
        assert str(done.folder) in source.label
        x, y = source.choose(10_000, 0)
        right = (source.model(x).argmax(1) == y).float().mean()
        assert float(right) == pytest.approx(done.metrics["test_accuracy"], abs=0.003)  # float pixels as uint8 ones


def test_images_are_resized_to_what_the_network_takes(run: Run) -> None:
    etude.run("vision/lenet", **TINY)  # digits are 8 × 8, LeNet's input 28 × 28
    source = resolve(run, "lenet", "")
    x, y = source.choose(7, 3)
    assert x.shape == (7, 1, 28, 28)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert source.model(x).shape == (7, len(source.data.spec.classes))
    assert not torch.equal(x, source.choose(7, 4)[0])
    assert torch.equal(x, source.choose(7, 3)[0])
    assert y.dtype == torch.int64


@pytest.mark.parametrize(("network", "shape"), [("lenet", (1, 28, 28)), ("mlp", (1, 8, 8)), ("softmax", (1, 8, 8))])
def test_fresh_learns_in_the_run_s_first_steps(run: Run, network: str, shape: tuple[int, ...]) -> None:
    source = resolve(run, "fresh", "", network, steps=60, batch=64)
    assert source.steps == 60
    assert source.data.spec.shape == shape
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
    folder = tmp_path / "this"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is this run itself"):
        resolve(again(), str(folder), "")
    done = etude.run("basics/mlp", **TINY)
    pictures = tmp_path / "pictures"
    _two_classes(pictures)
    with pytest.raises(UserError, match=r"has images .* of 2 classes; the network of .* takes \(1, 8, 8\) of 10"):
        resolve(again(), str(done.folder), str(pictures))


def _two_classes(folder: Path) -> None:
    from PIL import Image

    for name in ("dark", "light"):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), 40 * i).save(folder / name / f"{i}.png")


def test_methods_take_a_run(tmp_path: Path) -> None:
    """Each of the three works on a trained run, as the command line would ask for it, and says whose network it is."""
    etude.run("vision/lenet", **TINY)
    for name in ("robustness/fgsm", "insight/saliency", "insight/guided_backprop"):
        done = etude.run(name, **TINY, source="vision/lenet")
        assert "vision/lenet" in (done.folder / "artifacts" / "index.json").read_text()
        assert (done.folder / "metrics.jsonl").read_text().count("\n") == 2  # two batches, no training


class Theirs(torch.nn.Module):
    """A network that is none of ours: it scales its pixels itself and has a ReLU."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        self.head = torch.nn.LazyLinear(classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(2 * x - 1))


def test_methods_take_a_model_object(tmp_path: Path) -> None:
    model = Theirs()
    model(torch.zeros(1, 1, 8, 8))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("robustness/fgsm", "insight/saliency", "insight/guided_backprop"):
        done = etude.run(name, **TINY, source=model, data="digits")
        assert "Theirs object" in (done.folder / "artifacts" / "index.json").read_text()
        assert '"source": "the model object Theirs"' in (done.folder / "config.json").read_text()
        assert (done.folder / "metrics.jsonl").read_text().count("\n") == 2  # two batches, no training
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    (done.folder / "done").unlink()
    with pytest.raises(UserError, match="examined the model object Theirs, which ended with its Python session"):
        etude.resume(done.folder)


@pytest.mark.parametrize(
    ("model", "settings", "sentence"),
    [
        (torch.nn.Flatten(), {}, "source is a Flatten object, so say what to examine it on"),
        (torch.nn.Flatten(), {"data": "digits"}, r"returns \(2, 64\) for two images; digits needs logits \(2, 10\)"),
        (
            torch.nn.Linear(3, 10),
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
        etude.run("basics/mlp", source=torch.nn.Linear(2, 2))


def test_a_resumed_run_keeps_its_source(tmp_path: Path) -> None:
    """A newer run of the same method does not take the place of the one that an interrupted run began with."""
    first = etude.run("basics/mlp", **TINY, seed=1)
    common = Common(quiet=True, device="cpu", save_every=1)
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
