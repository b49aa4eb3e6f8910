"""What lies in a folder of pictures, as every reader finds it: links followed, tools' leavings passed over."""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..extras import require
from .decoding import PURPOSE
from .lists import decode
from .sources import Source, few

# What desktops, file servers and Python leave in folders, beside what begins with a dot; in small letters.
_OF_TOOLS = (
    *("__macosx", "__pycache__", "@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "$recycle.bin"),
    *("lost+found", "system volume information", "thumbs.db", "desktop.ini"),
)
# What the folder of each split may be called.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Formats that Pillow knows and does not decode by itself, but by another program or a plugin.
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


@functools.cache
def endings() -> frozenset[str]:
    """The endings of files that the installed Pillow, with its plugins, reads as pictures: ``.jpg`` and so on."""
    pillow = require("PIL.Image", PURPOSE)
    pillow.init()
    known = pillow.registered_extensions().items()
    return frozenset(ending for ending, name in known if name in pillow.OPEN and name not in _NOT_DECODED)


def folders(folder: Path, passed_over: Counter[str] | None = None) -> list[Path]:
    """The folders in a folder, by name, but for those that tools made; ``passed_over`` counts the files beside them."""
    entries = [entry for entry in folder.iterdir() if not _is_of_tools(entry.name)]
    if passed_over is not None:
        passed_over.update(_ending(entry.name) for entry in entries if not entry.is_dir())
    return sorted(entry for entry in entries if entry.is_dir())


def find(folder: Path, *names: str) -> Path | None:
    """What has one of some names below a folder, the earlier before the later; else one of them but for capitals."""
    named = (folder / name for name in names)
    loosely = (path for name in names for path in _but_for_capitals(folder, Path(name).parts))
    return next((path for path in itertools.chain(named, loosely) if path.exists()), None)


def _but_for_capitals(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
    elif folder.is_dir():
        for entry in sorted(folder.iterdir()):
            if entry.name.casefold() == parts[0].casefold():
                yield from _but_for_capitals(entry, parts[1:])


def located(root: Path, nested: str, *needed: Sequence[str]) -> list[Path]:
    """The files and folders of a data set, each by the first of its names that is there, or by the first of all.

    Their folder is where most of them are: ``nested`` in the root, the root itself, or ``nested`` twice, as where an
    archive was unpacked into a folder of its name. It may also be another folder in the root, or ``nested`` in that,
    where a single one holds them all.
    """

    def there(place: Path) -> list[Path | None]:
        return [find(place, *names) for names in needed]

    others = {place for each in folders(root) for place in (each, each / nested) if all(there(place))}
    places = [root / nested, root, root / nested / nested, *(others if len(others) == 1 else ())]
    folder = max(places, key=lambda place: sum(path is not None for path in there(place)))
    return [path or folder / names[0] for path, names in zip(there(folder), needed, strict=True)]


def torchvision_root(root: Path, nested: str, *names: str) -> Path:
    """The folder that torchvision, which looks for ``nested`` in it, is to be given, wherever in the root that lies."""
    folder = located(root, nested, *([name] for name in names))[0].parent
    return folder.parent if folder.name == nested else root


class Files:
    """Paths, which can be found by their ends."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._by_end = functools.cache(self._indexed)

    def _indexed(self, length: int, loosely: bool) -> dict[tuple[str, ...], list[str]]:
        ends: dict[tuple[str, ...], list[str]] = {}
        for path in self._paths:
            ends.setdefault(_end(_parts(path)[-length:], loosely), []).append(path)
        return ends

    def ending_in(self, name: str, loosely: bool = False) -> list[str]:
        """Those whose path ends in ``name``, which may hold folders; loosely: whatever the suffix and the capitals."""
        parts = _parts(name)
        return self._by_end(len(parts), loosely).get(_end(parts, loosely), [])


def files(folder: Path) -> list[str]:
    """The files in a folder and those in it, but for those that tools made, in the order of torchvision's."""
    return [os.path.join(*place) for place in sorted(_files(os.fspath(folder)))]


def pictures(paths: Iterable[str], passed_over: Counter[str] | None = None) -> list[str]:
    """The pictures among files; ``passed_over`` counts the others by ending."""
    known, found = endings(), []
    for path in paths:
        if (ending := _ending(path)) in known:
            found.append(path)
        elif passed_over is not None:
            passed_over[ending] += 1
    return found


def say_passed_over(source: Source, passed_over: Counter[str]) -> None:
    """Where files were passed over, one line on standard error that counts them by ending."""
    if passed_over:
        why = "files that Pillow reads as no pictures, or in no class's folder"
        print(f"{source.name}: passed over {counted(passed_over)} ({why})", file=sys.stderr)


def counted(passed_over: Counter[str]) -> str:
    """How many files there are of which endings, the most first."""
    ordered = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {ending or 'without ending'}" for ending, count in ordered)


def listed(
    source: Source, table: Path, names: Sequence[str], folder: Path, root: Path, *, complete: bool = True
) -> list[str]:
    """The file below a folder that each name in a list means.

    A name may leave out the first folders of its file's path. It may differ from it in the suffix or in capitals where
    that leaves one picture that no other name means.

    Args:
        source, table, root: for the messages: the data set, the list, and the data root.
        complete: whether the list should name all files that are called like those that it does, but for numbers: if
            not, some of its lines were lost. Files that are called otherwise are left alone.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: several files end in a name, or the list is not complete.
    """
    found = files(folder)
    means: dict[str, str] = {}
    for loosely, known in ((False, Files(found)), (True, Files(pictures(found)))):
        taken = set(means.values())
        for name in (name for name in names if name not in means):
            there = [path for path in known.ending_in(name, loosely) if not (loosely and path in taken)]
            exact = os.path.join(folder, name)
            if exact in there or (not there and os.path.isfile(exact)):  # the second: in no folder below this one
                there = [exact]
            if len(there) > 1:
                raise source.damaged(table, f"names {name}, and {few(there)} end so", "names that tell the files apart")
            if there:
                means[name] = there[0]
                taken.add(there[0])
    absent = [name for name in names if name not in means]
    if absent:
        raise source.missing([folder / name for name in absent], root, table)
    if not names:
        raise source.damaged(table, "names no image", f"a line for each image in {folder}")
    taken, shapes = set(means.values()), set(map(_shape, means.values()))
    unlisted = [path for path in found if path not in taken and _shape(path) in shapes]
    if complete and unlisted:
        raise source.damaged(table, f"does not name {few(unlisted)}", f"a line for each image in {folder}")
    return [means[name] for name in names]


def _shape(path: str) -> str:
    return re.sub(r"\d+", "0", path)


def _files(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, str]]:
    """The folder and name of each file below a folder, which lies in those ``above``: a link may lead back there."""
    status = os.stat(folder)
    this = (status.st_dev, status.st_ino)
    if this in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_of_tools(entry.name):
                continue
            if _is_folder(entry):
                yield from _files(entry.path, above | {this})
            else:
                yield folder, entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: no picture either, as its reader will say
        return False


def _is_of_tools(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _OF_TOOLS


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def spelt(name: str) -> str:
    """A name as it is read, however a system wrote it: macOS takes accents from letters, old names are not in UTF-8."""
    return name if name.isascii() else unicodedata.normalize("NFC", decode(name.encode("utf-8", "surrogateescape")))


def _parts(path: str) -> tuple[str, ...]:
    """The folders and the name."""
    return tuple(part for part in spelt(path).replace("\\", "/").split("/") if part not in ("", "."))


def _end(parts: tuple[str, ...], loosely: bool) -> tuple[str, ...]:
    return tuple(os.path.splitext("/".join(parts))[0].casefold().split("/")) if loosely else parts
