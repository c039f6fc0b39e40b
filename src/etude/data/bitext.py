"""Read parallel text: files of two languages whose lines translate each other, plain or gzip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from etude.core.errors import UserError
from etude.data import texts
from etude.data.sets import Parallel

PARTS = {"train": ("train",), "validation": ("val", "valid", "validation", "dev"), "test": ("test", "test_2016_flickr")}
"""The names that the files of each part may have, before the dot and the language."""


def read(
    folder: Path, languages: tuple[str, str], name: str, remedy: str = "", digests: Mapping[str, str] | None = None
) -> Parallel:
    """The pairs of a folder with `train.LANGUAGE`, `val.LANGUAGE` and `test.LANGUAGE` (each may end in .gz).

    A folder that has one file `NAME.LANGUAGE` for each language is cut instead: the first 90 % of the lines train, the next 5 %
    validate, the last 5 % are the test. `digests` are the SHA-256 values of known files by name. Raises `UserError` when a file
    is missing or damaged, or the two files of a part have different numbers of lines.
    """
    first, second = languages
    if first == second:
        raise UserError(f"languages {first}-{second}: the source and the target must be two languages.")
    advice = remedy or f"a folder of parallel text has train.{first} and train.{second}, or one file ending in each"
    found = {part: [_one(folder, stems, language) for language in languages] for part, stems in PARTS.items()}
    if digests is not None or all(found["train"]):
        parts = []
        for part, paths in found.items():
            known = [stem for stem in PARTS[part] if any(file.startswith(f"{stem}.") for file in digests or ())]
            stem, end = (known or PARTS[part])[0], ".gz" if digests is not None else ""
            named = [folder / f"{stem}.{language}{end}" for language in languages]
            paths = [path or missing for path, missing in zip(paths, named)]
            parts.append(_pairs(paths[0], paths[1], advice, digests))
        return Parallel(name, parts[0], parts[1], parts[2], languages, str(folder))
    alone = [_only(folder, language, advice) for language in languages]
    pairs = _pairs(alone[0], alone[1], advice)
    if len(pairs) < 20:
        raise UserError(
            f"{alone[0]} has {len(pairs)} lines: at least 20 are needed, so that some validate and some test."
        )
    cut = [len(pairs) * 9 // 10, len(pairs) * 19 // 20]
    return Parallel(name, pairs[: cut[0]], pairs[cut[0] : cut[1]], pairs[cut[1] :], languages, str(folder))


def _one(folder: Path, stems: tuple[str, ...], language: str) -> Path | None:
    """The file of a part in a language, if it is there."""
    paths = (folder / f"{stem}.{language}{end}" for stem in stems for end in (".gz", ""))
    return next((path for path in paths if path.exists()), None)


def _only(folder: Path, language: str, advice: str) -> Path:
    found = sorted([*folder.glob(f"*.{language}"), *folder.glob(f"*.{language}.gz")])
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise UserError(f"{folder} has {what} of the language {language}: {advice}.")
    return found[0]


def _pairs(first: Path, second: Path, advice: str, digests: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    sides = []
    for path in (first, second):
        text = texts.read(path, advice, None if digests is None else digests.get(path.name))
        sides.append(text.removesuffix("\n").split("\n"))
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{first} has {len(sides[0]):,} lines and {second} {len(sides[1]):,}: each line must translate the other's."
        )
    return [(a.strip(), b.strip()) for a, b in zip(*sides) if a.strip() and b.strip()]
