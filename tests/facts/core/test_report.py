"""The report of a run: complete, offline, safe against what a run may write, and right in its coordinates."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.report import Contract, render, tiles, words
from etude.core.report.charts import Axis, chart, smooth, thin, value_axis
from etude.core.report.headline import published_number
from etude.core.report.reading import Series as S
from etude.core.report.reading import read_metrics

SECTIONS = ["headline", "pictures", "curves", "run", "config", "contract", "next"]


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
    evil = "<script>alert(1)</script>\" onload=\"alert(2)' onclick='alert(3)&"
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


def test_the_clock_that_a_loop_logs_is_the_axis(run: Path) -> None:
    """Where a step of the loop is a round of several environment steps, curves are drawn over what --steps counts."""
    rows = [{"step": k, "env_steps": 32.0 * k, "loss": 1 / k} for k in range(1, 5)]
    rows += [{"step": 4, "env_steps": 128.0, "loss": 0.125}, {"step": 5, "score": 7.0}]  # logged after the loop
    write(run, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    series, damaged = read_metrics(run / "metrics.jsonl")
    assert damaged == 0
    assert [(s.name, s.clock) for s in series] == [("loss", "env_steps"), ("score", "env_steps")]
    np.testing.assert_array_equal(series[0].steps, [32, 64, 96, 128])
    np.testing.assert_array_equal(series[0].values, [1, 0.5, 1 / 3, 0.125])
    np.testing.assert_array_equal(series[1].steps, [128])
    (run / "done").unlink()
    shown = Page(render(run).read_text(encoding="utf-8"))
    assert "Over environment steps." in shown.text
    assert "environment step 128 of 200" in shown.text
    assert "10 s; 128 environment steps, 12.8 a second" in shown.text
    (svg,) = shown.all("svg")
    assert "loss: 1 at environment step 32, 0.1250 at environment step 128" in str(svg["aria-label"])
    assert svg["data-unit"] == "environment step"
    write(run, "metrics.jsonl", "".join(json.dumps({"step": k, "episodes": 10 * k, "x": k}) + "\n" for k in (1, 2)))
    assert "Over episodes." in Page(render(run).read_text(encoding="utf-8")).text


def test_torch_is_not_imported() -> None:
    code = "import sys, etude.core.report; assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


BAR = {
    "metric": "test_accuracy",
    "bar": 0.99,
    "better": "higher",
    "preset": "default",
    "published": "0.9905 (LeCun 1998)",
}


def headline(folder: Path, **changes: object) -> str:
    text = render(folder, Contract(bars=(BAR | changes,))).read_text(encoding="utf-8")
    return text[text.index('id="headline"') : text.index('id="curves"')]


def test_verdict_is_given_only_where_the_bar_applies(run: Path) -> None:
    flags = {"steps": 200}
    assert "✓ clears the bar" in headline(run, flags=flags)
    assert "✕ misses the bar" in headline(run, flags=flags, bar=0.9951)
    assert "✓ clears the bar" in headline(run, flags=flags, bar=0.995)
    assert "✕ misses the bar" in headline(run, flags=flags, better="lower")
    assert "✓ clears the bar" in headline(run, flags=flags, metric="test_loss", bar=0.02, better="lower")
    assert 'verdict miss">✕ clears the bar, but too slowly: 10 s of the 9.0 s allowed' in headline(
        run, flags=flags, within_seconds=9
    )
    assert 'verdict pass">✓ clears the bar, in 10 s of the 11 s allowed' in headline(
        run, flags=flags, within_seconds=11
    )
    for other in (headline(run), headline(run, preset="mnist", flags=flags), headline(run, flags={"steps": 100})):
        assert "this run used other settings and is not held against it" in other
        assert "verdict" not in other
        assert "gauge" not in other
    (run / "done").unlink()
    assert "no verdict yet" in headline(run, flags=flags)
    write(run, "result.json", '{"test_accuracy": NaN}')
    (run / "done").touch()
    assert "✕ misses the bar" in headline(run, flags=flags)


def test_gauge_places_bar_run_and_published_number(run: Path) -> None:
    text = headline(run, flags={"steps": 200})
    at = {
        kind: float(left) for kind, left in re.findall(r'<i class="(bar|here|published)" style="left:([\d.]+)%"', text)
    }
    scale = (at["here"] - at["bar"]) / (0.995 - 0.99)
    assert at["published"] == pytest.approx(at["bar"] + scale * (0.9905 - 0.99), abs=0.02)
    assert 0 < at["bar"] < at["published"] < at["here"] <= 100
    seeds = {"experiments": [{"name": None, "metric": "test_accuracy", "values": [0.991, None, 0.993]}]}
    text = render(run, Contract(bars=(BAR | {"flags": {"steps": 200}},), card=seeds)).read_text(encoding="utf-8")
    assert len(re.findall(r'<i class="seed" style', text)) == 2


@pytest.mark.parametrize(
    ("text", "limit", "value"),
    [
        ("0.9905 (LeCun 1998)", 0.98, 0.9905),
        ("99.05% (ours)", 0.98, 0.9905),
        ("≈ −1/18", -0.06, None),
        ("79.20 nats", 0.1, None),  # another scale
        ("none", 0.5, None),
        ("", 0.5, None),
        ("−0.05", -0.06, -0.05),
    ],
)
def test_published_number_is_drawn_only_on_the_scale_of_the_bar(text: str, limit: float, value: float | None) -> None:
    assert published_number(text, limit) == (None if value is None else pytest.approx(value))


def test_states_of_a_run(run: Path) -> None:
    (run / "done").unlink()
    shown = page(run)
    assert "◐ unfinished" in shown.text
    assert "step 200 of 200, last heard of 2 January 2026, 03:04" in shown.text
    assert "etude resume" in shown.text
    write(run, "failed", "the loss is NaN\nTraceback\n  File x")
    shown = page(run)
    assert "✕ failed" in shown.text
    assert "Why it failedthe loss is NaNTraceback" in shown.text
    assert "no verdict" not in shown.text


def test_curves_of_a_split_share_a_chart_and_all_charts_share_the_steps(run: Path) -> None:
    rows = [{"step": k, "loss": 1.0 * k} | ({"test_loss": 2.0 * k, "other": 1.0} if k > 5 else {}) for k in range(11)]
    write(run, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    charts = page(run).all("svg")
    assert len(charts) == 2
    assert {c["data-x"] for c in charts} == {"0.0 10.0"}
    assert any(
        "loss: 0 at step 0, 10 at step 10" in str(c["aria-label"]) and "test loss" in str(c["aria-label"])
        for c in charts
    )


def test_a_number_logged_once_is_no_curve(run: Path) -> None:
    before = len(page(run).all("svg"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "judge_accuracy": 0.97714, "final_norm": 3.25}) + "\n")
    write(run, "result.json", {"test_accuracy": 0.995, "final_norm": 3.25})
    shown = page(run)
    assert len(shown.all("svg")) == before
    assert "0.9771" in shown.text
    assert shown.text.count("final norm") == 1  # it is a result, and stands there already
    write(run, "metrics.jsonl", json.dumps({"step": 1, "loss": 0.5}) + "\n")
    assert len(page(run).all("svg")) == 1  # where nothing else has been logged yet, a dot is what there is to see


def test_what_is_not_finite_is_marked_and_does_not_stretch_the_axis() -> None:
    drawn = chart([S("loss", np.array([0.0, 1, 2, 4]), np.array([1.0, np.nan, 3.0, np.inf]))])
    assert 'class="bad" d="M250 1000V940"' in drawn
    assert 'class="bad" d="M1000 1000V940"' in drawn
    assert re.search(r'class="line s0" d="M0 [\d.]+L500 [\d.]+"', drawn)
    assert "no finite value" in chart([S("loss", np.array([0.0]), np.array([np.nan]))])
    assert 'data-y="-1.1 1.1"' in chart([S("x", np.arange(4.0), np.array([-1.0, 1e305, -1e305, 1.0]))])


def test_a_curve_over_many_decades_is_smoothed_where_it_is_drawn() -> None:
    """A running sum of the values themselves loses what is sixteen decades below the first."""
    values = 10.0 ** -np.linspace(0, 30, 400)
    drawn = chart([S("loss", np.arange(400.0), values)])
    thick = re.search(r'class="line s0" d="M([^"]+)"', drawn)
    assert thick
    y = [float(pair.split()[1]) for pair in thick[1].split("L")]
    assert np.diff(y).min() > 0  # falls to the end: y counts downwards
    assert y[-1] > 940
    assert "moving geometric mean" in drawn


def test_log_scale_only_for_what_falls_over_decades() -> None:
    values = np.array([1e-3, 1.0])
    assert value_axis("loss", values).log
    assert not value_axis("test_accuracy", values).log
    assert not value_axis("loss", np.array([0.0, 1.0])).log
    assert not value_axis("loss", np.array([0.02, 1.0])).log


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.2, 17.9), (1e-9, 2e-9), (0.99, 0.9905), (0, 1e12), (1, 1500)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    for count in (3, 4, 5):
        ticks = Axis(low, high).ticks(count)
        assert 2 <= len(ticks) <= count + 2
        assert all(low - 1e-9 * (high - low) <= t <= high + 1e-9 * (high - low) for t in ticks)
        steps = np.diff(ticks) / 10 ** np.floor(np.log10(np.diff(ticks)) + 1e-9)
        assert np.allclose(steps, steps[0])
        assert round(float(steps[0]), 6) in (1, 2, 5)


def test_artifacts_outside_the_folder_are_not_read(run: Path) -> None:
    secret = Image.new("L", (8, 8), 77)
    secret.save(run / "secret.png")
    secret.save(run.parent / "secret.png")
    names = ["../secret.png", str(run.parent / "secret.png"), "gone.png", "a\0b.png"]
    write(run, "artifacts/index.json", [{"file": name, "name": name, "step": None, "kind": "image"} for name in names])
    shown = page(run)
    assert shown.all("img") == []
    assert "Could not be read: artifacts/gone.png" in shown.text


def test_long_filmstrips_and_heavy_pictures_stay_light(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = []
    for step in range(50):
        Image.new("L", (8, 8), step).save(run / "artifacts" / f"f{step}.png")
        index.append({"file": f"f{step}.png", "name": "film", "step": step, "caption": "", "kind": "image"})
    write(run, "artifacts/index.json", index)
    shown = page(run)
    assert len(shown.all("img")) == 1 + tiles.FRAMES
    steps = [int(str(image["alt"]).rpartition(" ")[2]) for image in shown.all("img")]
    assert steps == [49, 0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 45, 49]
    noise = np.random.default_rng(0).integers(0, 256, (300, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise // 32 * 32).save(run / "artifacts/heavy.png")
    frames = [Image.new("L", (64, 64), 60 * k) for k in range(4)]
    frames[0].save(run / "artifacts/film.gif", save_all=True, append_images=frames[1:])
    write(
        run,
        "artifacts/index.json",
        [{"file": "heavy.png", "name": "a"}, {"file": "film.gif", "name": "b", "kind": "animation"}],
    )
    sources = [str(image["src"]) for image in page(run).all("img")]
    assert sources[0].startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2]))) as smaller:
        assert smaller.size == (1600, 200)
    assert base64.b64decode(sources[1].partition(",")[2]) == (run / "artifacts/film.gif").read_bytes()
    monkeypatch.setattr(tiles, "ANIMATION_BYTES", 10)
    assert "first frame" in page(run).text


def test_numbers_in_a_cell_are_as_short_as_one_alone() -> None:
    table = words.html_table(["", ""], [["list", [1 / 3, 1, 2e-7]], ["object", {"σ²": 1 / 9}], ["none", []]])
    assert "0.3333 · 1 · 2e−7" in table
    assert "σ² 0.1111" in table


@pytest.mark.parametrize(
    ("value", "head", "rows"),
    [
        ({"columns": ["a", "b"], "rows": [[1, 2]]}, ["a", "b"], [[1, 2]]),
        ([{"a": 1}, {"b": 2}], ["a", "b"], [[1, None], [None, 2]]),
        ({"x": {"a": 1}, "y": {"a": 2}}, ["", "a"], [["x", 1], ["y", 2]]),
        ({"a": [1, 2], "b": [3, 4]}, ["a", "b"], [[1, 3], [2, 4]]),
        ([[1, 2], [3, 4]], [], [[1, 2], [3, 4]]),
        ({"a": 1, "b": "two"}, ["", ""], [["a", 1], ["b", "two"]]),
    ],
)
def test_json_values_as_tables(value: object, head: list[str], rows: list[list[object]]) -> None:
    assert tiles.as_table(value) == (head, rows)


def test_values_that_are_no_table() -> None:
    for value in (3, "text", [], {}, [1, 2], {"a": [1], "b": [2, 3]}):
        assert tiles.as_table(value) is None


def test_the_old_page_stays_until_the_new_one_is_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = render(run).read_bytes()
    (run / "other.html").hardlink_to(run / "report.html")
    write(run, "failed", "now it failed")
    assert render(run).read_bytes() != before
    assert (run / "other.html").read_bytes() == before  # replaced, not written over
    before = (run / "report.html").read_bytes()

    def full(self: Path, *_: object, **__: object) -> None:
        self.write_bytes(b"half")
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        render(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))


def test_the_one_script_is_the_one_the_policy_allows(run: Path) -> None:
    text = render(run).read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "unsafe-inline" not in text.partition("script-src")[2].partition('"')[0]


def test_damaged_files_never_stop_the_report(run: Path) -> None:
    """Replace random parts of every JSON file by random values; the page still comes, whole."""
    source = random.Random(0)
    junk = [
        None,
        True,
        -1,
        0,
        1e308,
        "x",
        "",
        [],
        {},
        [1],
        {"a": 1},
        [[]],
        [None],
        "\0",
        "<b>",
        float("nan"),
        float("inf"),
        "../..",
    ]
    names = ["config.json", "environment.json", "result.json", "spec.json", "artifacts/index.json"]
    whole = {name: json.loads((run / name).read_text()) for name in names}

    def spoil(value: object) -> object:
        if source.random() < 0.12:
            return source.choice(junk)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    for _ in range(60):
        for name in names:
            write(run, name, spoil(whole[name]))
        card: object = spoil({"experiments": [{"name": "a", "values": [1, 2], "mean": 1.5, "bar": 1, "passed": True}]})
        contract = Contract(bars=(BAR | {"name": "a", "within_seconds": 3},), card=card)  # type: ignore[arg-type]
        assert [a["id"] for a in page(run, contract).all("section")] == SECTIONS
    for name in names:
        write(run, name, "{ half")
    assert all(f"Could not be read: {name}." in page(run).text for name in names)


def test_what_was_trained_on_is_said(tmp_path: Path) -> None:
    """Counts by split and class, parameters and source: from about.json, which a run writes before its first step."""
    import etude

    folder = etude.run("vision/lenet", preset="tiny", steps=2, out=tmp_path / "run", quiet=True, threads=1).folder
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    assert about["parameters"] == {"model": 61_706}
    splits = about["data"]["splits"]
    assert {name: part["images"] for name, part in splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    assert all(sum(part["by class"].values()) == part["images"] for part in splits.values())
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "1,293 train, 144 validation, 360 test" in page
    assert "61,706" in page
