"""Small data sets in the formats of the originals. Pictures are noise, brightest in the channel ``label % 3``."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
# In the order of CelebA's file; the reader has to find its columns by name.
ATTRIBUTES = ("Bald", "Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Male", "Wearing_Hat")


def pixels(label: int, number: int, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3), bytes."""
    values = np.random.default_rng((label, number)).integers(0, 100, (*size, 3), np.uint8)
    values[..., label % 3] += 120
    return values


def picture(path: Path, label: int, number: int, size: tuple[int, int]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    quality = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    Image.fromarray(pixels(label, number, size)).save(path, **quality)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _dump(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def _rows(labels: np.ndarray, first: int) -> np.ndarray:
    """(N, 3072): red, green and blue planes of 32×32, one after the other."""
    images = [pixels(int(label), first + number, (32, 32)) for number, label in enumerate(labels)]
    return np.stack(images).transpose(0, 3, 1, 2).reshape(len(labels), -1)


def cifar10(root: Path, per_batch: int = 24) -> Path:
    """Five batches to train on and one to test on, in the first four classes."""
    folder = root / "cifar-10-batches-py"
    for position, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        labels = np.arange(per_batch) % 4
        _dump(folder / name, {"data": _rows(labels, position * per_batch), "labels": labels.tolist()})
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    _dump(folder / "batches.meta", {"label_names": names, "num_vis": 3072})
    return root


def cifar100(root: Path) -> Path:
    folder = root / "cifar-100-python"
    for part, count in (("train", 20), ("test", 5)):
        labels = np.repeat([0, 99], count // 2 + 1)[:count]
        content = {"data": _rows(labels, 0), "fine_labels": labels.tolist(), "coarse_labels": [0] * count}
        _dump(folder / part, content)
    _dump(folder / "meta", {"fine_label_names": [f"fine {k}" for k in range(100)], "coarse_label_names": ["coarse"]})
    return root


def svhn(root: Path, highest: int = 10) -> Path:
    """Labels from 1 to 10, 10 for the digit 0."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % highest + 1
        images = np.stack([pixels(int(label) % 10, number, (32, 32)) for number, label in enumerate(labels)])
        savemat(root / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)})
    return root


def gtsrb(root: Path, tracks: int = 6, frames: int = 3) -> Path:
    """Each class has tracks of frames of one sign; the test images lie in one folder."""
    base = root / "gtsrb"
    for label in range(43):
        rows = [HEADER]
        for track in range(tracks):
            for frame in range(frames):
                name = f"{track:05d}_{frame:05d}.ppm"
                picture(base / f"GTSRB/Training/{label:05d}/{name}", label, track, (20 + track, 24))
                rows.append(f"{name};24;{20 + track};5;5;19;15;{label}")
        (base / f"GTSRB/Training/{label:05d}/GT-{label:05d}.csv").write_text("\n".join(rows) + "\n")
    rows = [HEADER]
    for number, label in enumerate((16, 1, 42)):
        picture(base / f"GTSRB/Final_Test/Images/{number:05d}.ppm", label, number, (30, 29))
        rows.append(f"{number:05d}.ppm;29;30;5;6;24;25;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return root


WNIDS = ("n01443537", "n01629819", "n01641577")


def tiny_imagenet(root: Path, per_class: int = 10) -> Path:
    folder = root / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        names = [f"{wnid}_{number}.JPEG" for number in range(per_class)]
        for number, name in enumerate(names):
            picture(folder / "train" / wnid / "images" / name, label, number, (64, 64))
        boxes = "".join(f"{name}\t0\t10\t63\t58\n" for name in names)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    lines = []
    for number, label in enumerate((2, 0, 1, 1)):
        picture(folder / "val" / "images" / f"val_{number}.JPEG", label, 100 + number, (64, 64))
        lines.append(f"val_{number}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    words = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n"
    (folder / "words.txt").write_text(words)
    return root


def flowers(root: Path, labels: tuple[int, ...] = (77, 1, 102, 77, 1, 3)) -> Path:
    """Images 1 to 6; 1 and 4 are for training, 2 for validation, 3, 5 and 6 for the test."""
    from scipy.io import savemat

    folder = root / "flowers-102"
    for number, label in enumerate(labels, 1):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", label - 1, number, (50, 60 + number))
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels, np.uint8)[None]})
    savemat(
        folder / "setid.mat", {"trnid": np.array([[1, 4]]), "valid": np.array([[2, 5]]), "tstid": np.array([[3, 6]])}
    )
    return root


def celeba(root: Path) -> Path:
    """One image for each way in which hair may be described, men and women in turn, in three splits."""
    folder = root / "celeba"
    described = [
        "Black_Hair",
        "Blond_Hair",
        "Brown_Hair",
        "Gray_Hair",
        "Bald",
        "",
        "Black_Hair Gray_Hair",
        "Blond_Hair",
    ]
    rows, parts = [], []
    for number in range(16):
        held = {*described[number % 8].split(), *(["Male"] if number % 2 else [])}
        name = f"{number + 1:06d}.jpg"
        picture(folder / "img_align_celeba" / name, number % 8, number, (218, 178))
        rows.append(name + "".join(f" {1 if attribute in held else -1:2d}" for attribute in ATTRIBUTES))
        parts.append(f"{name} {0 if number < 8 else 1 + number % 2}")
    (folder / "list_attr_celeba.txt").write_text(f"{len(rows)}\n{' '.join(ATTRIBUTES)} \n" + "\n".join(rows) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


def waterbirds(root: Path, nested: bool = True) -> Path:
    folder = root / "waterbird_complete95_forest2water2" if nested else root
    rows = ["img_id,img_filename,y,split,place,place_filename"]
    for number in range(12):
        y, place, split = number % 2, number // 2 % 2, number // 4
        name = f"{number:03d}.Bird/Bird_{number}.jpg"
        picture(folder / name, y, number, (40, 50))
        rows.append(f'{number + 1},{name},{y},{split},{place},"/p/place, {number}.jpg"')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


def trust(patch: Any, name: str, root: Path) -> None:
    """Make torchvision expect the MD5 sums of the files under ``root``, for those sets of which it knows any."""
    from rds_fast.training.extras import require_torchvision

    datasets = require_torchvision("torchvision.datasets", "the tests")
    if name in ("cifar10", "cifar100"):
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        for group in ("train_list", "test_list"):
            names = [file for file, _ in getattr(kind, group)]
            patch.setattr(kind, group, [[file, md5(root / kind.base_folder / file)] for file in names])
        patch.setattr(kind, "meta", {**kind.meta, "md5": md5(root / kind.base_folder / kind.meta["filename"])})
    elif name == "svhn":
        files = {part: f"{part}_32x32.mat" for part in ("train", "test")}
        sums = {part: ["http://localhost", file, md5(root / file)] for part, file in files.items()}
        patch.setattr(datasets.SVHN, "split_list", {**datasets.SVHN.split_list, **sums})
    elif name == "flowers102":
        known = datasets.Flowers102._file_dict
        names = {key: file for key, (file, _) in known.items() if key != "image"}
        sums = {key: (file, md5(root / "flowers-102" / file)) for key, file in names.items()}
        patch.setattr(datasets.Flowers102, "_file_dict", {**known, **sums})


WRITERS = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "tiny-imagenet": tiny_imagenet,
    "gtsrb": gtsrb,
    "flowers102": flowers,
    "celeba-hair": celeba,
    "waterbirds": waterbirds,
}
