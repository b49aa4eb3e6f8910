"""Every way in which an IDX file can be wrong is an error that names the file and what was expected."""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from idx_files import image_file, label_file, write_set

from rds_fast.training import data
from rds_fast.training.data import idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"

FAULTS: list[tuple[str, str, Callable[[bytes], bytes], str]] = [
    ("empty", IMAGES, lambda content: b"", "holds 0 bytes; expected an IDX header of 16"),
    ("header cut", LABELS, lambda content: content[:7], "holds 7 bytes; expected an IDX header of 8"),
    ("truncated images", IMAGES, lambda content: content[:-1], "is truncated: .*; expected 188176, as .* 240 images"),
    ("truncated labels", LABELS, lambda content: content[:100], "is truncated: it holds 100 bytes; expected 248"),
    ("too long", LABELS, lambda content: content + b"\0", "is too long: it holds 249 bytes; expected 248"),
    (
        "no IDX file",
        IMAGES,
        lambda content: b"<html>" + content,
        "magic number .*; expected 2051, an IDX file of images",
    ),
    (
        "labels for images",
        IMAGES,
        lambda content: label_file(np.zeros(240)),
        "magic number 2049; expected 2051, an IDX file of images",
    ),
    (
        "images for labels",
        LABELS,
        lambda content: image_file(np.zeros((9, 28, 28))),
        "magic number 2051; expected 2049, an IDX file of labels",
    ),
    ("of another size", IMAGES, lambda content: image_file(np.zeros((9, 32, 32))), "images of 32x32; expected 28x28"),
    ("label out of range", LABELS, lambda content: label_file(np.full(240, 10)), "the label 10; expected .* 0 to 9"),
    (
        "fewer labels",
        LABELS,
        lambda content: label_file(np.zeros(239)),
        "240 images and .* 239 labels; expected as many",
    ),
    ("a count too large", IMAGES, lambda content: struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28), "is truncated"),
]


@pytest.mark.parametrize(("name", "fault", "message"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_a_damaged_file(tmp_path: Path, name: str, fault: Callable[[bytes], bytes], message: str) -> None:
    path = write_set(tmp_path) / name
    path.write_bytes(fault(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as raised:
        data.load("mnist", tmp_path)
    assert str(path) in str(raised.value)


def test_no_samples_at_all(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / IMAGES).write_bytes(image_file(np.zeros((0, 28, 28))))
    (tmp_path / LABELS).write_bytes(label_file(np.zeros(0)))
    with pytest.raises(
        ValueError, match=f"{IMAGES} holds 0 images and .* 0 labels; expected as many of each, and at least one"
    ):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("name", [IMAGES, LABELS, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    (write_set(tmp_path) / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{re.escape(str(tmp_path))} holds no .*expected one of {name}, {name}.gz"
    ):
        data.load("mnist", tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """A file that is damaged beside others that are missing, in whatever order they are looked at."""
    write_set(tmp_path)
    for missing in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 faults\. .* images of the train split; .* labels of the t10k"):
        data.load("mnist", tmp_path)
    for damaged in (LABELS, "t10k-images-idx3-ubyte"):
        (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^4 faults\.") as raised:
        data.load("mnist", tmp_path)
    for part in (
        "no images of the train",
        f"{LABELS} is truncated",
        "t10k-images-idx3-ubyte is tr",
        "no labels of the t",
    ):
        assert part in str(raised.value)


def test_two_splits_of_unequal_counts(tmp_path: Path) -> None:
    write_set(tmp_path)
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(label_file(np.zeros(3)))
    with pytest.raises(ValueError, match=r"240 images and .* 3 labels; .* 40 images and .* 3 labels"):
        data.load("mnist", tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent is not a folder; expected one that holds the four IDX files"):
        data.load("mnist", tmp_path / "absent")


def test_a_gzip_file_cut_short(tmp_path: Path) -> None:
    path = write_set(tmp_path, compress=True) / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"images-idx3-ubyte.gz cannot be decompressed .*expected a whole gzip file"):
        data.load("mnist", tmp_path)


def test_a_gzip_file_with_damage_inside(tmp_path: Path) -> None:
    path = write_set(tmp_path, compress=True) / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="cannot be decompressed"):
        data.load("mnist", tmp_path)


def test_a_name_that_promises_gzip(tmp_path: Path) -> None:
    path = write_set(tmp_path, compress=True) / f"{LABELS}.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"is not a gzip file; expected one because its name ends in \.gz"):
        data.load("mnist", tmp_path)


def test_a_gzip_file_without_the_suffix_is_read(tmp_path: Path) -> None:
    labels = np.arange(10)
    (tmp_path / LABELS).write_bytes(gzip.compress(label_file(labels)))
    assert idx.read(tmp_path / LABELS, "labels").tolist() == labels.tolist()
