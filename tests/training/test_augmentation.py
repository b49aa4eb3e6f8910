"""Augmentation: what is drawn follows from seed, epoch and sample alone, and the images are what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rds_fast.training import Images, TrainingConfig, data, models, train
from rds_fast.training.data import augmentation, randomness
from rds_fast.training.order import Order

EPOCHS = 40


def pictures(samples: int = 6, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """No two pixels of an image are equal, none is black, and they are not square."""
    values = torch.arange(1, 1 + samples * 3 * 5 * 7).reshape(samples, 3, 5, 7)
    return (values % 255 + 1).clamp_max(255).to(dtype) if dtype == torch.uint8 else values.to(dtype) / 1000


def split_of(images: torch.Tensor) -> Images:
    return Images(images, torch.arange(len(images)))


def drawn(name: str, images: torch.Tensor, indices: torch.Tensor, seed: int = 3, epoch: int = 1) -> torch.Tensor:
    batch = data.Batch(indices, seed, epoch)
    ((changed, labels),) = split_of(images).batches([batch], data.named_augmentation(name, 3))
    assert torch.equal(labels, indices)
    return changed


def test_splitmix_gives_its_published_numbers() -> None:
    """The first three outputs from the state 0, in hexadecimal."""
    states = torch.tensor([1, 2, 3]) * randomness._signed(randomness._STEP)
    mixed = [value % 2**64 for value in randomness._mixed(states).tolist()]
    assert mixed == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_numbers_of_a_sample_are_its_own() -> None:
    indices = torch.arange(1000)
    numbers = randomness.sample_numbers(7, 2, indices, 5)
    assert numbers.shape == (1000, 5)
    assert torch.equal(numbers[indices % 3 == 1], randomness.sample_numbers(7, 2, indices[indices % 3 == 1], 5))
    assert torch.equal(numbers[:, :2], randomness.sample_numbers(7, 2, indices, 2))
    others = [randomness.sample_numbers(7, 3, indices, 5), randomness.sample_numbers(8, 2, indices, 5)]
    assert all((numbers != other).float().mean() > 0.99 for other in others)
    assert len(numbers.unique()) > 4990  # of 5000 in 2**31: none or one are equal, not whole columns
    assert numbers.min() >= 0
    assert numbers.max() < 2**31
    correlations = torch.corrcoef(numbers.double().T) - torch.eye(5)
    assert correlations.abs().max() < 0.15  # its standard deviation is 1 / sqrt(1000) = 0.03
    assert abs(float(numbers.double().mean()) / 2**30 - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image(flip: bool, dtype: torch.dtype) -> None:
    """Each result is one of the 81 windows, mirrored or not, and over epochs all offsets are drawn about equally."""
    images = pictures(dtype=dtype)
    padded = torch.nn.functional.pad(images, [4] * 4)
    seen: list[tuple[int, int, bool]] = []
    for epoch in range(EPOCHS):
        changed = drawn("crop-flip" if flip else "crop", images, torch.arange(6), epoch=epoch)
        assert changed.dtype == dtype
        assert changed.shape == images.shape
        for sample in range(6):
            found = [
                (top, left, mirrored)
                for top in range(9)
                for left in range(9)
                for mirrored in ((False, True) if flip else (False,))
                if torch.equal(changed[sample], window(padded[sample], top, left, mirrored))
            ]
            assert found, "no window"
            seen += found[:1]
    for offsets in zip(*seen, strict=True):
        assert set(offsets) in (set(range(9)), {False, True} if flip else {False})
    assert len({(top, left) for top, left, _ in seen}) > 60  # of 81, in 240 draws: one does not follow from the other
    if flip:
        assert 0.35 < sum(mirrored for *_, mirrored in seen) / len(seen) < 0.65


def window(padded: torch.Tensor, top: int, left: int, mirrored: bool) -> torch.Tensor:
    part = padded[:, top : top + 5, left : left + 7]
    return part.flip(2) if mirrored else part


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_cutout_paints_one_square_with_the_mean(dtype: torch.dtype) -> None:
    images = pictures(4, dtype)
    sizes = set()
    for epoch in range(EPOCHS):
        cut = augmentation.Augmentation(cutout=3)(images, torch.arange(4), 0, epoch)
        changed = (cut != images).any(1)
        for sample in range(4):
            rows, columns = (changed[sample].any(dim).nonzero().flatten() for dim in (1, 0))
            # A rectangle of at most 3×3 without gaps; smaller where the edge cuts it.
            assert 1 <= len(rows) <= 3
            assert 1 <= len(columns) <= 3
            assert changed[sample].sum() >= len(rows) * len(columns) - 1  # a pixel may have the mean's value already
            sizes.add((len(rows), len(columns)))
            mean = images[sample].double().mean((1, 2))
            mean = mean.round() if dtype == torch.uint8 else mean
            inside = cut[sample][:, changed[sample]]
            assert torch.equal(inside, mean.to(dtype)[:, None].expand_as(inside))
    assert {(3, 3), (2, 3), (3, 2), (2, 2)} <= sizes


def test_the_middle_of_the_square_is_any_pixel() -> None:
    """Over many samples each pixel of a 4×6 image is painted as often as the squares around its neighbours say."""
    images = torch.ones(6000, 1, 4, 6)
    images[..., 0, 0] = 0  # so that the mean, 23/24, differs from all
    painted = (augmentation.Augmentation(cutout=1)(images, torch.arange(6000), 0, 0) != images).float().mean((0, 1))
    torch.testing.assert_close(painted, torch.full((4, 6), 1 / 24), atol=0.012, rtol=0)  # four standard deviations


def test_cutout_comes_after_the_crop() -> None:
    images, indices = pictures(), torch.arange(6)
    cropped = drawn("crop-flip", images, indices)
    both = drawn("crop-flip-cutout", images, indices)
    differs = (both != cropped).any(1).flatten(1).sum(1)
    assert (differs <= 9).all()
    assert differs.sum() > 6
    assert torch.equal(
        drawn("crop-cutout", images, indices), augmentation.Augmentation(crop=True, cutout=3)(images, indices, 3, 1)
    )


@pytest.mark.parametrize("name", ["crop", "crop-flip", "crop-cutout", "crop-flip-cutout"])
def test_a_sample_is_changed_alike_in_any_batch(name: str) -> None:
    images = pictures(8)
    whole = drawn(name, images, torch.arange(8))
    order = torch.tensor([5, 2, 7])
    assert torch.equal(drawn(name, images, order), whole[order])
    assert not torch.equal(drawn(name, images, torch.arange(8), epoch=2), whole)
    assert not torch.equal(drawn(name, images, torch.arange(8), seed=4), whole)
    before = torch.get_rng_state()
    assert torch.equal(drawn(name, images, torch.arange(8)), whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn(name, images, torch.arange(0)).shape == (0, 3, 5, 7)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(drawn(name, channels_last, torch.arange(8)), whole)


def test_none_gives_the_images_and_leaves_them_alone() -> None:
    images = pictures()
    original = images.clone()
    assert torch.equal(drawn("none", images, torch.arange(6)), images)
    drawn("crop-flip-cutout", images, torch.arange(6))
    assert torch.equal(images, original)
    assert augmentation.NO_AUGMENTATION(images, torch.arange(6), 0, 0) is images


def test_training_sees_augmented_images_and_validation_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(
        data="synthetic", image_size=12, classes=2, train_size=16, model="cnn", batch_size=8, epochs=2, seed=5,
        augment="crop-flip-cutout", cutout=5, device="cpu", objective="cross-entropy",
    )  # fmt: skip
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    build = models.build

    def watched(*arguments: Any, **settings: Any) -> torch.nn.Module:
        model = build(*arguments, **settings)
        model.register_forward_pre_hook(lambda module, inputs: seen[module.training].append(inputs[0].clone()))
        return model

    monkeypatch.setattr(models, "build", watched)
    splits = config.load_data()
    train(config, tmp_path / "run", quiet=True, splits=splits)
    order = Order(16, 8, 5, torch.device("cpu"))
    expected = [
        batch for step in range(4) for batch, _ in splits.train.batches([order.batch(step)], config.augmentation)
    ]
    assert len(seen[True]) == len(expected) == 4
    for images, augmented in zip(seen[True], expected, strict=True):
        assert torch.equal(images, data.in_unit_interval(augmented))
    validation = data.in_unit_interval(splits.validation.take(torch.arange(2)).images)
    _, *validated = seen[False]  # the first finds out whether the model can take such images
    assert [torch.equal(images, validation) for images in validated] == [True, True]


def test_images_in_memory_have_one_size() -> None:
    with pytest.raises(ValueError, match="'resized-crop-flip' and these images are held in memory in one size"):
        drawn("resized-crop-flip", pictures(), torch.arange(2))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, augmentation.NO_AUGMENTATION),
        ({"augment": "crop"}, augmentation.Augmentation(crop=True)),
        ({"data": "fashion-mnist", "augment": "crop-flip"}, augmentation.Augmentation(crop=True, flip=True)),
        (
            {"data": "synthetic", "augment": "crop-flip-cutout", "cutout": 8},
            augmentation.Augmentation(crop=True, flip=True, cutout=8),
        ),
        ({"data": "imagefolder", "data_root": "x"}, augmentation.Augmentation(resized_crop=True)),
        ({"data": "waterbirds", "data_root": "x", "augment": "none"}, augmentation.NO_AUGMENTATION),
        ({"data": "synthetic"}, augmentation.NO_AUGMENTATION),
        ({"data": "tiny-imagenet", "data_root": "x"}, augmentation.NO_AUGMENTATION),
    ],
    ids=str,
)
def test_the_settings_name_an_augmentation(settings: dict[str, str], expected: augmentation.Augmentation) -> None:
    assert TrainingConfig(**settings).augmentation == expected
