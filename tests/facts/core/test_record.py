"""What a run leaves behind: rows that are whole and finite, artifacts with their index, marks that tell the truth."""

from __future__ import annotations

import json

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.record import Record, read_metrics


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_appended_and_cut_to_what_the_checkpoint_knows(tmp_path) -> None:
    record = Record(tmp_path)
    record.open(0, "cpu")
    record.metrics([(1, {"loss": 2.0}), (2, {"loss": 0.1})])
    record.metrics([])
    record.metrics([(2, {"after": 1e-300})])
    assert record.rows == 3
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.1}, {"step": 2, "after": 1e-300}]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed in the middle of a line
    assert read_metrics(tmp_path) == rows_of_whole_lines(tmp_path)
    resumed = Record(tmp_path)
    resumed.rows = 2
    resumed.open(2, "cpu")
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.1}]
    fresh = Record(tmp_path)
    fresh.open(0, "cpu")  # resumed without any checkpoint
    assert rows(tmp_path) == []


def rows_of_whole_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]


def test_sessions_and_marks(tmp_path) -> None:
    record = Record(tmp_path)
    record.open(0, "cpu")
    record.threads = 2  # a method may choose anew once it knows its network
    record.beat(7)
    record.failed("disk full\nTraceback …\n")
    assert (tmp_path / "failed").read_text().splitlines()[0] == "disk full"
    again = Record(tmp_path)
    again.open(5, "cuda")
    assert not (tmp_path / "failed").exists()
    again.beat(9)
    again.result({"a": 1.0})
    again.done()
    kept = json.loads((tmp_path / "environment.json").read_text())
    assert [(s["from_step"], s["to_step"], s["device"], s["threads"]) for s in kept["sessions"]] == [
        (0, 7, "cpu", 2),
        (5, 9, "cuda", 1),
    ]
    assert {"torch", "python", "numpy"} <= kept["versions"].keys()
    assert all(session["seconds"] >= 0 and session["peak_memory_mb"] > 1 for session in kept["sessions"])
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1.0}
    assert (tmp_path / "done").is_file()


def test_other_ranks_write_nothing(tmp_path) -> None:
    record = Record(tmp_path, writes=False)
    record.open(0, "cpu")
    record.metrics([(1, {"loss": 2.0})])
    record.beat(1)
    record.result({"a": 1.0})
    record.failed("x")
    record.done()
    assert list(tmp_path.iterdir()) == []
    assert record.rows == 1  # its checkpoint counts as rank 0's does


def picture(folder, entry) -> np.ndarray:
    with Image.open(folder / "artifacts" / entry["file"]) as image:
        return np.asarray(image)


def test_artifacts_and_their_index(tmp_path) -> None:
    record = Record(tmp_path)
    figure = matplotlib.figure.Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1])
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colour = torch.rand(3, 5, 7)
    given = {
        "figure": (figure, "image", "png"),
        "grey": (grey, "image", "png"),
        "one": (torch.from_numpy(grey)[None].float() / 255, "image", "png"),
        "colour": (colour, "image", "png"),
        "pil": (Image.new("RGB", (4, 2), "red"), "image", "png"),
        "moving": ([grey, grey[::-1].copy()], "animation", "gif"),
        "table": ({"a": [1, 2]}, "table", "json"),
        "text": ("some\ntext", "text", "txt"),
    }
    for name, (thing, _, _) in given.items():
        record.artifact(name, thing, caption=f"caption of {name}")
    index = json.loads((tmp_path / "artifacts" / "index.json").read_text())
    assert [(e["name"], e["file"], e["kind"], e["caption"], e["step"]) for e in index] == [
        (name, f"{name}.{ending}", kind, f"caption of {name}", None) for name, (_, kind, ending) in given.items()
    ]
    found = {entry["name"]: entry for entry in index}
    assert np.array_equal(picture(tmp_path, found["grey"]), grey)
    assert np.array_equal(picture(tmp_path, found["one"]), grey)
    assert np.array_equal(picture(tmp_path, found["colour"]), (colour.permute(1, 2, 0) * 255 + 0.5).byte().numpy())
    assert picture(tmp_path, found["figure"]).shape[2] in (3, 4)
    with Image.open(tmp_path / "artifacts" / "moving.gif") as moving:
        assert moving.n_frames == 2  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "artifacts" / "table.json").read_text()) == {"a": [1, 2]}
    # a filmstrip, and a picture drawn again after a resume
    for step in (100, 200, 100, 200):
        record.artifact("strip", grey, step=step)
    index = json.loads((tmp_path / "artifacts" / "index.json").read_text())
    assert [(e["file"], e["step"]) for e in index[len(given) :]] == [
        ("strip-0000100.png", 100),
        ("strip-0000200.png", 200),
    ]


def test_tensorboard_reads_the_rows(tmp_path) -> None:
    tensorboard = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra 'track' is not installed"
    )
    from etude.core.record import to_tensorboard

    record = Record(tmp_path)
    record.metrics([(1, {"loss": 2.0}), (5, {"loss": 0.5})])
    events = tensorboard.EventAccumulator(str(to_tensorboard(tmp_path)))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (5, 0.5)]


@pytest.mark.parametrize("text", ["\N{GIRL}", "\N{DEVANAGARI LETTER A}"])
def test_letters_that_the_font_lacks_are_drawn_without_a_word(text, tmp_path) -> None:
    figure = matplotlib.figure.Figure()
    figure.text(0.5, 0.5, text)
    Record(tmp_path).artifact("letters", figure)  # a warning would be an error here
    assert list((tmp_path / "artifacts").glob("letters*.png"))
