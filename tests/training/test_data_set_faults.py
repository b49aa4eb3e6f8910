"""Files that are missing, truncated or mislabelled: the error names the file, what was expected, and what to do."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_files
import pytest
import torch

from rds_fast.training import TrainingConfig, data
from rds_fast.training.data import sources

for package in ("torchvision", "scipy"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)

Change = Callable[[Path], object]


def remove(path: str) -> Change:
    return lambda root: (root / path).unlink()


def replace(path: str, old: str, new: str) -> Change:
    """In a text file, once."""

    def change(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return change


def truncate(path: str, kept: float = 0.6) -> Change:
    def change(root: Path) -> None:
        content = (root / path).read_bytes()
        (root / path).write_bytes(content[: int(kept * len(content))])

    return change


def cut_last_line(path: str) -> Change:
    def change(root: Path) -> None:
        (root / path).write_text("".join((root / path).read_text().splitlines(keepends=True)[:-1]))

    return change


def cut_after(path: str, end: str) -> Change:
    def change(root: Path) -> None:
        text = (root / path).read_text()
        (root / path).write_text(text[: text.index(end) + len(end)])

    return change


def load(name: str, root: Path) -> None:
    """The splits and every image of them."""
    for split in data.load(name, root, image_size=28, workers=0):
        split.take(torch.arange(len(split), device=split.index_device))


CIFAR, SIGNS, TINY = "cifar-10-batches-py", "gtsrb/GTSRB/Training/00007", "tiny-imagenet-200"
BIRDS = "waterbird_complete95_forest2water2"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "cifar10",
            remove(f"{CIFAR}/data_batch_3"),
            r"data_batch_3 is missing; cifar10 needs the folder cifar-10-batch",
        ),
        (
            "cifar10",
            remove(f"{CIFAR}/batches.meta"),
            r"batches\.meta is missing; .* under the data root .*\. --download",
        ),
        (
            "cifar100",
            remove("cifar-100-python/test"),
            "test is missing; cifar100 needs the folder cifar-100-python under",
        ),
        (
            "svhn",
            remove("test_32x32.mat"),
            r"test_32x32\.mat is missing; svhn needs train_32x32\.mat and test_32x32\.mat",
        ),
        (
            "tiny-imagenet",
            remove(f"{TINY}/val/val_annotations.txt"),
            r"val_annotations\.txt is missing; .* Get the files",
        ),
        ("tiny-imagenet", remove(f"{TINY}/val/images/val_2.JPEG"), r"val_2\.JPEG is missing; tiny-imagenet needs"),
        (
            "tiny-imagenet",
            remove(f"{TINY}/train/n01629819/images/n01629819_4.JPEG"),
            r"n01629819_4\.JPEG is missing",
        ),
        ("gtsrb", remove("gtsrb/GT-final_test.csv"), r"GT-final_test\.csv is missing; gtsrb needs the folder gtsrb"),
        ("gtsrb", remove("gtsrb/GTSRB/Final_Test/Images/00001.ppm"), r"Images/00001\.ppm is missing"),
        ("gtsrb", remove(f"{SIGNS}/00002_00001.ppm"), r"00007/00002_00001\.ppm is missing"),
        (
            "flowers102",
            remove("flowers-102/setid.mat"),
            r"setid\.mat is missing; flowers102 needs the folder flowers-102",
        ),
        ("flowers102", remove("flowers-102/jpg/image_00004.jpg"), r"image_00004\.jpg is missing"),
        ("celeba-hair", remove("celeba/list_attr_celeba.txt"), r"list_attr_celeba\.txt is missing; celeba-hair needs"),
        ("celeba-hair", remove("celeba/img_align_celeba/000003.jpg"), r"img_align_celeba/000003\.jpg is missing"),
        ("waterbirds", remove(f"{BIRDS}/metadata.csv"), r"metadata\.csv is missing; .* Get the files from https://nlp"),
        (
            "waterbirds",
            remove(f"{BIRDS}/005.Bird/Bird_5.jpg"),
            r"005\.Bird/Bird_5\.jpg is missing; .*, and all files that .*metadata\.csv names\. Get",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_missing(name: str, change: Change, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.trust(monkeypatch, name, data_files.WRITERS[name](tmp_path))
    change(tmp_path)
    with pytest.raises(FileNotFoundError, match=message) as raised:
        load(name, tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert re.search(r"https?://", str(raised.value))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "cifar10",
            truncate(f"{CIFAR}/data_batch_2"),
            r"data_batch_2 is truncated or was changed: its MD5 sum is [0-9a-f]{32}; expected the original file, whose "
            r"sum is [0-9a-f]{32}\. --download fetches it again once it is deleted, or get the files from https://www\.cs",
        ),
        ("cifar100", truncate("cifar-100-python/meta"), "meta is truncated or was changed"),
        ("svhn", truncate("train_32x32.mat"), r"train_32x32\.mat is truncated or was changed"),
        (
            "flowers102",
            truncate("flowers-102/imagelabels.mat"),
            r"flowers-102 has an imagelabels\.mat or setid\.mat that",
        ),
        ("flowers102", truncate("flowers-102/jpg/image_00002.jpg"), r"image_00002\.jpg cannot be read as an image"),
        (
            "gtsrb",
            truncate(f"{SIGNS}/00000_00002.ppm"),
            r"00007/00000_00002\.ppm cannot be read as an image .*; replace",
        ),
        (
            "gtsrb",
            cut_last_line(f"{SIGNS}/GT-00007.csv"),
            r"GT-00007\.csv does not name .*00005_00002\.ppm; expected a line for each image in .*00007\.",
        ),
        (
            "gtsrb",
            truncate("gtsrb/GT-final_test.csv", 0.97),
            r"GT-final_test\.csv holds 7 values in line 4; expected 8, as its first line names",
        ),
        ("tiny-imagenet", truncate(f"{TINY}/val/images/val_1.JPEG"), r"val_1\.JPEG cannot be read as an image"),
        (
            "tiny-imagenet",
            cut_last_line(f"{TINY}/val/val_annotations.txt"),
            r"val_annotations\.txt does not name .*val_3\.JPEG; expected a line for each image in .*val/images\.",
        ),
        (
            "tiny-imagenet",
            replace(f"{TINY}/val/val_annotations.txt", "\t62\n", "\n"),
            r"val_annotations\.txt holds 'val_0\.JPEG\\tn01641577\\t0\\t32\\t44' in line 1; expected a file, a class",
        ),
        (
            "celeba-hair",
            cut_last_line("celeba/list_attr_celeba.txt"),
            r"list_attr_celeba\.txt holds 15 images; expected 16, as its first line says",
        ),
        (
            "celeba-hair",
            cut_last_line("celeba/list_eval_partition.txt"),
            r"list_eval_partition\.txt does not name 000016\.jpg; expected the images that list_attr_celeba\.txt names",
        ),
        ("celeba-hair", truncate("celeba/img_align_celeba/000002.jpg"), r"000002\.jpg cannot be read as an image"),
        (
            "waterbirds",
            truncate(f"{BIRDS}/metadata.csv", 0.05),
            r"metadata\.csv lacks the column .*place; expected columns",
        ),
        (
            "waterbirds",
            cut_after(f"{BIRDS}/metadata.csv", "Bird_11.jpg,1"),
            r"metadata\.csv holds 3 values in line 13; expected 6, as its first line names",
        ),
        (
            "waterbirds",
            cut_last_line(f"{BIRDS}/metadata.csv"),
            r"metadata\.csv does not name .*Bird_11\.jpg; expected a line for each image",
        ),
        ("waterbirds", truncate(f"{BIRDS}/000.Bird/Bird_0.jpg"), r"Bird_0\.jpg cannot be read as an image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_truncated(name: str, change: Change, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.trust(monkeypatch, name, data_files.WRITERS[name](tmp_path))
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "cifar10",
            lambda root: data_files._dump(
                root / CIFAR / "test_batch", {"data": data_files._rows([0], 0), "labels": [10]}
            ),
            r"cifar-10-batches-py holds the label 10; expected labels from 0 to 9",
        ),
        (
            "cifar10",
            lambda root: data_files._dump(
                root / CIFAR / "test_batch", {"data": data_files._rows([0], 0), "labels": [1, 1]}
            ),
            r"cifar-10-batches-py holds 1 images and 2 labels; expected as many of each",
        ),
        (
            "svhn",
            lambda root: data_files.svhn(root, highest=12),
            r"train_32x32\.mat holds the label 12; expected labels from 0 to 9",
        ),
        (
            "flowers102",
            lambda root: data_files.flowers(root, labels=(77, 1, 103, 77, 1, 3)),
            r"imagelabels\.mat holds the label 102; expected labels from 0 to 101",
        ),
        (
            "flowers102",
            lambda root: data_files.flowers(root, labels=(77, 1, 3, 77, 1)),
            r"imagelabels\.mat has no label of image 6, which setid\.mat has; expected one each",
        ),
        (
            "gtsrb",
            replace(f"{SIGNS}/GT-00007.csv", "19;15;7", "19;15;8"),
            r"GT-00007\.csv says that 00000_00000\.ppm is of class 8; expected 7, as its folder says",
        ),
        ("gtsrb", replace("gtsrb/GT-final_test.csv", ";42", ";43"), "holds the label 43; expected labels from 0 to 42"),
        (
            "gtsrb",
            replace("gtsrb/GT-final_test.csv", ";42", ";stop"),
            r"GT-final_test\.csv holds ClassId 'stop' in line 4; expected the number of a class",
        ),
        (
            "tiny-imagenet",
            replace(f"{TINY}/val/val_annotations.txt", "n01443537", "n99999999"),
            r"val_annotations\.txt holds 'val_1.*n99999999.*' in line 2; expected a file, a class that train/ has",
        ),
        (
            "tiny-imagenet",
            lambda root: data_files.picture(root / TINY / "val/images/val_0.JPEG", 0, 0, (64, 60)),
            r"val_0\.JPEG cannot be read as an image \(it is of 64x60; expected 64x64\)",
        ),
        (
            "celeba-hair",
            replace("celeba/list_attr_celeba.txt", "Gray_Hair", "Grey_Hair"),
            r"list_attr_celeba\.txt lacks Gray_Hair; expected a count and 40 names",
        ),
        (
            "celeba-hair",
            replace("celeba/list_attr_celeba.txt", "000002.jpg -1", "000002.jpg  2"),
            r"list_attr_celeba\.txt holds '000002.*' in line 4; expected a file and 7 times 1 or -1",
        ),
        (
            "celeba-hair",
            replace("celeba/list_eval_partition.txt", "000001.jpg 0", "000001.jpg 3"),
            r"list_eval_partition\.txt holds '000001\.jpg 3' in line 1; expected a file and 0, 1 or 2",
        ),
        (
            "waterbirds",
            replace(f"{BIRDS}/metadata.csv", "Bird_1.jpg,1,0", "Bird_1.jpg,2,0"),
            r"metadata\.csv holds y '2' in line 3; expected one of 0, 1",
        ),
        ("waterbirds", replace(f"{BIRDS}/metadata.csv", ",place,", ",scene,"), r"metadata\.csv lacks the column place"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mislabelled(name: str, write: Change, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_files.WRITERS[name](tmp_path)
    write(tmp_path)
    data_files.trust(monkeypatch, name, tmp_path)
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path)


def test_pickles_that_were_changed_are_not_opened(tmp_path: Path) -> None:
    """These are the files of the tests, whose sums are not the original's: the error comes before the reading."""
    data_files.cifar10(tmp_path)
    (tmp_path / CIFAR / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match="data_batch_1 is truncated or was changed"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "path", "old", "new"),
    [
        ("waterbirds", f"{BIRDS}/metadata.csv", ",2,", ",1,"),
        ("celeba-hair", "celeba/list_eval_partition.txt", "jpg 2", "jpg 1"),
    ],
)
def test_a_split_may_not_be_empty(name: str, path: str, old: str, new: str, tmp_path: Path) -> None:
    table = data_files.WRITERS[name](tmp_path) / path
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(
        ValueError, match=rf"{table.name} holds no image of split 2; expected images of the splits 0, 1"
    ):
        load(name, tmp_path)


def test_too_few_samples_to_hold_some_out(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="of tiny-imagenet holds 12 samples, too few to hold a tenth of each class out"
    ):
        load("tiny-imagenet", data_files.tiny_imagenet(tmp_path, per_class=4))


@pytest.mark.parametrize("name", [name for name, known in data.DATA_SETS.items() if known.needs_root])
def test_the_root_has_to_be_given_and_to_exist(name: str, tmp_path: Path) -> None:
    message = rf"data is '{name}' and data_root is missing; give the folder that holds "
    with pytest.raises(ValueError, match=message):
        data.load(name)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(data=name)
    with pytest.raises(FileNotFoundError, match=r"the data root .*nowhere is not a folder; expected one that holds "):
        data.load(name, tmp_path / "nowhere", workers=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"missing; .* needs|holds no folder train"):
        data.load(name, tmp_path / "empty", workers=0)


@pytest.mark.parametrize(("package", "name"), [("scipy", "svhn"), ("scipy", "flowers102"), ("torchvision", "gtsrb")])
def test_a_missing_package_is_named(package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without(module: str, *arguments: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ModuleNotFoundError(f"no {package}", name=package)
        return original(module, *arguments)

    data_files.trust(monkeypatch, name, data_files.WRITERS[name](tmp_path))
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        ImportError, match=rf"{package} is not installed and is needed for .*; pip install 'rds_fast\[train\]'"
    ):
        data.load(name, tmp_path, workers=0)


def test_stratified_parts_share_nothing_and_leave_nothing_out() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 30)[
        torch.randperm(60, generator=torch.Generator().manual_seed(0))
    ]
    parts = sources.stratified(labels, (0.5, 0.2, 0.3), torch.Generator().manual_seed(1))
    assert [torch.bincount(labels[part]).tolist() for part in parts] == [[10, 5, 15], [4, 2, 6], [6, 3, 9]]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(60))
    assert all(torch.equal(part, part.sort().values) for part in parts)
