"""Where the files of a data set are expected, and what to say where they are not there or not what they should be."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a data set.

    Attributes:
        name: of the data set.
        holds: what the data root has to hold, in words.
        url: the page or archive that they come from.
        downloads: whether ``download`` fetches them.
    """

    name: str
    holds: str
    url: str = ""
    downloads: bool = False

    def missing(self, paths: Sequence[Path], root: Path, table: Path | None = None) -> FileNotFoundError:
        """The error for files that are not there; ``table`` is the list that names them."""
        verb = "is" if len(paths) == 1 else "are"
        named = "" if table is None else f", and all files that {table} names"
        return FileNotFoundError(
            f"{few(list(map(str, paths)))} {verb} missing; {self.name} needs {self.holds} under the data root "
            f"{root}{named}. {self._remedy('fetches what is missing')}"
        )

    def damaged(self, path: Path, found: str, expected: str) -> ValueError:
        """The error for a file that is not what it should be."""
        return ValueError(f"{path} {found}; expected {expected}. {self._remedy('fetches it again once it is deleted')}")

    def _remedy(self, download: str) -> str:
        by_hand = f"get the files from {self.url}" if self.url else "put them there"
        return f"--download {download}, or {by_hand}" if self.downloads else by_hand[0].upper() + by_hand[1:]


@dataclasses.dataclass(frozen=True)
class Request:
    """What ``data.load`` was asked for; see there."""

    name: str
    root: Path | None
    seed: int
    image_size: int
    classes: int
    train_size: int
    workers: int | None
    download: bool

    def folder(self, source: Source, nested: str = "") -> Path:
        """The data root; it is made where files are to be downloaded into it.

        Args:
            source: what it has to hold.
            nested: the folder in it that holds the files. Where the root is that folder itself, its parent is meant.

        Raises:
            ValueError: no root is given, or files are to be downloaded that cannot be.
            FileNotFoundError: it is no folder.
        """
        check_root(source, self.root)
        assert self.root is not None
        if self.download and not source.downloads:
            raise ValueError(
                f"download is given and {source.name} cannot be downloaded; get it from {source.url or 'its owner'}, "
                f"so that the data root holds {source.holds}"
            )
        root = self.root.expanduser()
        if self.download:
            root.mkdir(parents=True, exist_ok=True)
        if not root.is_dir():
            raise FileNotFoundError(f"the data root {root} is not a folder; expected one that holds {source.holds}")
        names = (root.absolute(), root.resolve())  # of a link, and of what it leads to
        here = None if (root / nested).exists() else next((path for path in names if path.name == nested), None)
        return root if here is None else here.parent


def check_root(source: Source, root: object) -> None:
    """Raises ValueError where the root of the files is not given."""
    if root is None:
        raise ValueError(
            f"data is {source.name!r} and data_root is missing; give the folder that holds {source.holds}"
            + (f" (from {source.url})" if source.url else "")
        )


def obtain(
    request: Request, source: Source, root: Path, files: Mapping[Path, str | None], fetch: Callable[[], object]
) -> None:
    """Make sure that files are there and are what they should be, downloading them first if that was asked for.

    Args:
        request, source: what is wanted.
        root: the data root.
        files: each file or folder that is needed, and its MD5 sum, or None for what has none.
        fetch: downloads what is missing.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: a file has another MD5 sum.
        OSError: the download failed.
    """
    if request.download and not all(_intact(path, md5) for path, md5 in files.items()):
        with _downloading(source, root):
            fetch()
    absent = [path for path in files if not path.exists()]
    if absent:
        raise source.missing(absent, root)
    for path, expected in files.items():
        if expected is not None and (found := _md5(path)) != expected:
            raise source.damaged(
                path,
                f"is truncated or was changed: its MD5 sum is {found}",
                f"the original file, whose sum is {expected}",
            )


def _intact(path: Path, md5: str | None) -> bool:
    return path.exists() and (md5 is None or md5 == _md5(path))


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextlib.contextmanager
def _downloading(source: Source, root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, ImportError) as error:  # of the network, of torchvision, of gdown
        raise OSError(
            f"{source.name} could not be downloaded ({error}); get it from {source.url}, so that the data root {root} "
            f"holds {source.holds}"
        ) from error


def check_labels(source: Source, path: Path, labels: Iterable[int], classes: int, first: int = 0) -> None:
    """Raises ValueError if a file holds a label outside of [first, first + classes)."""
    for label in (min(labels, default=first), max(labels, default=first)):
        if not first <= label < first + classes:
            raise source.damaged(path, f"holds the label {label}", f"labels from {first} to {first + classes - 1}")


def check_splits(source: Source, path: Path, splits: Sequence[Sized]) -> None:
    """Raises ValueError if one of the splits 0, 1 and 2 that a list tells apart is empty."""
    empty = [str(number) for number, split in enumerate(splits) if not len(split)]
    if empty:
        raise source.damaged(path, f"holds no image of split {', '.join(empty)}", "images of the splits 0, 1 and 2")


def few(names: list[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def stratified(labels: Tensor, shares: tuple[float, ...], generator: torch.Generator) -> list[Tensor]:
    """Indices of as many parts as there are shares, each with its share of each class, in rising order.

    Args:
        labels: (N,), int64.
        shares: of the parts; they add up to 1.
        generator: decides which samples go where.
    """
    part_of = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        boundaries = (torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1] * len(members)).round().long()
        for part, selected in enumerate(members.tensor_split(boundaries)):
            part_of[selected] = part
    return [(part_of == part).nonzero().flatten() for part in range(len(shares))]


def held_out(source: Source, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of training and validation: a tenth of each class is held out of a training set that has none itself.

    Raises:
        ValueError: there are too few samples for that.
    """
    training, validation = stratified(labels, (0.9, 0.1), torch.Generator().manual_seed(seed))
    if not (len(training) and len(validation)):
        raise ValueError(
            f"the training set of {source.name} holds {len(labels)} samples, too few to hold a tenth of each class out "
            "for validation; expected 6 of a class at least"
        )
    return training, validation
