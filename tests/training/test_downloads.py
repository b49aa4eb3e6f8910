"""Downloads: what torchvision is asked for, and what is said where it cannot or does not succeed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import data_files
import pytest
from idx_files import write_set

from rds_fast.training import data
from rds_fast.training.extras import require_torchvision

for package in ("torchvision", "scipy"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)


@pytest.mark.parametrize("name", ["tiny-imagenet", "waterbirds", "imagefolder"])
def test_what_cannot_be_downloaded_says_where_it_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"download is given and {name} cannot be downloaded; get it from .*, so that"
    ):
        data.load(name, tmp_path / "new", download=True)
    assert not (tmp_path / "new").exists()


# What torchvision calls to fetch a set.
DOWNLOADERS = {
    "cifar10": ("cifar", "download_and_extract_archive"),
    "cifar100": ("cifar", "download_and_extract_archive"),
    "svhn": ("svhn", "download_url"),
    "gtsrb": ("gtsrb", "download_and_extract_archive"),
    "flowers102": ("flowers102", "download_and_extract_archive"),
}


@pytest.mark.parametrize("name", DOWNLOADERS)
def test_download_fetches_what_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = data_files.WRITERS[name](tmp_path / "original")
    data_files.trust(monkeypatch, name, original)
    calls: list[Any] = []

    def fetch(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        shutil.copytree(original, tmp_path / "new", dirs_exist_ok=True)  # written anew, .mat files hold another time

    module, function = DOWNLOADERS[name]
    library = require_torchvision(f"torchvision.datasets.{module}", "the tests")
    monkeypatch.setattr(library, function, fetch)
    if name == "flowers102":
        monkeypatch.setattr(library, "download_url", fetch)
    splits = data.load(name, tmp_path / "new", image_size=28, workers=0, download=True)
    assert calls
    assert [len(split) for split in splits] == [len(split) for split in data.load(name, original, workers=0)]
    calls.clear()
    data.load(name, tmp_path / "new", workers=0, download=True)
    assert not calls


@pytest.mark.parametrize(
    "name", [name for name, known in data.DATA_SETS.items() if known.source and known.source.downloads]
)
def test_a_failed_download_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **_: Any) -> None:
        raise OSError("no route to host")

    utils = require_torchvision("torchvision.datasets.utils", "the tests")
    for module in ("cifar", "svhn", "gtsrb", "flowers102", "mnist", "celeba"):
        library = require_torchvision(f"torchvision.datasets.{module}", "the tests")
        for function in ("download_url", "download_and_extract_archive", "download_file_from_google_drive"):
            monkeypatch.setattr(library, function, fail, raising=False)
    monkeypatch.setattr(utils, "_urlretrieve", fail)
    message = rf"{name} could not be downloaded \(.*\); get it from https?://.*, so that the data root .*new holds "
    with pytest.raises(OSError, match=message):
        data.load(name, tmp_path / "new", workers=0, download=True)


def test_digits_are_downloaded_into_a_root_alone() -> None:
    with pytest.raises(
        ValueError, match="data is 'mnist' and data_root is missing; give the folder that holds the four"
    ):
        data.load("mnist", download=True)


def test_digits_are_downloaded_where_torchvision_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = require_torchvision("torchvision.datasets.mnist", "the tests")

    def fetch(url: str, *_: Any, **__: Any) -> None:
        write_set(tmp_path / "new/FashionMNIST/raw")

    monkeypatch.setattr(library, "download_and_extract_archive", fetch)
    splits = data.load("fashion-mnist", tmp_path / "new", download=True)
    assert [len(split) for split in splits] == [220, 20, 40]
    assert splits.train.class_names[9] == "ankle boot"
