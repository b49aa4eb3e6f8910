"""The IDX format of the MNIST family: big-endian header, then one byte a pixel or label."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

# 0x08 says unsigned bytes, the last byte the number of dimensions.
_MAGIC = {"images": 0x00000803, "labels": 0x00000801}
_PIXELS = 28

SPLITS = ("train", "t10k")


def find(folder: Path, split: str, kind: str) -> Path:
    """The file of one split ("train" or "t10k") and kind ("images" or "labels") in a folder, in any usual spelling.

    Raises:
        FileNotFoundError: there is none; the message lists the names that were looked for.
    """
    dimensions = {"images": 3, "labels": 1}[kind]
    stems = [f"{split}-{kind}{separator}idx{dimensions}-ubyte" for separator in "-."]
    names = [stem + suffix for stem in stems for suffix in ("", ".gz")]
    unpacked = [f"{outer}/{inner}" for outer in names for inner in names]  # each archive into a folder of its name
    for name in (*names, *unpacked):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no {kind} of the {split} split; expected one of {', '.join(names)}")


def _content(path: Path) -> bytes:
    """The bytes of a file, decompressed if it is a gzip file, whatever its name."""
    content = path.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        if path.suffix == ".gz":
            raise ValueError(f"{path} is not a gzip file; expected one because its name ends in .gz")
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} cannot be decompressed ({error}); expected a whole gzip file: download it again"
        ) from error


def read(path: Path, kind: str) -> np.ndarray:
    """One IDX file as unsigned bytes.

    Args:
        path: the file, compressed by gzip or not.
        kind: "images" for (N, 28, 28), "labels" for (N,) in [0, 9].

    Raises:
        ValueError: the file is not what its kind asks for: another magic number or image size, fewer or more bytes
            than its header says, a label above 9.
    """
    content = _content(path)
    header_length = 16 if kind == "images" else 8
    if len(content) < header_length:
        raise ValueError(f"{path} holds {len(content)} bytes; expected an IDX header of {header_length}")
    magic, *shape = (int(word) for word in np.frombuffer(content, ">u4", header_length // 4))
    if magic != _MAGIC[kind]:
        raise ValueError(f"{path} begins with the magic number {magic}; expected {_MAGIC[kind]}, an IDX file of {kind}")
    if kind == "images" and shape[1:] != [_PIXELS, _PIXELS]:
        raise ValueError(f"{path} holds images of {shape[1]}x{shape[2]}; expected {_PIXELS}x{_PIXELS}")
    expected = header_length + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        state = "is truncated" if len(content) < expected else "is too long"
        raise ValueError(
            f"{path} {state}: it holds {len(content)} bytes; expected {expected}, as its header says {shape[0]} {kind}"
        )
    values = np.frombuffer(content, np.uint8, offset=header_length).reshape(shape)
    if kind == "labels" and values.size and values.max() > 9:
        raise ValueError(f"{path} holds the label {values.max()}; expected labels from 0 to 9")
    return values


def read_set(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, 28, 28) and labels (N,) of each split, "train" and "t10k".

    Raises:
        FileNotFoundError: a file is missing, and those that are there are as they should be.
        ValueError: a file is damaged (see ``read``), or those of a split hold different numbers of samples. The message
            names all that is wrong, missing files included.
    """
    files: dict[tuple[str, str], np.ndarray] = {}
    faults: list[Exception] = []
    for split in SPLITS:
        for kind in _MAGIC:
            try:
                files[split, kind] = read(find(folder, split, kind), kind)
            except (FileNotFoundError, ValueError) as fault:
                faults.append(fault)
        counts = [len(files[split, kind]) for kind in _MAGIC if (split, kind) in files]
        if len(counts) == 2 and (counts[0] != counts[1] or counts[0] == 0):
            images, labels = (find(folder, split, kind) for kind in _MAGIC)
            found = f"{images} holds {counts[0]} images and {labels} {counts[1]} labels"
            faults.append(ValueError(f"{found}; expected as many of each, and at least one"))
    if not faults:
        return {split: (files[split, "images"], files[split, "labels"]) for split in SPLITS}
    if len(faults) == 1:
        raise faults[0]
    message = f"{len(faults)} faults. " + ". ".join(map(str, faults))
    only_missing = all(isinstance(fault, FileNotFoundError) for fault in faults)
    raise FileNotFoundError(message) if only_missing else ValueError(message)
