"""Data files: their kinds, and those of a path, a pattern or a folder.

Everything in a folder that is not read is listed with the reason, so that a report can name it.
"""

import functools
import glob
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.errors import DataError
from moe_jax.files.json_file import parse_json

KINDS = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".txt",
    ".parquet",
    ".arrow",
    ".feather",
)
"""Extensions of data files."""

TEXT_KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
"""Kinds that may be compressed; the others compress their columns themselves."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Extensions that may follow one of `TEXT_KINDS`."""

# Words in file names for each split; the keys are the hub's names.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

DATASET_DICT = "dataset_dict.json"
"""File of `DatasetDict.save_to_disk` that lists the splits, which are folders."""

DATASET_STATE = "state.json"
"""File of `Dataset.save_to_disk` that lists the Arrow files of a folder."""

_HIDDEN = re.compile(r"[._].*|Thumbs\.db|desktop\.ini", re.IGNORECASE)
_METADATA = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog)(\.(md|txt|rst|cff|bib))?"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json",
    re.IGNORECASE,
)

Skipped = dict[str, list[str]]
"""Names of files and folders that are not read, by reason."""


class DataFiles(NamedTuple):
    """Files of a data set.

    Attributes:
      files: files to read, in order.
      skipped: names of files that are not read, by reason.
    """

    files: tuple[Path, ...]
    skipped: Skipped


def file_kind(path: Path) -> str | None:
    """Extension of a data file, one of `KINDS`, without that of a compression; None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = suffixes[:-1]
        return inner[0] if inner and inner[0] in TEXT_KINDS else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def find_files(paths: Sequence[str], split: str) -> DataFiles:
    """Data files of one split.

    A file or a pattern is taken as it is, and belongs to the split `train`. A folder is searched:
    its files are those named after the split, or all if none is named after any split. A folder
    that `datasets` wrote with `save_to_disk` has the splits and files that it lists itself.

    Args:
      paths: files, folders and patterns such as `data/part*.json` or `data/**/*.csv`.
      split: name of the split.

    Raises:
      DataError: a path does not exist, holds no data file or no such split.
    """
    files: dict[Path, Path] = {}
    skipped: Skipped = {}
    for path in paths:
        found = _find(path, split)
        for reason, names in found.skipped.items():
            skipped.setdefault(reason, []).extend(names)
        for file in found.files:
            if files.setdefault(file.resolve(), file) is not file:
                skipped.setdefault("named twice", []).append(str(file))
    return DataFiles(tuple(files.values()), skipped)


def folder_files(folder: Path, kinds: Collection[str] = KINDS) -> DataFiles:
    """All data files below a folder, sorted by path.

    Hidden and system files, metadata of data sets and files of other kinds are skipped. Of the
    files beside the state of `Dataset.save_to_disk`, those that it lists are read: others are
    caches.

    Raises:
      DataError: a file that a state lists is missing, or the target of a link.
    """
    files, skipped = list[Path](), Skipped()
    listed_in = functools.cache(_listed_files)
    for file, reason in _walk(folder):
        listed = listed_in(file.parent)
        if reason is None and file_kind(file) not in kinds:
            reason = "unknown kind"
        if reason is None and not _is_regular(file):
            reason = "no regular file"
        if reason is None and listed is not None and file.name not in listed:
            reason = f"not in {DATASET_STATE}"
        if reason is None:
            files.append(file)
        else:
            name = file.relative_to(folder).as_posix()
            skipped.setdefault(reason, []).append(name + "/" * file.is_dir())
    return DataFiles(tuple(sorted(files)), {k: sorted(v) for k, v in sorted(skipped.items())})


def skipped_text(skipped: Mapping[str, Sequence[str]]) -> str:
    """`3 (hidden: .git/; unknown kind: a.md and 1 more)`: number, reasons and first names."""
    reasons = [
        f"{reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for reason, names in skipped.items()
    ]
    return f"{sum(map(len, skipped.values()))} ({'; '.join(reasons)})"


def unknown_kind(path: Path | str) -> DataError:
    """Error about a file that is no data file by its name."""
    return DataError(
        f"{path}: unknown kind of file; known: {', '.join(KINDS)}, and "
        f"{', '.join(COMPRESSIONS)} after those of text"
    )


def _find(path: str, split: str) -> DataFiles:
    target = Path(path).expanduser()
    if target.is_dir():
        return _of_folder(target, split)
    if target.is_file():
        if file_kind(target) is None:
            raise unknown_kind(path)
        found = DataFiles((target,), {})
    elif glob.has_magic(path):
        found = _matching(path, target)
    else:
        raise DataError(f"{path}: no such file or folder")
    if split != "train":
        raise DataError(
            f"{path}: {'a single file' if target.is_file() else 'a pattern of files'} has no split "
            f"{split!r}; leave it at 'train', or use a part, for example 'train[:90%]'"
        )
    return found


def _matching(path: str, pattern: Path) -> DataFiles:
    """Data files that match a pattern, sorted; none in hidden folders that it does not name."""
    files, skipped = list[Path](), Skipped()
    for name in sorted(glob.glob(str(pattern), recursive=True)):
        file = Path(name)
        if file.is_dir():
            continue
        if file_kind(file) is None:
            skipped.setdefault("unknown kind", []).append(name)
        elif any(_HIDDEN.fullmatch(p) for p in file.parts if p not in pattern.parts):
            skipped.setdefault("hidden", []).append(name)
        elif _is_regular(file):
            files.append(file)
        else:
            skipped.setdefault("no regular file", []).append(name)
    if not files:
        others = f"; it matches only {skipped_text(skipped)}" if skipped else ""
        raise DataError(f"{path}: no data file matches this pattern{others}")
    return DataFiles(tuple(files), skipped)


def _of_folder(folder: Path, split: str) -> DataFiles:
    splits = _splits_of_dict(folder)
    if splits is not None and split not in splits:
        raise DataError(f"{folder}: no split {split!r}; splits: {', '.join(splits)}")
    found = folder_files(folder if splits is None else folder / split)
    if not found.files:
        held = f"; it holds {skipped_text(found.skipped)}" if found.skipped else ""
        raise DataError(f"{folder}: the folder holds no {', '.join(KINDS)} file{held}")
    if splits is not None:
        others = [f"{name}/" for name in splits if name != split]
        return found._replace(
            skipped={**({"other splits": others} if others else {}), **found.skipped}
        )
    if _listed_files(folder) is None:
        return _of_split(folder, found, split)
    if split not in ("train", _state(folder).get("_split")):
        raise DataError(
            f"{folder}: is one data set of `save_to_disk`, without a split {split!r}; leave it at "
            "'train', or use a part, for example 'train[:90%]'"
        )
    return found


def _of_split(folder: Path, found: DataFiles, split: str) -> DataFiles:
    """Files named after the split; all files if none is named after any split."""
    named = [file for file in found.files if _is_named(file.relative_to(folder), split)]
    if named:
        others = [f.relative_to(folder).as_posix() for f in found.files if f not in named]
        reason = {"not named after the split": others} if others else {}
        return DataFiles(tuple(named), {**reason, **found.skipped})
    splits = [
        word
        for word in SPLIT_WORDS
        if any(_is_named(file.relative_to(folder), word) for file in found.files)
    ]
    if splits or split != "train":
        raise DataError(
            f"{folder}: no file is named after the split {split!r}; "
            f"splits found: {', '.join(splits) or 'none, which counts as train'}"
        )
    return found


def _is_named(path: Path, split: str) -> bool:
    words = "|".join(map(re.escape, SPLIT_WORDS.get(split, (split,))))
    return re.search(rf"(^|[-_./ ])({words})($|[-_./ 0-9])", path.as_posix()) is not None


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Files below a folder, and hidden folders as one each, with the reason to skip them."""
    visited = set[str]()  # links may lead back
    for directory, folders, names in os.walk(folder, followlinks=True):
        place = Path(directory)
        real = os.path.realpath(directory)
        if real in visited:
            folders.clear()
            yield place, "linked twice"
            continue
        visited.add(real)
        for name in folders:
            if _HIDDEN.fullmatch(name):
                yield place / name, "hidden"
        folders[:] = sorted(name for name in folders if not _HIDDEN.fullmatch(name))
        for name in sorted(names):
            if _HIDDEN.fullmatch(name):
                yield place / name, "hidden"
            else:
                yield place / name, "metadata" if _METADATA.fullmatch(name) else None


def _is_regular(file: Path) -> bool:
    """True for a file with content, not a pipe or a socket.

    Raises:
      DataError: it is a link to nothing, as tools leave that keep data elsewhere.
    """
    if not file.exists():
        raise DataError(
            f"{file}: is a link to {file.readlink()}, which does not exist; fetch the file "
            "(`git annex get`, `dvc checkout`, ...), or remove the link"
        )
    return file.is_file()


def _listed_files(folder: Path) -> set[str] | None:
    """Names of the files that the state of `Dataset.save_to_disk` lists; None without a state."""
    listed = _state(folder).get("_data_files")
    if not isinstance(listed, list):
        return None
    try:
        names = {str(file["filename"]) for file in listed}
    except (TypeError, KeyError):
        raise DataError(f"{folder / DATASET_STATE}: lists no files; it is damaged") from None
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise DataError(f"{folder}: lacks {missing[0]}, which its {DATASET_STATE} lists")
    return names


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = parse_json((folder / DATASET_STATE).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _splits_of_dict(folder: Path) -> list[str] | None:
    """Splits of a folder of `DatasetDict.save_to_disk`; None for other folders."""
    file = folder / DATASET_DICT
    if not file.is_file():
        return None
    try:
        return [str(name) for name in parse_json(file.read_bytes())["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{file}: lists no splits; the file is damaged") from None
