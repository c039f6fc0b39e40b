"""A trained classifier taken elsewhere: a torch.export program and ONNX, with its preprocessing inside, checked equal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from etude import catalog
from etude.core.checkpoint import write_text
from etude.core.errors import RunError, UserError
from etude.core.extras import how
from etude.core.loaded import Loaded
from etude.core.predict import classes_of

CLOSE = 1e-4
"""Largest difference of a probability between the network and what was written."""


class Exported(TypedDict):
    """What was written: folder, file names, what goes in, what comes out, and the largest difference found."""

    folder: str
    files: list[str]
    shape: list[int]
    classes: list[str]
    difference: dict[str, float]


class Classifier(nn.Module):
    """Pixels (N, C, H, W), floating in [0, 1], to probabilities (N, K): what `predict` does, without decoding files."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).softmax(1)


def export(loaded: Loaded, out: Path | None = None) -> Exported:
    """Write ``model.pt2``, ``model.onnx`` and ``model.json`` into `out` (``export/`` of the run folder).

    Each file is read back and held against the network on random pixels. Raises UserError for a run that holds no
    classifier of images and where the packages for ONNX are missing, RunError if a file answers differently.
    """
    classes = classes_of(loaded)
    if not catalog.extra_installed("export"):
        raise UserError(f"ONNX needs packages that are not installed; run: {how('export')}")
    folder = out or loaded.folder / "export"
    folder.mkdir(parents=True, exist_ok=True)
    network = Classifier(loaded.model).eval()
    some = torch.rand(3, *loaded.spec.shape, generator=torch.Generator().manual_seed(0))
    other = torch.rand(5, *loaded.spec.shape, generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad(), _silent():
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(network, (some,), dynamic_shapes={"pixels": {0: batch}})
            torch.export.save(program, folder / "model.pt2")
            again = torch.export.load(folder / "model.pt2").module()
            differences = {"model.pt2": _difference(network(other), again(other))}
            program = torch.onnx.export(
                network, (some,), dynamo=True, dynamic_shapes={"pixels": {0: batch}},
                input_names=["pixels"], output_names=["probabilities"], verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(folder / "model.onnx"))
            differences["model.onnx"] = _difference(network(other), _by_onnx(folder / "model.onnx", other))
    except (OSError, UserError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise RunError(f"{loaded.name} cannot be exported ({type(error).__name__}: {said})") from error
    for file, difference in differences.items():
        if not difference <= CLOSE:
            raise RunError(f"{folder / file} answers differently from the network (by {difference:.1e})")
    about: dict[str, Any] = {
        "method": loaded.name,
        "step": loaded.step,
        "input": {"name": "pixels", "shape": ["batch", *loaded.spec.shape], "dtype": "float32", "range": [0, 1]},
        "output": {"name": "probabilities", "shape": ["batch", len(classes)]},
        "classes": list(classes),
        "difference": differences,
    }
    write_text(folder / "model.json", json.dumps(about, indent=1) + "\n")
    files = sorted(path.name for path in folder.iterdir() if path.name.startswith("model."))
    return {
        "folder": str(folder),
        "files": files,
        "shape": list(loaded.spec.shape),
        "classes": list(classes),
        "difference": differences,
    }


def _difference(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max())


def _by_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporters talk of their own deprecations and of rewrites that concern nobody here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
