"""The report of a run: complete, offline, safe against what a run may write, and right in its coordinates."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.report import Axis, Contract, chart, read_metrics, render, smooth, thin
from etude.core.report import Series as S

SECTIONS = ["headline", "curves", "pictures", "run", "config", "contract", "next"]


def write(folder: Path, name: str, value: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a test asks about."""

    VOID = {"meta", "img", "path", "br"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of a classifier."""
    folder = tmp_path / "run"
    config = {"steps": 200, "learning_rate": 0.1, "channels": [6, 16], "data": "digits"}
    described = {
        "method": "vision/lenet",
        "preset": "default",
        "seed": 4,
        "config": config,
        "common": {"device": "cpu"},
    }
    write(
        folder,
        "config.json",
        described | {"command": "etude run vision/lenet", "default_config": config | {"steps": 100}},
    )
    session = {"started": "2026-01-02T03:04:05", "ended": "2026-01-02T03:04:15", "from_step": 0, "to_step": 200}
    session |= {"seconds": 10.0, "peak_memory_mb": 321.0, "device": "cpu", "threads": 1}
    environment = {"started": "2026-01-02T03:04:05", "sessions": [session], "versions": {"torch": "2.13.0"}}
    write(folder, "environment.json", environment | {"hardware": {"cpu": "a fine one"}, "commit": "abc123"})
    rows = [{"step": k, "loss": 2 / k} | ({"test_accuracy": 1 - 1 / k} if k % 50 == 0 else {}) for k in range(1, 201)]
    write(folder, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder, "result.json", {"test_accuracy": 0.995, "test_loss": 0.0123})
    write(folder, "spec.json", {"shape": [1, 8, 8], "classes": ["0", "1"]})
    write(folder, "done", "")
    artifacts = [{"file": "a.png", "name": "confusion", "step": None, "caption": "Counts.", "kind": "image"}]
    artifacts += [{"file": "t.txt", "name": "sample", "step": 7, "caption": "", "kind": "text"}]
    artifacts += [{"file": "d.json", "name": "scores", "step": None, "caption": "", "kind": "table"}]
    for step in (1, 2, 3):
        artifacts.append({"file": f"s{step}.png", "name": "samples", "step": step, "caption": "", "kind": "image"})
    write(folder, "artifacts/index.json", artifacts)
    write(folder, "artifacts/t.txt", "To be, or\nnot to be")
    write(folder, "artifacts/d.json", {"columns": ["class", "recall"], "rows": [["cat", 0.25], ["dog", 1]]})
    for i, name in enumerate(("a", "s1", "s2", "s3")):
        Image.new("L", (8, 8), 60 * i).save(folder / "artifacts" / f"{name}.png")
    return folder


CONTRACT = Contract(
    title="A net that reads digits",
    paper="LeCun et al., 1998, arXiv:1234.56789",
    equation="y = f(x)",
    differences="- ReLU\n- Adam",
    fields=(("steps", "How long."),),
    bars=({"metric": "test_accuracy", "bar": 0.985, "better": "higher", "published": "0.9905 (LeCun 1998)"},),
)


def page(folder: Path, contract: Contract | None = None) -> Page:
    return Page(render(folder, contract).read_text(encoding="utf-8"))


def test_every_section_is_there_and_filled(run: Path) -> None:
    shown = page(run, CONTRACT)
    assert [a["id"] for a in shown.all("section")] == SECTIONS
    for fact in (
        "A net that reads digits",
        "✓ done",
        "0.9950",
        "✓ clears the bar",
        "bar ≥ 0.985",
        "etude run vision/lenet",
    ):
        assert fact in shown.text
    for fact in ("10 s; 200 steps, 20 a second", "321 MB", "torch 2.13.0", "abc123", "How long.", "y = f(x)"):
        assert fact in shown.text
    assert "To be, or\nnot to be" in shown.text
    assert "preset: 100" in shown.text
    assert "1 differs from the preset" in shown.text
    assert len(shown.all("img")) == 1 + 1 + 3  # a picture; the last frame large, and all three small
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in shown.all("img"))  # type: ignore[union-attr]


def test_nothing_is_loaded_from_outside(run: Path) -> None:
    text = render(run, CONTRACT).read_text(encoding="utf-8")
    shown = Page(text)
    for tag, attributes in shown.tags:
        for name in ("src", "srcset", "poster", "data", "background"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
        if tag != "a":
            assert "href" not in attributes
    assert not shown.all("link")
    assert "@import" not in text
    assert "url(" not in text
    policy = next(a["content"] for a in shown.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_what_a_run_writes_is_only_ever_text(run: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    index = json.loads((run / "artifacts/index.json").read_text())
    write(run, "artifacts/index.json", [a | {"caption": evil, "name": a["name"] + evil} for a in index])
    write(run, "artifacts/t.txt", evil)
    write(run, "artifacts/d.json", [{evil: evil}])
    described = json.loads((run / "config.json").read_text())
    described |= {"method": evil, "preset": evil, "command": evil, "config": {evil: evil}}
    write(run, "config.json", described)
    write(run, "metrics.jsonl", json.dumps({"step": 1, evil: 2.0}) + "\n")
    write(run, "result.json", {evil: 1.0})
    write(
        run, "environment.json", {"versions": {evil: evil}, "commit": evil, "started": evil, "hardware": {evil: evil}}
    )
    (run / "done").unlink()
    write(run, "failed", evil)
    hostile = Contract(
        evil, evil, evil, evil, evil, evil, evil, evil, ((evil, evil),), ({"metric": evil, "bar": 1},), {"a": evil}
    )
    shown = page(run, hostile)
    assert len(shown.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    assert "alert(1)" in shown.text


def test_folder_with_only_a_config(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"method": "meta/maml", "config": {"steps": 3}})
    shown = page(tmp_path)
    assert [a["id"] for a in shown.all("section")] == SECTIONS
    assert "● running" in shown.text
    assert "Nothing has been logged yet." in shown.text
    assert "step 0 of 3" in shown.text


def test_empty_folder_and_no_folder(tmp_path: Path) -> None:
    assert [a["id"] for a in page(tmp_path).all("section")] == SECTIONS
    with pytest.raises(FileNotFoundError):
        render(tmp_path / "none")


def test_axis_and_svg_coordinates() -> None:
    axis = Axis(0.0, 10.0)
    assert axis.place(2.5) == 0.25
    assert axis.ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Axis(1e-3, 1e3, log=True).place(1.0) == pytest.approx(0.5)
    assert Axis(0.5, 2e3, log=True).ticks(4) == [1, 10, 100, 1000]
    drawn = chart([S("height", np.array([0.0, 5.0, 10.0]), np.array([-20.0, 0.0, 20.0]))])
    line = re.search(r'class="line s0" d="([^"]+)"', drawn)
    # the vertical axis has 5 % of the range as room at both ends: -22 … 22, so -20 lies at 1000·(1 − 2/44)
    assert line is not None
    assert line[1] == "M0 954.55L500 500L1000 45.45"


def test_thinning_keeps_a_single_spike_and_both_ends() -> None:
    steps, values = np.arange(1e5), np.sin(np.arange(1e5) / 1e4)
    values[54_321] = 99.0
    values[12_345] = -99.0
    x, y = thin(steps, values)
    assert len(x) <= 1000
    assert (np.diff(x) > 0).all()
    assert {(54_321, 99.0), (12_345, -99.0)} <= set(zip(x, y))
    assert (x[0], y[0], x[-1], y[-1]) == (0, values[0], 99_999, values[-1])


def test_smoothing_is_the_centred_mean() -> None:
    values = np.random.default_rng(0).normal(size=500)
    mean, width = smooth(values)
    half = width // 2
    for i in (0, 1, 250, 497, 499):
        reach = min(half, i)
        assert mean[i] == pytest.approx(values[i - reach : i + reach + 1].mean())


def test_metrics_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0, "note": "text"}\n{"step": 2, "loss": NaN, "score": 1}\n{"step": 3, "loss": 1.0}\n'
        "rubbish\n"
        '{"step": 2, "loss": 1.5}\n{"step": 3, "loss": null}\n{"step": 4, "lo',
        encoding="utf-8",
    )
    series, damaged = read_metrics(path)
    assert damaged == 1  # the unfinished last line of a running job is not damage
    assert [s.name for s in series] == ["loss", "score"]
    np.testing.assert_array_equal(series[0].steps, [1, 2, 3])
    np.testing.assert_array_equal(series[0].values, [2.0, 1.5, np.nan])


def test_torch_is_not_imported() -> None:
    code = "import sys, etude.core.report; assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
