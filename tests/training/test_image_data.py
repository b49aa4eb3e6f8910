"""Synthetic images and folders of images: what they give, and what is wrong with a folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import image_files
import pytest
import torch

from rds_fast.training import data
from rds_fast.training.data import Batch, sources, synthetic


def test_synthetic_images_have_the_size_and_classes_asked_for() -> None:
    splits = data.load("synthetic", image_size=20, classes=3, train_size=30)
    assert [len(split) for split in splits] == [30, 3, 3]
    images = splits.train.take(torch.arange(30)).images
    assert images.shape == (30, *data.image_shape("synthetic", 20))
    assert images.dtype == torch.uint8
    assert torch.bincount(splits.train.labels).tolist() == [10, 10, 10]
    assert splits.train.classes == 3


def test_synthetic_images_follow_the_seed() -> None:
    first, again, other = (data.load("synthetic", None, seed, image_size=8, train_size=16) for seed in (0, 0, 1))
    every = torch.arange(16)
    assert torch.equal(first.train.take(every).images, again.train.take(every).images)
    assert not torch.equal(first.train.take(every).images, other.train.take(every).images)
    assert not torch.equal(first.validation.take(every[:2]).images, first.test.take(every[:2]).images)


def test_synthetic_images_are_of_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest mean image of the training split tells the class, over the boundaries of chunks too."""
    monkeypatch.setattr(synthetic, "_CHUNK", 7)
    splits = data.load("synthetic", image_size=16, classes=5, train_size=100)
    train, test = (split.take(torch.arange(len(split))) for split in (splits.train, splits.test))
    means = torch.stack([train.images[train.labels == k].float().mean(0) for k in range(5)])
    nearest = torch.cdist(test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert torch.equal(nearest, test.labels)
    assert train.images.float().std() > 30  # and there is noise and contrast


def test_bytes_become_floats_in_the_unit_interval() -> None:
    x = data.in_unit_interval(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.tensor([0.0, 0.2, 1.0]))
    floats = torch.rand(3, dtype=torch.float64)
    assert data.in_unit_interval(floats) is floats


@pytest.fixture
def root(tmp_path: Path) -> Path:
    # Not by importing it: the first import of torchvision must be that of the code under test.
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    return image_files.write(tmp_path / "images")


def test_a_folder_is_three_splits(root: Path) -> None:
    splits = data.load("imagefolder", root, image_size=16, workers=0)
    assert [len(split) for split in splits] == [12, 6, 0]
    assert splits.train.class_names == ("blue", "green", "red")
    assert splits.train.classes == 3
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    image_files.write(root, splits=("test",))
    assert len(data.load("imagefolder", root, image_size=16, workers=0).test) == 6


def test_images_are_decoded_with_their_labels(root: Path) -> None:
    splits = data.load("imagefolder", root, image_size=16, workers=0)
    for split in (splits.train, splits.validation):
        taken = split.take(torch.tensor([len(split) - 1, 0]))
        assert taken.images.shape == (2, 3, 16, 16)
        assert taken.images.dtype == torch.uint8
        assert taken.labels.tolist() == [2, 0]
        # Red, green and blue pictures: the channel of the class is the brightest.
        assert taken.images.float().mean((2, 3)).argmax(1).tolist() == [0, 2]


def test_evaluation_sees_the_middle(root: Path) -> None:
    """224 of 256 pixels: of a picture with a dark margin of a sixteenth on each side nothing dark is left."""
    image_files.write_picture(root / "val" / "red" / "0.png", (255, 0, 0), size=(128, 128), margin=8)
    split = data.load("imagefolder", root, image_size=28, workers=0).validation
    (image,) = split.take(torch.tensor([4])).images
    assert image[0, 1:-1, 1:-1].min() == 255
    assert torch.equal(image, split.take(torch.tensor([4])).images[0])


def batches_of(root: Path, workers: int, keys: list[Batch], augment: str = "resized-crop-flip") -> list[torch.Tensor]:
    split = data.load("imagefolder", root, image_size=16, workers=workers).train
    return [images for images, _ in split.batches(keys, data.named_augmentation(augment, 5))]


# Python 3.12 warns of each fork of a process with threads, which torch has.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("augment", ["resized-crop-flip", "crop-flip-cutout"])
def test_crops_follow_from_seed_epoch_and_sample(root: Path, augment: str) -> None:
    indices = torch.tensor([3, 8, 1, 11])
    keys = [Batch(part, 5, epoch) for epoch in (0, 1) for part in indices.split(2)]
    state = torch.get_rng_state()
    alone, with_workers = batches_of(root, 0, keys, augment), batches_of(root, 2, keys, augment)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's numbers are not disturbed
    assert all(torch.equal(a, b) for a, b in zip(alone, with_workers, strict=True))
    # Whatever came before: the second half by itself, and in other batches.
    resumed = batches_of(root, 0, [Batch(indices, 5, 1)], augment)
    assert torch.equal(resumed[0], torch.cat(alone[2:]))
    assert not torch.equal(alone[0], alone[2])  # another epoch
    assert not torch.equal(alone[0], batches_of(root, 0, [Batch(indices[:2], 6, 0)], augment)[0])  # another seed


def test_files_that_are_evaluated_are_not_augmented(root: Path) -> None:
    split = data.load("imagefolder", root, image_size=16, workers=0).train
    taken = split.take(torch.arange(4)).images
    assert torch.equal(taken, split.take(torch.arange(4)).images)
    assert torch.equal(taken, next(split.batches([Batch(torch.arange(4), 3, 1)]))[0])
    assert torch.equal(taken, split.in_memory().images[:4])
    assert not torch.equal(taken, batches_of(root, 0, [Batch(torch.arange(4), 3, 1)])[0])


def remove(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        image_files.remove(root / path)

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            remove("."),
            FileNotFoundError,
            r"the data root .*images is not a folder; expected one that holds train/CLASS and",
        ),
        (remove("val"), FileNotFoundError, r"holds no folder val; expected train/CLASS and val/CLASS"),
        (
            lambda root: (remove("val")(root), remove("train")(root)),
            FileNotFoundError,
            "holds no folder train and no folder val",
        ),
        (
            lambda root: (remove("train")(root), (root / "train").mkdir()),
            FileNotFoundError,
            r"train holds no folders; expected one for each class",
        ),
        (
            lambda root: [path.unlink() for path in (root / "train" / "red").iterdir()],
            FileNotFoundError,
            r"train holds no images of red; expected files ending in \.jpg, \.jpeg, \.png",
        ),
        (remove("val/red"), ValueError, r"the classes under .* differ: val lacks red. Each needs the same folders"),
        (remove("train/red"), ValueError, r"differ: train lacks red\."),
        (
            lambda root: (root / "val" / "red").rename(root / "val" / "rouge"),
            ValueError,
            "differ: val lacks red; train lacks rouge",
        ),
    ],
    ids=["root", "val", "both", "no class", "empty class", "val class", "train class", "renamed"],
)
def test_what_is_wrong_with_a_folder(
    root: Path, change: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    change(root)
    with pytest.raises(error, match=message):
        data.load("imagefolder", root, image_size=16, workers=0)


def test_a_folder_has_to_be_named() -> None:
    with pytest.raises(ValueError, match="data is 'imagefolder' and data_root is missing"):
        data.load("imagefolder")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no picture", None], ids=["other", "truncated"])
def test_a_file_that_is_no_image_is_named(root: Path, workers: int, content: bytes | None) -> None:
    path = root / "train" / "green" / "1.png"
    path.write_bytes(content if content is not None else path.read_bytes()[:-30])
    with pytest.raises(
        ValueError, match=r"green/1\.png cannot be read as an image \(.*\); replace or remove it"
    ) as raised:
        batches_of(root, workers, [Batch(torch.tensor([4, 5]))])
    assert "Traceback" not in str(raised.value)


def test_many_names_are_cut_short() -> None:
    assert sources.few(list("abcdefg")) == "a, b, c, d, e and 2 more"
