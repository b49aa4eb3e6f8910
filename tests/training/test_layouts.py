"""Data sets as people have them: unpacked by other systems, sorted by hand, copied, linked, renamed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import data_files
import image_files
import pytest
import torch
from idx_files import write_set

from rds_fast.evaluation.other_data import load_like
from rds_fast.training import Images, Splits, data
from rds_fast.training.data import files

for package in ("torchvision", "scipy"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)

# Few frames, which take time to decode.
WRITERS = {**data_files.WRITERS, "gtsrb": partial(data_files.gtsrb, frames=2)}
TINY, BIRDS = "tiny-imagenet-200", "waterbird_complete95_forest2water2"


def load(name: str, root: Path) -> Splits:
    """All images in memory: the files may be moved afterwards."""
    return Splits(*(split.take(torch.arange(len(split))) for split in data.load(name, root, image_size=28, workers=0)))


def same(first: Splits, second: Splits) -> bool:
    """Whether the same pictures with the same labels and groups come in the same order."""

    def equal(a: Images, b: Images) -> bool:
        groups = a.groups is b.groups is None or torch.equal(a.groups, b.groups)
        return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and groups

    return all(map(equal, first, second))


def folder(root: Path) -> Path:
    return image_files.write(root / "images")


def test_folders_that_tools_make_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path)
    expected = load("imagefolder", root)
    made = [".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", "lost+found", ".cache", "$RECYCLE.BIN"]
    for place in ("train", "val", "train/red"):
        for name in made:
            (root / place / name).mkdir()
            image_files.write_picture(root / place / name / "0.png", (9, 9, 9))
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / "train/red" / name).write_bytes(b"\0\5\x16\7")
    assert load("imagefolder", root).train.class_names == ("blue", "green", "red")
    assert same(load("imagefolder", root), expected)
    assert capsys.readouterr() == ("", "")


def test_what_is_no_picture_is_counted_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path)
    for name in ("train/red/a.heic", "train/blue/b.HEIC", "val/red/a.txt", "val/red/README", "val/list.csv"):
        (root / name).write_bytes(b"")
    assert [len(split) for split in load("imagefolder", root)] == [12, 6, 0]
    output, said = capsys.readouterr()
    assert output == ""
    assert said == (
        "imagefolder: passed over 2 .heic, 1 without ending, 1 .csv, 1 .txt "
        "(files that Pillow reads as no pictures, or in no class's folder)\n"
    )
    for path in (root / "train/red").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(FileNotFoundError, match=r"train holds no images of red; expected .*, and there are 5 \.heic"):
        load("imagefolder", root)


def test_every_ending_that_pillow_reads_is_used(tmp_path: Path) -> None:
    from PIL import Image

    root = folder(tmp_path)
    for ending in (".jfif", ".jpe", ".JPG", ".gif", ".webp", ".tiff", ".jp2"):
        kind = {"format": "JPEG"} if ending in (".jfif", ".jpe") else {}
        Image.new("RGB", (30, 30), "red").save(root / "train/red" / f"picture{ending}", **kind)
    assert len(load("imagefolder", root).train) == 12 + 7
    assert {".jpg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".qoi", ".tga"} <= files.endings()
    assert not files.endings() & {".mpg", ".h5", ".eps", ".pdf", ".txt", ".csv"}


def test_the_order_is_torchvision_s(tmp_path: Path) -> None:
    """So that a run that began with its reader can be resumed: folders in folders, names of several lengths, links."""
    from rds_fast.training.extras import require_torchvision

    root = folder(tmp_path)
    for name in ("b/1.png", "a/2.png", "a-b/3.png", "10.png", "B/1.png"):
        (root / "train/red" / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train/red/0.png", root / "train/red" / name)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(root / "train/red/0.png", tmp_path / "elsewhere/9.png")
    (root / "train/red/linked").symlink_to(tmp_path / "elsewhere")
    theirs = require_torchvision("torchvision.datasets", "the tests").ImageFolder(str(root / "train"))
    ours = data.load("imagefolder", root, workers=0).train
    assert [os.fsdecode(path) for path in ours.paths] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets


def test_a_link_to_a_folder_above_is_followed_once(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "train/red/again").symlink_to(root / "train/red")
    assert len(load("imagefolder", root).train) == 12


@pytest.mark.parametrize(
    "names", [("train", "valid"), ("train", "validation"), ("Train", "Val"), ("training", "VALID")]
)
def test_splits_may_be_called_otherwise(names: tuple[str, str], tmp_path: Path) -> None:
    root = folder(tmp_path)
    expected = load("imagefolder", root)
    for old, new in zip(("train", "val"), names, strict=True):
        (root / old).rename(root / "moved")
        (root / "moved").rename(root / new)
    assert same(load("imagefolder", root), expected)
    if names[1] == "valid":  # the name of the documentation comes first
        shutil.copytree(root / "valid", root / "val")
        shutil.rmtree(root / "valid/red")
        assert same(load("imagefolder", root), expected)


def test_a_test_set_without_labels_is_refused_with_a_remedy(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "test").mkdir()
    image_files.write_picture(root / "test/0.png", (9, 9, 9))
    with pytest.raises(
        FileNotFoundError, match=r"test holds no folders; .* without labels .* rename the folder or move"
    ):
        load("imagefolder", root)
    shutil.rmtree(root / "test")
    (root / "test").write_text("a file is no split")
    assert len(load("imagefolder", root).test) == 0


def test_one_class_is_refused_where_labels_count(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for split in ("train", "val"):
        for name in ("red", "blue"):
            shutil.rmtree(root / split / name)
    with pytest.raises(
        ValueError,
        match=r"the data imagefolder have 1 class \(green\), which every model gets right; give a data root that holds "
        r"train/CLASS and val/CLASS, .* of two or more",
    ):
        load("imagefolder", root)
    reference = Images(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    assert len(load_like(f"imagefolder={root}", reference, 2, 0)) == 2
    with pytest.raises(ValueError, match=r"the data synthetic have 1 class \(0\), .*; give classes of 2 or more"):
        data.load("synthetic", image_size=8, classes=1, train_size=8)


def rename_suffix(root: Path, old: str, new: str, *, lists: bool = True) -> None:
    """Of all files; ``lists``: in the lists too."""
    for path in list(root.rglob(f"*{old}")):
        path.rename(path.with_suffix(new))
    for path in [*root.rglob("*.csv"), *root.rglob("*.txt")] if lists else []:
        path.write_text(path.read_text().replace(old, new))


def beside(root: Path, name: str) -> Path:
    """A folder moved away, and a link to it in its place."""
    moved = root.parent / f"store-{Path(name).name}"
    shutil.move(root / name, moved)
    (root / name).symlink_to(moved)
    return root


def as_png(root: Path, suffix: str) -> None:
    """The same pixels under another suffix: the content decides the format, not the name."""
    rename_suffix(root, suffix, ".png")


def twice_nested(name: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / name).rename(root / "inner")
        (root / name).mkdir()
        (root / "inner").rename(root / name / name)

    return change


def unlisted(*names: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        for name in names:
            data_files.picture(root / name, 0, 0, (9, 9))

    return change


def kaggle_celeba(root: Path) -> None:
    """CSV lists, and the images in a folder of the same name in their folder."""
    base = root / "celeba"
    _, names, *rows = (base / "list_attr_celeba.txt").read_text().splitlines()
    table = [["image_id", *names.split()], *(row.split() for row in rows)]
    (root / "list_attr_celeba.csv").write_text("".join(",".join(row) + "\n" for row in table))
    parts = (base / "list_eval_partition.txt").read_text().replace(" ", ",")
    (root / "list_eval_partition.csv").write_text("image_id,partition\n" + parts)
    (root / "img_align_celeba").mkdir()
    (base / "img_align_celeba").rename(root / "img_align_celeba/img_align_celeba")
    shutil.rmtree(base)


def authors_celeba(root: Path) -> None:
    base = root / "celeba"
    for place in ("Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt", "Img/img_align_celeba"):
        (base / place).parent.mkdir()
        (base / Path(place).name).rename(base / place)


def kaggle_gtsrb(root: Path) -> None:
    """Train/CLASS/CLASS_TRACK_FRAME and Test, in two lists with commas whose paths begin there."""
    base = root / "gtsrb"
    lists: dict[str, list[str]] = {"Train": [], "Test": []}
    for label in range(43):
        source = base / f"GTSRB/Training/{label:05d}"
        (root / f"Train/{label}").mkdir(parents=True)
        for path in sorted(source.glob("*.ppm")):
            name = f"Train/{label}/{label:05d}_{path.stem}.png"
            path.rename(root / name)
            lists["Train"].append(f"24,20,5,5,19,15,{label},{name}")
    (root / "Test").mkdir()
    for row in (base / "GT-final_test.csv").read_text().splitlines()[1:]:
        name, *box, label = row.split(";")
        (base / "GTSRB/Final_Test/Images" / name).rename(root / f"Test/{name[:-4]}.png")
        lists["Test"].append(",".join([*box, label, f"Test/{name[:-4]}.png"]))
    for part, rows in lists.items():
        header = "Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path"
        (root / f"{part}.csv").write_text("\r\n".join([header, *rows]) + "\r\n")
    shutil.rmtree(base)


def kaggle_gtsrb_in_small_letters(root: Path) -> None:
    kaggle_gtsrb(root)
    for path in [root / name for name in ("Train", "Test", "Train.csv", "Test.csv")]:
        path.rename(path.with_name(path.name.lower()))


def move(name: str, new: str) -> Callable[[Path], object]:
    """A file or folder of the root, to another name below it."""

    def change(root: Path) -> None:
        (root / name).rename(root / "moved")
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / "moved").rename(root / new)

    return change


def in_turn(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: [change(root) for change in changes] and None


def final_gtsrb(root: Path) -> None:
    (root / "gtsrb/GTSRB/Final_Training").mkdir()
    (root / "gtsrb/GTSRB/Training").rename(root / "gtsrb/GTSRB/Final_Training/Images")


def sorted_val(
    inner: str, keep_list: bool, to: str = "val", put: Callable[..., object] = shutil.move
) -> Callable[[Path], object]:
    """Tiny ImageNet's val in folders of classes, as most scripts leave it."""

    def change(root: Path) -> None:
        val = root / TINY / "val"
        for line in (val / "val_annotations.txt").read_text().splitlines():
            name, wnid = line.split("\t")[:2]
            (root / TINY / to / wnid / inner).mkdir(parents=True, exist_ok=True)
            put(val / "images" / name, root / TINY / to / wnid / inner / name)
        if not any((val / "images").iterdir()):
            (val / "images").rmdir()
        if not keep_list:
            (val / "val_annotations.txt").unlink()

    return change


def flat_train(root: Path) -> None:
    for images in (root / TINY / "train").glob("*/images"):
        for path in images.iterdir():
            path.rename(images.parent / path.name)
        images.rmdir()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("waterbirds", lambda root: beside(root / BIRDS, "000.Bird")),
        ("waterbirds", lambda root: beside(root, BIRDS)),
        ("waterbirds", lambda root: as_png(root, ".jpg")),
        ("waterbirds", lambda root: rename_suffix(root, ".jpg", ".JPG")),
        ("waterbirds", lambda root: rename_suffix(root, ".jpg", ".JPG", lists=False)),
        ("waterbirds", lambda root: rename_suffix(root, ".jpg", ".jpeg", lists=False)),
        ("waterbirds", unlisted(f"{BIRDS}/montage.jpg", f"{BIRDS}/000.Bird/montage.jpg")),
        ("waterbirds", twice_nested(BIRDS)),
        ("waterbirds", move(BIRDS, "waterbirds_v1.0")),
        ("waterbirds", lambda root: (root / BIRDS / "000.Bird/loop").symlink_to("loop")),
        ("cifar10", twice_nested("cifar-10-batches-py")),
        ("cifar10", move("cifar-10-batches-py", "cifar-10-python/cifar-10-batches-py")),
        (
            "svhn",
            in_turn(move("train_32x32.mat", "SVHN/train_32x32.mat"), move("test_32x32.mat", "SVHN/test_32x32.mat")),
        ),
        ("celeba-hair", kaggle_celeba),
        (
            "celeba-hair",
            in_turn(
                kaggle_celeba,
                lambda root: root.rename(root.parent / "celeba"),
                lambda root: root.mkdir(),
                lambda root: (root.parent / "celeba").rename(root / "archive"),
            ),
        ),
        ("celeba-hair", move("celeba", "CelebA")),
        ("celeba-hair", authors_celeba),
        ("celeba-hair", lambda root: beside(root / "celeba", "img_align_celeba")),
        ("celeba-hair", lambda root: rename_suffix(root, ".jpg", ".png", lists=False)),
        ("gtsrb", kaggle_gtsrb),
        ("gtsrb", kaggle_gtsrb_in_small_letters),
        ("gtsrb", final_gtsrb),
        ("gtsrb", move("gtsrb/GT-final_test.csv", "gtsrb/GTSRB/GT-final_test.csv")),
        ("gtsrb", move("gtsrb/GT-final_test.csv", "gtsrb/GTSRB/Final_Test/Images/GT-final_test.csv")),
        (
            "gtsrb",
            in_turn(
                final_gtsrb,
                move("gtsrb/GT-final_test.csv", "gtsrb/GTSRB/GT-final_test.csv"),
                move("gtsrb/GTSRB", "tiny"),
            ),
        ),
        ("gtsrb", lambda root: beside(root / "gtsrb/GTSRB/Training", "00003")),
        ("gtsrb", lambda root: rename_suffix(root, ".ppm", ".png", lists=False)),
        ("tiny-imagenet", sorted_val("", keep_list=False)),
        ("tiny-imagenet", sorted_val("images", keep_list=False)),
        ("tiny-imagenet", sorted_val("", keep_list=True)),
        ("tiny-imagenet", sorted_val("", keep_list=True, put=shutil.copy)),
        ("tiny-imagenet", sorted_val("", keep_list=False, put=shutil.copy)),
        ("tiny-imagenet", sorted_val("", keep_list=True, to="val/images")),
        ("tiny-imagenet", sorted_val("", keep_list=False, to="val/images")),
        ("tiny-imagenet", move(f"{TINY}/val", f"{TINY}/valid")),
        ("tiny-imagenet", flat_train),
        ("tiny-imagenet", twice_nested(TINY)),
        ("tiny-imagenet", lambda root: (root / TINY).rename(root / "tiny") and None),
        ("tiny-imagenet", lambda root: rename_suffix(root, ".JPEG", ".jpg", lists=False)),
        ("flowers102", lambda root: rename_suffix(root, ".jpg", ".JPG")),
        ("flowers102", lambda root: beside(root / "flowers-102", "jpg")),
        ("flowers102", twice_nested("flowers-102")),
    ],
)
def test_the_same_data_in_another_layout(
    name: str, change: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = WRITERS[name](tmp_path / "root")
    data_files.trust(monkeypatch, name, root)
    expected = load(name, root)
    change(root)
    assert same(load(name, root / "tiny" if (root / "tiny").exists() else root), expected)


def test_a_root_may_be_a_link_by_the_name_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = data_files.cifar10(tmp_path)
    data_files.trust(monkeypatch, "cifar10", root)
    expected = load("cifar10", root)
    beside(root, "cifar-10-batches-py")
    assert same(load("cifar10", root / "cifar-10-batches-py"), expected)


def test_archives_of_digits_unpacked_into_folders_of_their_names(tmp_path: Path) -> None:
    for path in list(write_set(tmp_path).iterdir()):
        move(path.name, f"{path.name}/{path.name}")(tmp_path)
    assert [len(split) for split in data.load("mnist", tmp_path)] == [220, 20, 40]


@pytest.mark.parametrize("root", ["", "MNIST", "MNIST/raw"])
def test_digits_where_torchvision_keeps_them(root: str, tmp_path: Path) -> None:
    write_set(tmp_path / "MNIST/raw")
    for path in list((tmp_path / "MNIST/raw").iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert [len(split) for split in data.load("mnist", tmp_path / root)] == [220, 20, 40]


PICTURES = ("waterbirds", "celeba-hair", "gtsrb", "tiny-imagenet", "flowers102")


@pytest.mark.parametrize("name", PICTURES)
def test_what_macos_leaves_beside_each_file_is_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = WRITERS[name](tmp_path)
    data_files.trust(monkeypatch, name, root)
    expected = load(name, root)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    for path in [path for path in root.rglob("*") if path.is_dir()]:
        (path / "__MACOSX").mkdir()
    assert same(load(name, root), expected)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "waterbirds",
            unlisted(f"{BIRDS}/000.Bird/Bird_77.jpg"),
            ValueError,
            r"metadata\.csv does not name .*000\.Bird/Bird_77\.jpg; expected a line for each image",
        ),
        (
            "celeba-hair",
            unlisted("celeba/img_align_celeba/a/000003.jpg", "celeba/img_align_celeba/000003.png"),
            None,
            "",
        ),
        (
            "gtsrb",
            lambda root: (kaggle_gtsrb(root), (root / "Train/7/00007_00001_00001.png").unlink()),
            FileNotFoundError,
            r"Train/7/00007_00001_00001\.png is missing",
        ),
        (
            "gtsrb",
            lambda root: (kaggle_gtsrb(root), shutil.move(root / "Train/7/00007_00001_00001.png", root / "Train/8")),
            FileNotFoundError,
            r"Train/7/00007_00001_00001\.png is missing",
        ),
        (
            "tiny-imagenet",
            lambda root: (
                sorted_val("", keep_list=True)(root),
                shutil.move(root / TINY / "val/n01641577/val_0.JPEG", root / TINY / "val/n01443537/val_0.JPEG"),
            ),
            ValueError,
            r"val_annotations\.txt gives .*n01443537/val_0\.JPEG to n01641577; expected the class of its folder",
        ),
        (
            "tiny-imagenet",
            lambda root: (
                sorted_val("", keep_list=False)(root),
                (root / TINY / "val/n01641577").rename(root / TINY / "val/n0"),
            ),
            ValueError,
            r"val holds n0; expected folders of the classes that train/ has",
        ),
    ],
)
def test_a_layout_that_contradicts_itself(
    name: str, change: Callable[[Path], object], error: type[Exception] | None, message: str, tmp_path: Path
) -> None:
    root = WRITERS[name](tmp_path)
    change(root)
    if error is None:  # the file in the place that the list gives is the one that it means
        load(name, root)
    else:
        with pytest.raises(error, match=message):
            load(name, root)


def test_a_list_may_be_ambiguous(tmp_path: Path) -> None:
    root = data_files.waterbirds(tmp_path)
    metadata = root / BIRDS / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("000.Bird/", ""))
    unlisted(f"{BIRDS}/other/Bird_0.jpg")(root)
    with pytest.raises(ValueError, match=r"metadata\.csv names Bird_0\.jpg, and .*Bird_0\.jpg, .*Bird_0\.jpg end so"):
        load("waterbirds", root)
    shutil.rmtree(root / BIRDS / "other")
    assert len(load("waterbirds", root).train) == 4


def test_names_may_lead_out_of_the_root(tmp_path: Path) -> None:
    root = data_files.waterbirds(tmp_path / "root")
    expected = load("waterbirds", root)
    metadata = root / BIRDS / "metadata.csv"
    (root / BIRDS / "000.Bird/Bird_0.jpg").rename(tmp_path / "a.jpg")
    (root / BIRDS / "001.Bird/Bird_1.jpg").rename(tmp_path / "b.jpg")
    text = metadata.read_text().replace("000.Bird/Bird_0.jpg", "../../a.jpg")
    metadata.write_text(text.replace("001.Bird/Bird_1.jpg", str(tmp_path / "b.jpg")))
    assert same(load("waterbirds", root), expected)


def rename(path: Path, name: bytes) -> None:
    try:
        os.rename(path, os.fsencode(path.parent) + b"/" + name)
    except OSError:
        pytest.skip("this disk holds names in UTF-8 alone")


def test_classes_may_be_called_in_an_old_encoding(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for split in ("train", "val"):
        rename(root / split / "blue", b"b\xe9ton")
    splits = load("imagefolder", root)
    assert splits.train.class_names == ("béton", "green", "red")
    assert splits.train.images.float().mean((2, 3)).argmax(1)[:4].tolist() == [2, 2, 2, 2]


def test_classes_in_the_letters_of_several_systems_are_one(tmp_path: Path) -> None:
    """macOS writes an accent apart from its letter."""
    root = folder(tmp_path)
    expected = load("imagefolder", root)
    for split in ("train", "val"):
        (root / split / "blue").rename(root / split / "bl\u00fce")
    (root / "val/bl\u00fce").rename(root / "val/blu\u0308e")
    (root / "train/blu\u0308e").mkdir()
    (root / "train/bl\u00fce/0.png").rename(root / "train/blu\u0308e/0.png")
    splits = load("imagefolder", root)
    assert splits.train.class_names == ("bl\u00fce", "green", "red")
    assert same(splits, expected)


def test_names_of_other_systems_are_found(tmp_path: Path) -> None:
    """Backslashes of Windows; accents apart from their letters, as macOS writes them; names in Latin-1 on the disk."""
    root = data_files.waterbirds(tmp_path)
    bird, metadata = root / BIRDS / "000.Bird", root / BIRDS / "metadata.csv"
    (bird / "Bird_0.jpg").rename(bird / "Vo\u0308gel_0.jpg")
    rename(root / BIRDS / "001.Bird/Bird_1.jpg", b"V\xf6gel_1.jpg")
    text = metadata.read_text().replace("000.Bird/Bird_0", r"000.Bird\Vögel_0")
    metadata.write_text(text.replace("001.Bird/Bird_1", "001.Bird/Vögel_1"), encoding="utf-8")
    splits = load("waterbirds", root)
    assert splits.train.images.float().mean((2, 3)).argmax(1).tolist() == [0, 1, 0, 1]
