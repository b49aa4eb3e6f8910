"""Lists in text files: read in every usual encoding, or refused with file, line and what was expected."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import data_files
import pytest
import torch

from rds_fast.experiments import recipes
from rds_fast.training import Images, data
from rds_fast.training.data.lists import decode, read_lines, read_table

# Few frames, which take time to decode.
WRITERS = {**data_files.WRITERS, "gtsrb": partial(data_files.gtsrb, frames=1)}
BIRDS, TINY = "waterbird_complete95_forest2water2", "tiny-imagenet-200"
LISTS = [
    ("waterbirds", f"{BIRDS}/metadata.csv"),
    ("celeba-hair", "celeba/list_attr_celeba.txt"),
    ("celeba-hair", "celeba/list_eval_partition.txt"),
    ("gtsrb", "gtsrb/GT-final_test.csv"),
    ("gtsrb", "gtsrb/GTSRB/Training/00007/GT-00007.csv"),
    ("tiny-imagenet", f"{TINY}/val/val_annotations.txt"),
    ("tiny-imagenet", f"{TINY}/train/n01629819/n01629819_boxes.txt"),
    ("tiny-imagenet", f"{TINY}/words.txt"),
]


def blank_lines(content: str) -> bytes:
    return content.replace("\n", "\n\n  \n").encode()


EDITED: dict[str, Callable[[str], bytes]] = {
    "UTF-8 with mark": lambda content: content.encode("utf-8-sig"),
    "UTF-16": lambda content: content.encode("utf-16"),
    "UTF-16 big-endian": lambda content: b"\xfe\xff" + content.encode("utf-16-be"),
    "UTF-16 without mark": lambda content: content.encode("utf-16-le"),
    "UTF-32": lambda content: content.encode("utf-32"),
    "Windows": lambda content: content.replace("\n", "\r\n").encode(),
    "old Macintosh": lambda content: content.replace("\n", "\r").encode(),
    "blank lines": blank_lines,
    "blank Windows lines with mark": lambda content: blank_lines("\n" + content).replace(b"\n", b"\r\n"),
    "no last line ending": lambda content: content.rstrip("\n").encode(),
    "Latin-1": lambda content: (content.rstrip("\n") + "\n").encode("latin-1"),
}


def needs_torchvision() -> None:
    for package in ("torchvision", "scipy"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


@pytest.mark.parametrize("edited", EDITED)
def test_every_reader_reads_what_other_programs_save(edited: str, tmp_path: Path) -> None:
    needs_torchvision()
    for name in dict.fromkeys(name for name, _ in LISTS):
        root = WRITERS[name](tmp_path / name)
        before = data.load(name, root, image_size=28, workers=0)
        for path in [root / path for other, path in LISTS if other == name]:
            path.write_bytes(EDITED[edited](path.read_text()))
        after = data.load(name, root, image_size=28, workers=0)
        assert before.train.class_names == after.train.class_names
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a.labels, b.labels)
            assert [len(split) for split in before] == [len(split) for split in after]


@pytest.mark.parametrize("cut", ["first value", "half", "empty", "other"])
@pytest.mark.parametrize(("name", "path"), [entry for entry in LISTS if not entry[1].endswith("words.txt")])
def test_a_line_that_is_cut_is_named(name: str, path: str, cut: str, tmp_path: Path) -> None:
    """Or the file, where it holds no line at all."""
    needs_torchvision()
    if path.endswith("boxes.txt") and cut == "half":
        return  # half of the name is enough, without the suffix
    root = WRITERS[name](tmp_path)
    lines = (root / path).read_text().splitlines()
    if cut in ("empty", "other"):
        (root / path).write_bytes(b"" if cut == "empty" else bytes(range(256)) * 4)
    else:
        first = lines[3].replace(";", " ").replace(",", " ").split()[0]
        lines[3] = first[:3] if cut == "first value" else lines[3][: len(lines[3]) // 2]
        (root / path).write_text("\n".join(lines) + "\n")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        data.load(name, root, image_size=28, workers=0)
    message = str(raised.value)
    assert Path(path).name in message or "is missing" in message  # a boxes file cut in a name misses that file
    assert "expected" in message or "needs" in message
    assert not any(word in message for word in ("codec", "unpack", "StopIteration", "Traceback"))
    if cut in ("first value", "half") and not path.endswith("boxes.txt"):
        assert "in line 4" in message


SCORES = "file,score\ncat/1.jpg,-0.5\ncafé/2.jpg,2\n"
FILES = data.image_files(["/d/cat/1.jpg", "/d/café/2.jpg"], [0, 1], ("cat", "café"), 8, torch.tensor, 0)


@pytest.mark.parametrize("edited", EDITED)
def test_scores_are_read_in_every_encoding(edited: str, tmp_path: Path) -> None:
    objects = '[{"file": "cat/1.jpg",\n"score": -0.5}, {"file": "café/2.jpg", "score": 2}]\n'
    for name, content in (("a.csv", SCORES), ("a.TSV", SCORES.replace(",", "\t")), ("a.json", objects)):
        path = tmp_path / name
        path.write_bytes(EDITED[edited](content))
        assert data.read_spuriosity(path, FILES).tolist() == [-0.5, 2.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"it is empty\); expected columns score"),
        (b"\n\n", r"it is empty\); expected columns score"),
        (b"file,score\ncat/1.jpg\n", r"holds 1 values in line 2\); expected 2, as its first line names"),
        (b"file,score\ncat/1.jpg,1,2\n", r"holds 3 values in line 2\); expected 2"),
        (
            b'file,score\n"cat/1.jpg,1\ncat,2\n',
            r"it is no table in line 3 \(.*\)\); expected values whose quotes end",
        ),
        (b"file,score\ncat/1.jpg,\n", r"holds no score in line 2\); expected values of score"),
        (b"name,score\ncat,1\n", r"it has neither file nor index in line 2\); expected"),
    ],
)
def test_faults_of_scores_have_a_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"scores\.csv cannot be read \(.*{message}"):
        data.read_spuriosity(path, FILES)


def test_a_recipe_may_have_a_byte_order_mark_and_windows_line_endings(tmp_path: Path) -> None:
    content = recipes.text("block-mnist")
    for edited in ("UTF-8 with mark", "UTF-16", "Windows"):
        path = tmp_path / "own.toml"
        path.write_bytes(EDITED[edited](content))
        assert recipes.load(str(path)).variants == recipes.load("block-mnist").variants


def test_text_in_no_declared_encoding() -> None:
    assert decode("Vögel".encode()) == decode("Vögel".encode("cp1252")) == "Vögel"
    assert decode("„Vögel“".encode("cp1252")) == "„Vögel“"  # not in Latin-1
    assert decode(b"\x81V") == "\x81V"  # not in the code page
    assert decode(b"") == ""
    assert decode("file,score\n猫/犬.png,1\n".encode("utf-16-be")) == "file,score\n猫/犬.png,1\n"
    assert decode(b"file,score\n\0a.png,1\n") == "file,score\n\0a.png,1\n"  # a fault, which the reader names
    assert decode("ab".encode("utf-16")[:-1]) == "a\ufffd"  # cut within a letter


def damaged(found: str, expected: str) -> ValueError:
    return ValueError(f"{found}; expected {expected}")


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('\nb; "a";c\n\n 1;"x; y";\n;;\n2; z ;"3"  \n')
    rows = read_table(path, ("a", "b"), damaged)
    assert [(line, values["a"], values["b"]) for line, values in rows] == [(4, "x; y", "1"), (6, "z", "2")]
    with pytest.raises(ValueError, match="lacks the column d, e; expected columns a, d, e, named by the first line"):
        read_table(path, ("a", "d", "e"), damaged)
    assert read_lines(path)[0] == (2, 'b; "a";c')


def test_scores_of_a_split_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes("index;score\r\n1;2.5\r\n0;1\r\n".encode("utf-16"))
    images = Images(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    assert partial(data.read_spuriosity, path)(images).tolist() == [1.0, 2.5]
