"""What the shared ground costs: our loop against a hand-written one, Lightning's Trainer and the Hugging Face Trainer.

Overhead is what a trainer adds to a step: its seconds a step minus those of the plain loop, which is timed beside
it in every pair. The bars are house rules: at most 2 % of a LeNet step at batch 128 with logging every step, at most 20 µs a
step on a tiny network, and whole steps at least 3x and 5x faster than the two trainers there: once with each side as it
comes, with its own display of progress, which goes to a file, and once with all of them silent.

All sides train the same network from the same weights on the same batches with fused Adam, and log the loss at every
step; final weights are compared bit for bit. Ours guards loss and gradients against NaN, reseeds the generators of every
step, and writes its checkpoint; the trainers write none.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude.core.run import Common, Run
from etude.optim.adam import Adam
from etude.optim.flat import flatten
from etude.vision.lenet import LeNet
from race import race, report

Step = tuple[nn.Module, list[tuple[Tensor, Tensor]]]


def tiny() -> Step:
    """An MLP 4-64-64-2 and batches of 32: nothing but dispatches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    return model, [(torch.randn(32, 4), torch.randint(2, (32,))) for _ in range(8)]


def lenet() -> Step:
    """LeNet and batches of 128 images of 28×28."""
    torch.manual_seed(0)
    return LeNet(10), [(torch.rand(128, 1, 28, 28), torch.randint(10, (128,))) for _ in range(4)]


def plain(problem: Callable[[], Step], segment: int) -> Iterator[tuple[float, nn.Module]]:
    """The loop anyone writes by hand: after every `segment` steps (seconds a step, network)."""
    model, batches = problem()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    while True:
        losses = []
        began = time.perf_counter()
        for step in range(segment):
            x, y = batches[step % len(batches)]
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        yield (time.perf_counter() - began) / segment, model


def ours(
    problem: Callable[[], Step], segment: int, total: int = 10**9, vector: bool = False, display: bool = False
) -> Iterator[tuple[float, nn.Module]]:
    """The same loop on `Run`, everything on: log, guard, clock, and a checkpoint at the end of `total` steps.

    With `vector` as a small network is trained here: parameters in one flat vector, etude's Adam; the same arithmetic.
    """
    model, batches = problem()
    optimizer = Adam([flatten(model)], 1e-3) if vector else torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Run("benchmark", None, Common(quiet=not display), Path(folder))
        run.record.open(0, "cpu")
        run.track(model=model, optimizer=optimizer)
        began = time.perf_counter()
        for step in run.steps(total):
            x, y = batches[step % len(batches)]
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            run.average(model, loss=loss)
            optimizer.step()
            run.log(loss=loss)
            if (step + 1) % segment == 0 and step + 1 < total:
                yield (time.perf_counter() - began) / segment, model
                began = time.perf_counter()
        yield (time.perf_counter() - began) / segment, model


def whole(steps: int, vector: bool = False, display: bool = False) -> tuple[float, nn.Module]:
    """`ours` on the tiny network from first step to checkpoint."""
    return next(ours(tiny, steps, steps, vector, display))


def overhead(
    name: str, problem: Callable[[], Step], segment: int, bar: float, vector: bool = False, segments: int = 80
) -> dict[str, object]:
    """Our step against the plain one, alternating every `segment` steps, so both see the same state of the machine.

    The row carries `overhead_us_per_step`: the median over pairs of neighbouring segments of the difference.
    """
    plain_loop, our_loop = plain(problem, segment), ours(problem, segment, vector=vector)
    pairs = [(next(plain_loop)[0], next(our_loop)[0]) for _ in range(segments)][4:]
    same = f"weights bit-identical: {_same(next(plain(problem, 20))[1], next(ours(problem, 20, vector=vector))[1])}"
    ratios = sorted(theirs / mine for theirs, mine in pairs)
    row = {
        "name": name,
        "peer": "plain PyTorch loop",
        "peer_version": torch.__version__,
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[len(ratios) // 4], 3),  # quartiles: single segments are short
        "high": round(ratios[-len(ratios) // 4], 3),
        "bar": bar,
        "equal": same,
        "ours_seconds": statistics.median(mine for _, mine in pairs),
        "peer_seconds": statistics.median(theirs for theirs, _ in pairs),
        "overhead_us_per_step": round(1e6 * statistics.median(mine - theirs for theirs, mine in pairs), 1),
    }
    print(
        f"{name:<40} {row['ratio']:.3f}x  overhead {row['overhead_us_per_step']} µs a step", file=sys.stderr, flush=True
    )
    return row


def lightning(steps: int, display: bool = False) -> tuple[float, nn.Module]:
    """Lightning's Trainer on the tiny network with logging every step."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model, batches = tiny()
    data = [batches[step % len(batches)] for step in range(steps)]

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.net.parameters(), 1e-3, fused=True)

        def on_train_start(self) -> None:
            self.began = time.perf_counter()

        def on_train_end(self) -> None:
            self.seconds = time.perf_counter() - self.began

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = Task()
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=1, enable_progress_bar=display,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=None, shuffle=False))
    return task.seconds / steps, model


def hugging_face(steps: int, display: bool = False) -> tuple[float, nn.Module]:
    """The Hugging Face Trainer on the tiny network with logging every step."""
    import transformers

    transformers.logging.set_verbosity_error()
    model, batches = tiny()
    size = len(batches[0][0])
    rows = [{"x": x, "labels": y} for step in range(steps) for x, y in zip(*batches[step % len(batches)])]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, *_: object, **__: object) -> None:
            self.seconds = time.perf_counter() - self.began

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:  # the batches of the other loops
            return torch.utils.data.SequentialSampler(rows)

    clock = Clock()
    wrapped = Wrapped()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = transformers.TrainingArguments(
            folder, per_device_train_batch_size=size, max_steps=steps, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=not display, use_cpu=True, max_grad_norm=0.0, lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        adam = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        trainer = InOrder(wrapped, options, train_dataset=rows, optimizers=(adam, None), callbacks=[clock])
        if not display:
            trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.seconds / steps, model


def _same(*models: nn.Module) -> bool:
    first = models[0].state_dict()
    return all(torch.equal(first[name], value) for other in models[1:] for name, value in other.state_dict().items())


def shown(side: Callable[[], float]) -> Callable[[], float]:
    """`side` with everything it prints, from Python or below, in a file."""

    def muted() -> float:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(number) for number in (1, 2)]
        with tempfile.TemporaryFile() as file:
            try:
                for number in (1, 2):
                    os.dup2(file.fileno(), number)
                return side()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for number, before in zip((1, 2), kept):
                    os.dup2(before, number)
                    os.close(before)

    return muted


def rows() -> list[dict[str, object]]:
    """Whole-step ratios against the trainers, and our own overhead against the plain loop."""
    import lightning as lightning_package
    import transformers

    torch.set_num_threads(1)
    trained = [next(plain(tiny, 64)), whole(64), whole(64, vector=True), lightning(64), hugging_face(64)]
    equal = f"final weights after 64 steps bit-identical: {_same(*(copy.deepcopy(model) for _, model in trained))}"
    table = []
    for name, display in (("tiny MLP, whole step, progress shown", True), ("tiny MLP, whole step, silent", False)):
        for peer, side, number, bar in (
            ("Lightning Trainer", lightning, lightning_package.__version__, 3.0),
            ("Hugging Face Trainer", hugging_face, transformers.__version__, 5.0),
        ):
            mine = functools.partial(whole, 10_000, vector=True, display=display)
            theirs = functools.partial(side, 1000, display)
            both = [lambda side=side: side()[0] for side in (mine, theirs)]
            both = [shown(side) for side in both] if display else both
            table.append(race(name, *both, peer, number, bar, equal))
    for name, problem, segment, bar in (("LeNet, batch 128", lenet, 8, 0.98), ("tiny MLP", tiny, 100, 0.9)):
        table.append(overhead(f"{name}, against a plain loop", problem, segment, bar))
    table.append(overhead("tiny MLP in a flat vector, against a plain loop", tiny, 100, 0.9, vector=True))
    return table


if __name__ == "__main__":
    report("core", rows())
