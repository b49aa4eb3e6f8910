"""The data sets of photographs, written by the tests as the originals are: what is read of them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import data_files
import numpy as np
import pytest
import torch

from rds_fast.training import Images, Splits, TrainingConfig, data, load_model, models, train
from rds_fast.training.data import gtsrb

for package in ("torchvision", "scipy"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The root of each data set."""
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in data_files.WRITERS.items()}


@pytest.fixture
def load(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def load_trusted(name: str, seed: int = 0, image_size: int = 28) -> Splits:
        data_files.trust(monkeypatch, name, roots[name])
        return data.load(name, roots[name], seed, image_size=image_size, workers=0)

    return load_trusted


def everything(split: data.Split) -> Images:
    return split.take(torch.arange(len(split), device=split.index_device))


# The samples of each split, and how many classes there are.
SIZES = {
    "cifar10": ((108, 12, 24), 10),
    "cifar100": ((18, 2, 5), 100),
    "svhn": ((50, 10, 20), 10),
    "tiny-imagenet": ((27, 3, 4), 3),
    "gtsrb": ((43 * 15, 43 * 3, 3), 43),
    "flowers102": ((2, 2, 2), 102),
    "celeba-hair": ((5, 2, 3), 4),
    "waterbirds": ((4, 4, 4), 2),
}


@pytest.mark.parametrize("name", data_files.WRITERS)
def test_sizes_classes_and_labels(name: str, load) -> None:
    """The channel that is brightest tells the class modulo 3, so images and labels belong together."""
    splits = load(name)
    sizes, classes = SIZES[name]
    assert tuple(map(len, splits)) == sizes
    for split in splits:
        images = everything(split)
        assert split.classes == images.classes == classes
        assert len(split.class_names) == classes
        assert images.class_names == split.class_names
        assert images.images.shape == (len(split), *data.image_shape(name, 28))
        assert images.images.dtype == torch.uint8
        assert images.images.is_contiguous()
        assert images.labels.dtype == torch.int64
        assert torch.equal(images.labels, split.labels)
        if name not in ("celeba-hair", "flowers102"):
            assert torch.equal(images.images.float().mean((2, 3)).argmax(1), images.labels % 3)


@pytest.mark.parametrize("name", data_files.WRITERS)
def test_one_batch_of_each_goes_through_a_model(name: str, load) -> None:
    training = load(name).train
    model = models.build("cnn", data.image_shape(name, 28), training.classes)
    batch = data.Batch(torch.arange(2), seed=1, epoch=2)
    augmentation = TrainingConfig(data=name, data_root="x").augmentation
    ((images, labels),) = training.batches([batch], augmentation)
    assert model(data.in_unit_interval(images)).shape == (2, training.classes)
    assert torch.equal(labels, training.labels[:2])
    if training.groups is not None:
        assert torch.equal(training.groups[batch.indices], training.take(batch.indices).groups)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny-imagenet", "gtsrb"])
def test_validation_is_a_tenth_of_each_class_of_training_and_follows_the_seed(name: str, load) -> None:
    first, again, other = load(name), load(name), load(name, seed=1)
    counts = [torch.bincount(split.labels, minlength=split.classes) for split in first[:2]]
    total = counts[0] + counts[1]
    assert torch.equal(counts[1] > 0, total > 0)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    assert torch.equal(first.test.images, other.test.images)
    if name != "gtsrb":  # whose frames of one track are alike here
        images = torch.cat([first.train.images, first.validation.images]).flatten(1)
        assert len(images.unique(dim=0)) == len(images)


def test_pixels_are_those_of_the_files(load) -> None:
    """The first training image of CIFAR, whichever part it went to; the test image of SVHN; one of Tiny ImageNet."""
    expected = torch.from_numpy(data_files.pixels(1, 1, (32, 32)).transpose(2, 0, 1).copy())
    splits = load("cifar10")
    both = torch.cat([splits.train.images, splits.validation.images])
    assert (both == expected).all((1, 2, 3)).sum() == 1
    svhn = load("svhn").test
    assert svhn.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]  # the files say 10 of the last
    assert torch.equal(svhn.images[9], torch.from_numpy(data_files.pixels(0, 9, (32, 32)).transpose(2, 0, 1).copy()))
    tiny = load("tiny-imagenet").test
    original = data_files.pixels(2, 100, (64, 64)).transpose(2, 0, 1)
    assert np.abs(tiny.images[0].numpy().astype(int) - original).mean() < 30  # the noise is 0 to 100; JPEG blurs it
    assert tiny.labels.tolist() == [2, 0, 1, 1]


def test_class_names(load) -> None:
    assert load("cifar10").train.class_names[3] == "cat"
    assert load("cifar100").test.class_names[99] == "fine 99"
    assert load("tiny-imagenet").train.class_names == ("goldfish", "European fire salamander", "n01641577")
    assert load("flowers102").train.class_names[0] == "pink primrose"
    assert gtsrb.CLASS_NAMES[14] == "stop"
    assert gtsrb.CLASS_NAMES[38] == "keep right"
    assert len(set(gtsrb.CLASS_NAMES)) == 43


def test_no_track_of_gtsrb_is_on_both_sides(roots: dict[str, Path]) -> None:
    files = gtsrb._image_files(gtsrb._training(roots["gtsrb"] / "gtsrb/GTSRB/Training", roots["gtsrb"]), 0)
    parts = [{(int(files.targets[i]), os.path.basename(files.paths[i])[:5]) for i in part.tolist()}
             for part in gtsrb._by_tracks(files, seed=0)]  # fmt: skip
    assert not parts[0] & parts[1]
    assert [len(part) for part in parts] == [43 * 5, 43]


def test_flowers_take_the_authors_splits(load) -> None:
    splits = load("flowers102")
    assert [split.labels.tolist() for split in splits] == [[76, 76], [0, 0], [101, 2]]
    assert os.fsdecode(splits.validation.paths[0]).endswith("image_00002.jpg")


def test_celeba_leaves_out_what_has_not_one_hair_colour(load) -> None:
    train_split, validation, test = load("celeba-hair")
    assert train_split.class_names == ("black", "blond", "brown", "grey")
    # Of eight images: bald, none and two colours are left out; the last is blond. Every second one is of a man.
    assert train_split.labels.tolist() == [0, 1, 2, 3, 1]
    assert train_split.group_names == ("female", "male")
    assert train_split.groups.tolist() == [0, 1, 0, 1, 1]
    assert validation.labels.tolist() == [0, 2]
    assert test.groups.tolist() == [1, 1, 1]
    assert os.fsdecode(test.paths[-1]).endswith("000016.jpg")


def test_waterbirds_have_four_groups(load, tmp_path: Path) -> None:
    training = load("waterbirds").train
    assert training.group_names == (
        *("landbird on land", "landbird on water", "waterbird on land", "waterbird on water"),
    )
    assert training.labels.tolist() == [0, 1, 0, 1]
    assert training.groups.tolist() == [0, 2, 1, 3]
    bare = data.load("waterbirds", data_files.waterbirds(tmp_path, nested=False), image_size=28, workers=0)
    assert torch.equal(everything(bare.test).images, everything(load("waterbirds").test).images)


def test_groups_follow_their_samples(load) -> None:
    files = load("waterbirds").train
    order = torch.tensor([3, 0, 3])
    taken = files.take(order)
    for groups in (taken.groups, files.select(order).groups, everything(files).take(order).groups):
        assert groups.tolist() == [3, 0, 3]
    assert taken.to("meta").groups.device.type == files.to("meta").groups.device.type == "meta"
    assert taken.to("meta").group_names == files.group_names
    assert files.in_memory().groups.tolist() == [0, 2, 1, 3]
    empty = files.take(torch.arange(0))
    assert (empty.images.shape, empty.groups.shape) == ((0, 3, 28, 28), (0,))


def test_groups_and_names_go_together() -> None:
    images, labels = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="groups is given and group_names is missing; give both, or neither"):
        Images(images, labels, groups=labels)
    with pytest.raises(ValueError, match="group_names is given and groups is missing"):
        Images(images, labels, group_names=("a",))
    with pytest.raises(ValueError, match=r"groups is of shape \(3,\); there must be one for each of 2 samples"):
        Images(images, labels, groups=torch.zeros(3, dtype=torch.int64), group_names=("a",))


@pytest.mark.parametrize("name", ["cifar10", "flowers102", "gtsrb", "tiny-imagenet", "celeba-hair"])
def test_the_root_may_be_the_folder_itself(name: str, load, roots: dict[str, Path]) -> None:
    (folder,) = (path for path in roots[name].iterdir() if path.is_dir())
    expected = everything(load(name).test)
    assert torch.equal(everything(data.load(name, folder, image_size=28, workers=0).test).images, expected.images)


def test_a_root_may_be_called_as_the_folder_in_it(tmp_path: Path) -> None:
    root = data_files.celeba(tmp_path / "celeba")
    assert len(data.load("celeba-hair", root, image_size=28, workers=0).train) == 5


@pytest.mark.parametrize(
    "settings",
    [{"data": "cifar10", "augment": "crop-flip-cutout", "cutout": 8}, {"data": "waterbirds", "image_size": 20}],
    ids=lambda settings: settings["data"],
)
def test_a_run_from_files_to_a_model(
    settings: dict[str, object], roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = str(settings["data"])
    data_files.trust(monkeypatch, name, roots[name])
    config = TrainingConfig(
        data_root=str(roots[name]), model="cnn", epochs=6, batch_size=10, normalize=True, workers=0, **settings
    )
    result = train(config, tmp_path / "run", quiet=True)
    losses = [row["cross_entropy"] for row in result.metrics if row["kind"] == "epoch"]
    assert losses[-1] < losses[0]
    model, loaded = load_model(tmp_path / "run")
    assert loaded == config
    images = everything(config.load_data().test).images
    assert torch.equal(model(data.in_unit_interval(images)), result.model(data.in_unit_interval(images)))
