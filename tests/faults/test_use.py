"""Using what was trained: predict on the user's own pictures, generate, sample; each says what it offers instead."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import etude as package
from etude import data
from etude.core.errors import UserError
from etude.core.loaded import Loaded, Sampled
from etude.core.spec import Spec


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Loaded:
    """LeNet on the bundled digits, trained long enough to tell them apart."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    package.run("vision/lenet", steps=60, batch=64, quiet=True, out=folder, device="cpu")
    return package.load(folder)


def answer(loaded: Loaded, x: torch.Tensor) -> list[dict[str, float]]:
    """What the network itself says of uint8 pixels."""
    with torch.no_grad():
        rows = loaded.model(x).softmax(1).tolist()
    return [dict(zip(loaded.spec.classes, row)) for row in rows]


def near(found: list, expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for one, probabilities in zip(found, expected):
        assert one["probabilities"] == pytest.approx(probabilities, abs=1e-6)
        best = max(probabilities, key=probabilities.__getitem__)
        assert (one["class"], one["probability"]) == (best, pytest.approx(probabilities[best], abs=1e-6))
        assert list(probabilities)[one["label"]] == best


def test_files_arrays_and_tensors_are_one_thing(digits, tmp_path) -> None:
    x = data.images("digits", 28).test.x[:6]
    expected = answer(digits, x)
    assert len({max(row, key=row.__getitem__) for row in expected}) > 3  # it tells them apart
    for index, picture in enumerate(x):
        Image.fromarray(picture[0].numpy()).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    near(digits.predict(tmp_path), expected)
    near(digits.predict([tmp_path / f"{index}.png" for index in range(6)]), expected)
    assert [one["file"] for one in digits.predict(tmp_path)] == [str(tmp_path / f"{index}.png") for index in range(6)]
    near(digits.predict(str(tmp_path / "2.png")), expected[2:3])
    for given in (
        x,
        x.numpy(),
        x.float() / 255,
        x.double().numpy() / 255,
        x[:, 0],
        x.movedim(1, 3),
        x.int(),
        x.long().numpy(),
    ):
        near(digits.predict(given), expected)
    for given in (x[0], x[0, 0], x[0].movedim(0, 2)):
        near(digits.predict(given), expected[:1])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            torch.full((1, 28, 28), 200.0),
            "floating pixels lie between 0 and 1, and these go from 200 to 200; divide them by 255",
        ),
        (torch.full((1, 28, 28), -0.5), "are finite and lie between 0 and 1, and these go from -0.5 to -0.5"),
        (np.full((28, 28), np.nan), "are finite and lie between 0 and 1"),
        (torch.full((28, 28), 256), "whole pixels lie between 0 and 255, and these go from 256 to 256"),
        (torch.zeros(1, 27, 28), r"takes pictures of 1 × 28 × 28 .* the array given has shape \(1, 27, 28\)"),
        (torch.zeros(2, 3, 28, 28), "takes pictures of 1 × 28 × 28"),
        (torch.zeros(0, 1, 28, 28), "takes pictures of 1 × 28 × 28"),
        ("nowhere.png", "The image nowhere.png does not exist"),
        ([], "name at least one picture"),
    ],
)
def test_what_is_misread_elsewhere_is_refused(digits, given, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        digits.predict(given)


def test_the_run_brings_its_own_preprocessing(tmp_path) -> None:
    """Trained on coloured photographs of many sizes: files are cut, resized, turned and coloured alike."""
    generator = np.random.default_rng(0)
    for colour, name in enumerate(("red", "green", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for count in range(8):
            pixels = generator.integers(0, 90, (40 + count, 36, 3), dtype=np.uint8)
            pixels[..., colour] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{count}.png")
    done = package.run(
        "vision/lenet", data=str(tmp_path / "photos"), steps=30, batch=8, quiet=True, out=tmp_path / "run"
    )
    loaded = package.load(done.folder)
    assert loaded.spec.shape == (3, 28, 28)
    split = data.images(tmp_path / "photos", 28).train
    everything = sorted((tmp_path / "photos").rglob("*.png"))
    found = {tuple(np.round([*one["probabilities"].values()], 5)) for one in loaded.predict(everything)}
    for row in answer(loaded, split.x):  # the very pixels it was trained on
        assert tuple(np.round([*row.values()], 5)) in found
    assert all(one["class"] == Path(one["file"]).parent.name for one in loaded.predict(everything))
    Image.fromarray(np.full((50, 50), 77, np.uint8)).save(tmp_path / "grey.png")
    grey = torch.full((1, 3, 28, 28), 77, dtype=torch.uint8)
    near(loaded.predict(tmp_path / "grey.png"), answer(loaded, grey))
    turned = Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8))
    camera = Image.Exif()
    camera[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=camera)
    upright = torch.from_numpy(np.asarray(turned.transpose(Image.Transpose.ROTATE_270)).copy()).movedim(2, 0)[None]
    near(loaded.predict(tmp_path / "turned.png"), answer(loaded, upright))
    with pytest.raises(UserError, match="is 50×50 pixels, and the network takes 30×20"):
        replace(loaded, spec=replace(loaded.spec, shape=(3, 20, 30))).predict(tmp_path / "grey.png")


def test_a_negative_is_noted(digits) -> None:
    x = data.images("digits", 28).test.x[0]
    assert digits.predict(x)[0]["note"] == ""
    assert "it is dark on light, and the training images were light on dark" in digits.predict(255 - x)[0]["note"]


def test_the_command(etude, digits, tmp_path) -> None:
    x = data.images("digits", 28).test.x[:2]
    for index, picture in enumerate(x):
        Image.fromarray(picture[0].numpy()).save(tmp_path / f"[{index}].png")
    Image.fromarray(255 - x[0, 0].numpy()).save(tmp_path / "negative.png")
    done = etude("predict", digits.folder, "[0].png", "[1].png", "--json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out)
    near(rows, answer(digits, x))
    assert [row["file"] for row in rows] == ["[0].png", "[1].png"]
    assert {"file", "class", "probability"} <= rows[0].keys()
    done = etude("predict", digits.folder, ".")
    assert done.code == 0
    assert done.err.startswith("negative.png: it is dark on light")
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["[0].png", "[1].png", "negative.png"]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    assert "broken.png cannot be read" in etude.refused("predict", digits.folder, "broken.png")
    assert "the following arguments are required: file" in etude.refused("predict", digits.folder)
    assert etude("run", etude.piece, "--quiet", "--steps", "2").code == 0
    said = etude.refused("predict", "latest", "[0].png")
    assert said.startswith(
        "mine/piece is no classifier of images, so it predicts nothing; see its results with: etude show"
    )


@dataclass(frozen=True)
class Options:
    count: int = 3
    samples: int = 1


def generate(loaded: Loaded, prompts: list[str], options: Options) -> list[str]:
    return [prompt + "x" * options.count for prompt in prompts for _ in range(options.samples)]


def sample(loaded: Loaded, options: Options, folder: Path) -> str:
    (folder / "drawn.txt").write_text("x" * options.count)
    return f"{options.count} drawn"


@dataclass(frozen=True)
class Translation:
    text: str = ""


def test_generate_and_sample(digits, tmp_path) -> None:
    for verb, says in (
        (digits.generate, "writes no text; it names pictures: etude predict"),
        (digits.sample, "learns no distribution"),
    ):
        with pytest.raises(UserError, match=f"vision/lenet {says}"):
            verb()
    method = types.SimpleNamespace(generate=generate, sample=sample, Sample=Options, __name__=generate.__module__)
    writer = Loaded("room/writer", None, Spec(), {}, tmp_path, 7, {}, method)  # type: ignore[arg-type]
    assert writer.generate("a") == "axxx"
    assert writer.generate(["a", "b"], count=1, samples=2) == ["ax", "ax", "bx", "bx"]
    with pytest.raises(UserError, match="has no setting 'cont'; did you mean 'count'"):
        writer.generate("a", cont=1)
    drawn = writer.sample(count=2)
    assert drawn == Sampled(tmp_path / "samples", "2 drawn", [tmp_path / "samples" / "drawn.txt"])
    with pytest.raises(
        UserError, match="room/writer is no classifier of images, so it predicts nothing; it writes text"
    ):
        writer.predict("x.png")
    assert writer.offers.endswith("--prompt …, or loaded.generate(prompt)")
    method.Sample = Translation
    assert writer.offers.endswith("--text …, or loaded.generate(text)")


def test_sample_in_python_is_the_command(etude, tmp_path, monkeypatch) -> None:
    assert etude("run", "language/gpt", "--preset", "tiny", "--quiet", "--steps", "2", "--out", "run").code == 0
    monkeypatch.chdir(tmp_path)
    drawn = package.sample("run", count=12, out="by python")
    assert etude("sample", "run", "--count", "12").code == 0
    assert [file.name for file in drawn.files] == ["sample.txt"]
    assert drawn.files[0].read_text() == Path("run/samples/sample.txt").read_text()
    assert package.sample(package.load("run"), count=12, out="again").files[0].read_text() == drawn.files[0].read_text()
    with pytest.raises(UserError, match="has no setting 'cuont'; did you mean 'count'"):
        package.sample("run", cuont=3)
