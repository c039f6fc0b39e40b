"""All six detectors on the same pictures: what they find, from how many regions, how fast and with how many weights.

    python benchmarks/detectors.py                   all → results/detection/detectors.json
    python benchmarks/detectors.py yolo overfeat     these again; the others stay as they are
    python benchmarks/detectors.py yolo=runs/RUN     from a run that is there already

Each has the settings it comes with (its default preset, seed 0): up to three digits on a canvas of 64 × 64 pixels, 3,000 canvases
to learn from and 600 to find digits in. The rate is pictures by CPU second of one thread, from pixels to boxes, selective search
and suppression included; the training is in CPU seconds too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "results/detection/detectors.json"
NAMES = ("sliding_window", "overfeat", "rcnn", "fast_rcnn", "faster_rcnn", "yolo")


def learn(name: str, folder: Path) -> tuple[Path, float]:
    """One run of the default preset, and its CPU seconds."""
    import etude

    start = time.process_time()
    done = etude.run(f"detection/{name}", seed=0, out=folder / "run", quiet=True, threads=1)
    return done.folder, time.process_time() - start


def row(name: str, folder: Path, seconds: float | None) -> dict[str, Any]:
    """The numbers of a run, its rate and its weights."""
    import etude
    from etude import catalog
    from etude.detection.parts.scenes import scenes

    loaded, x = etude.load(folder), scenes("digits", 64).test.x
    detect = catalog.load_method(catalog.find(f"detection/{name}")).detect
    model, rates = loaded.model.eval(), []
    with torch.no_grad():
        for part in (x[:32], x[32:96], x[96:160], x[160:224]):
            start = time.process_time()
            detect(loaded.config, model, part)
            rates.append(len(part) / (time.process_time() - start))
    told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    numbers = {key.removeprefix("test_"): value for key, value in told.items() if key.startswith("test_")}
    return numbers | {
        "pictures_a_second": round(sorted(rates[1:])[1], 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training_seconds": None if seconds is None else round(seconds),
    }


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for word in words or NAMES:
        name, _, given = word.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            run, seconds = (Path(given), None) if given else learn(name, Path(folder))
            found[name] = row(name, run, seconds)
        print(name, found[name], file=sys.stderr, flush=True)
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(
            json.dumps({key: found[key] for key in NAMES if key in found}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
