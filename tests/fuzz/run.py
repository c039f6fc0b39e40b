"""`make fuzz`: settings and damaged run folders by the thousand; each must end in a result or in one sentence, and soon.

    python tests/fuzz/run.py [settings] [folders] [--cases N] [--seed S] [--only TEXT]

Every case runs in a forked child with bounded memory and time. Whatever ends in another exception than UserError or
RunError, in a signal, or not at all, is printed with what repeats it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 60.0
MEMORY = 6 * 2**30
STEPS = 2
PIECE = Path(__file__).resolve().parents[1] / "faults" / "piece.py"

WHOLE = [-(2**63) - 1, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 10**30]
REAL = [float("nan"), float("inf"), -1.0, 0.0, 1e-300, 1e-45, 1e-37, 1e-10, 0.5, 1.0, 2.0, 1e10, 1e37, 1e300]
TEXT = [
    "",
    " ",
    "x",
    "\0",
    "é\udcff",
    "../..",
    "/",
    "/dev/zero",
    "/dev/null",
    "nowhere.py:Name",
    ":",
    "a:b",
    "x" * 5000,
    "latest",
]


class Enough(BaseException):
    """The first steps went well."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="settings|folders", help="what to damage (default: both)")
    parser.add_argument("--cases", type=int, help="how many of each kind (default: 2000 settings, 1000 folders)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    options = parser.parse_args()
    options.what = options.what or ["settings", "folders"]
    if strange := set(options.what) - {"settings", "folders"}:
        parser.error(f"there is no {strange.pop()} to fuzz; take settings or folders")
    failures = 0
    with tempfile.TemporaryDirectory(prefix="etude-fuzz-") as scratch:
        os.environ |= {"ETUDE_CACHE": f"{scratch}/cache", "ETUDE_RUNS": f"{scratch}/runs", "OMP_NUM_THREADS": "1"}
        os.chdir(scratch)
        import torch

        torch.set_num_threads(1)
        for what in options.what:
            made = settings if what == "settings" else folders
            count = options.cases or {"settings": 2000, "folders": 1000}[what]
            began, done = time.monotonic(), 0
            for label, case in itertools.islice(made(random.Random(options.seed), options.only), count):
                done += 1
                if wrong := tried(case):
                    failures += 1
                    print(f"{what}: {label}\n{wrong}\n", flush=True)
            print(f"{what}: {done:,} cases in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


def tried(case: Callable[[], object]) -> str:
    """What was wrong with this case, run in a child; empty where nothing was."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        said = ""
        try:
            resource.setrlimit(resource.RLIMIT_AS, (_in_use() + MEMORY, resource.RLIM_INFINITY))
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            case()
        except Enough:
            pass
        except BaseException as error:
            if type(error).__name__ not in ("UserError", "RunError"):
                said = "".join(traceback.format_exception(error)[-6:])
            elif "\n" in str(error).strip() or len(str(error)) > 2000:
                said = f"no single sentence: {str(error)[:500]!r}"
        os.write(theirs, said.encode("utf-8", "replace")[-60000:])
        os._exit(0)
    os.close(theirs)
    end = time.monotonic() + SECONDS
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        late = time.monotonic() - end
        if late > 9 * SECONDS or (late > 0 and _busy(pid) > 0.8 * SECONDS):  # others may use the CPU too
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(ours)
            return f"no end after {SECONDS:.0f} s"
        time.sleep(0.005)
    with os.fdopen(ours, "rb") as file:
        return file.read().decode("utf-8", "replace")


def _busy(pid: int) -> float:
    """CPU seconds of a process so far; where nobody tells, without end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _in_use() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 2**34


# ------------------------------------------------------------------------------------------------------------ settings


def settings(chance: random.Random, only: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every field of every method at the edges of its type, then several at once, without end."""
    from etude import catalog

    methods = [
        (entry, catalog.load_method(entry))
        for entry in catalog.entries().values()
        if only in entry.name and not entry.missing
    ]
    single = [
        (entry.name, {field: value})
        for entry, module in methods
        for field, hint in hints(module).items()
        for value in edges(hint)
    ]
    chance.shuffle(single)
    for name, values in single:
        yield (
            f"etude.run({name!r}, preset='tiny', **{values!r})",
            lambda name=name, values=values: first_steps(name, values),
        )
    while True:
        entry, module = chance.choice(methods)
        known = list(hints(module).items())
        values = {
            field: chance.choice(edges(hint))
            for field, hint in chance.sample(known, min(len(known), chance.randint(2, 4)))
        }
        label = f"etude.run({entry.name!r}, preset='tiny', **{values!r})"
        yield label, lambda name=entry.name, values=values: first_steps(name, values)


def hints(module: Any) -> dict[str, Any]:
    from etude.core.run import Common

    found = typing.get_type_hints(module.Config, include_extras=True)
    common = typing.get_type_hints(Common, include_extras=True)
    return {
        **found,
        **{name: common[name] for name in ("seed", "threads", "precision", "save_every", "compile", "device")},
    }


def edges(hint: Any) -> list[Any]:
    """Values at and beyond the edges of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return edges(arguments[0])
    if origin is typing.Literal:
        return [*arguments, "none such"]
    if origin is tuple:
        inner = edges(arguments[0])
        return [(), *((value,) for value in inner), tuple(inner[2:5]), tuple(inner[2:3]) * 40]
    if arguments:
        return [None, *(value for part in arguments if part is not type(None) for value in edges(part))]
    return {int: WHOLE, float: REAL, str: TEXT, bool: [True, False]}.get(hint, [None])


def first_steps(name: str, values: dict[str, Any]) -> None:
    import etude
    from etude.core.run import Run

    steps = Run.steps

    def some(run: Run, total: int) -> Iterator[int]:
        for count, step in enumerate(steps(run, total)):
            if count == STEPS:
                raise Enough
            yield step

    Run.steps = some  # type: ignore[method-assign]
    etude.run(name, preset="tiny", out=tempfile.mkdtemp(dir="."), quiet=True, **{"device": "cpu", **values})


# ------------------------------------------------------------------------------------------------------------- folders

DEEP = "[" * 100_000 + "]" * 100_000
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    1e300,
    "",
    "x",
    "\0",
    "../../etc",
    [],
    [[]],
    {},
    {"a": {}},
    [None] * 3,
    "/dev/zero",
]


def folders(chance: random.Random, only: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Whole run folders in which one file is damaged, read by every command that reads one."""
    import etude

    whole = []
    for index, (name, extra) in enumerate(
        ((str(PIECE), {}), ("vision/lenet", {}), ("language/gpt", {}), ("basics/mlp", {}))
    ):
        if only in name:
            with contextlib.redirect_stderr(None):
                whole.append(
                    etude.run(
                        name, preset="tiny", steps=4, quiet=True, out=f"whole-{index}", device="cpu", **extra
                    ).folder
                )
    while whole:
        folder = chance.choice(whole)
        files = sorted(
            path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".html"
        )
        file, how, verb = chance.choice(files), chance.choice(DAMAGES), chance.choice(VERBS)
        seed = chance.getrandbits(32)
        label = f"{folder.name}/{file}: {how.__name__} (seed {seed}), then {verb.__name__}"

        def case(folder: Path = folder, file: Path = file, how: Any = how, verb: Any = verb, seed: int = seed) -> None:
            copy = Path(tempfile.mkdtemp(dir=".")) / "run"
            shutil.copytree(folder, copy)
            how(copy / file, random.Random(seed))
            verb(copy)

        yield label, case


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data) + 1)])


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 5)):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)


def deep(path: Path, chance: random.Random) -> None:
    path.write_text(DEEP if chance.random() < 0.5 else DEEP[:100_000])


def replaced(path: Path, chance: random.Random) -> None:
    """One value in the JSON becomes another one, or one key another."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return cut(path, chance)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(item)

    walk(value)
    if not places or chance.random() < 0.05:
        value = chance.choice(ODD)
    else:
        node, key = chance.choice(places)
        if isinstance(node, dict) and chance.random() < 0.3:
            item = node.pop(key)
            if chance.random() < 0.5:
                node[chance.choice(["", "x", "method", key.upper()])] = item
        else:
            node[key] = chance.choice(ODD)
    path.write_text(json.dumps(value), encoding="utf-8")
    return None


def gone(path: Path, chance: random.Random) -> None:
    path.unlink()


def other(path: Path, chance: random.Random) -> None:
    """Something else stands where the file should."""
    path.unlink()
    kind = chance.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path.name)
    else:
        path.symlink_to("/etc/passwd")


def sealed(path: Path, chance: random.Random) -> None:
    """A damaged checkpoint whose manifest vouches for it."""
    folder = path.parent
    if not (folder / "manifest.json").is_file():
        return replaced(path, chance)
    from etude.core import checkpoint

    replaced(folder / "state.json", chance)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = checkpoint._fingerprint(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return None


def beside(path: Path, chance: random.Random) -> None:
    """Things lie in the folder that no run puts there."""
    for name in ("step-²", "step-", "step-١", "step-" + "9" * 40, ".part-x"):
        (path.parents[len(path.parents) - 3] / "checkpoints" / name).mkdir(parents=True, exist_ok=True)


DAMAGES = [cut, flip, deep, replaced, replaced, replaced, replaced, gone, other, sealed, sealed, beside]


def load(folder: Path) -> None:
    import etude

    repr(etude.load(folder))


def resume(folder: Path) -> None:
    import etude

    (folder / "done").unlink(missing_ok=True) if not (folder / "done").is_dir() else None
    etude.resume(folder)


def longer(folder: Path) -> None:
    import etude

    etude.resume(folder, steps=6)


def command(*words: str) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        from etude import cli

        code = cli.main([str(folder) if word == "RUN" else word for word in words])
        assert code in (0, 1, 2), code

    call.__name__ = f"etude {' '.join(words)}"
    return call


VERBS = [
    load, resume, longer, command("show", "RUN", "--no-open"), command("show", "RUN", "--json"), command("runs", "--json"),
    command("compare", "RUN", "../whole-0", "--no-open"), command("predict", "RUN", "x.png"), command("sample", "RUN"),
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
