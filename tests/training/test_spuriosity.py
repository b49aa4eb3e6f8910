"""Spuriosity scores from files, in the order of a split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rds_fast.training import Images, data

IMAGES = Images(torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64))
FILES = data.image_files(
    ["/d/train/cat/1.jpg", "/d/train/dog/1.jpg", "/d/train/dog/2.jpg"], [0, 1, 1], ("cat", "dog"), 8, torch.tensor, 0
)
NAMED = [("cat/1.jpg", -0.5), ("2.jpg", 2.0), ("dog/1.jpg", 1.25), ("val/cat/9.jpg", 7.0)]


def written(path: Path, key: str, rows: list[tuple[object, object]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps([{key: name, "score": score} for name, score in rows]))
    else:
        path.write_text(f"{key},score\n" + "".join(f"{name},{score}\n" for name, score in rows))
    return path


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_scores_come_in_the_order_of_the_split(suffix: str, tmp_path: Path) -> None:
    by_file = written(tmp_path / f"a.{suffix}", "file", NAMED)
    scores = data.read_spuriosity(by_file, FILES)
    assert scores.dtype == torch.float64
    assert scores.tolist() == [-0.5, 1.25, 2.0]
    assert data.read_spuriosity(by_file, FILES.select(torch.tensor([2, 0]))).tolist() == [2.0, -0.5]
    by_index = written(tmp_path / f"b.{suffix}", "index", [(2, 0.25), (0, 1), (1, 3.5)])
    for split in (IMAGES, FILES):
        assert data.read_spuriosity(by_index, split).tolist() == [1.0, 3.5, 0.25]


def test_further_columns_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("class,file,index,score\n0,x.jpg,1,5\n0,y.jpg,0,4\n0,z.jpg,2,3\n")
    assert data.read_spuriosity(path, IMAGES).tolist() == [4.0, 5.0, 3.0]


INDICES = [(0, 1.0), (1, 1.0), (2, 1.0)]


@pytest.mark.parametrize(
    ("key", "rows", "split", "message"),
    [
        ("index", INDICES[:2], IMAGES, r"has no score of 1 of 3 samples \(2\); each needs one"),
        ("file", NAMED[:2], FILES, r"has no score of 1 of 3 samples \(/d/train/dog/1\.jpg\)"),
        ("index", [*INDICES, (1, 2.0)], IMAGES, "has two scores of 1; expected one of each sample"),
        ("index", [*INDICES, (3, 2.0)], IMAGES, "has a score of index 3; expected whole numbers from 0 to 2"),
        ("index", [*INDICES, ("a", 2.0)], IMAGES, "has a score of index a; expected whole numbers"),
        ("file", NAMED, IMAGES, "names files, and this split is held in memory, without files; give index,score"),
        ("file", [("1.jpg", 1.0)], FILES, r"names 1\.jpg, and 2 files end so; name the folder before it too"),
        (
            "index",
            [(0, "high")],
            IMAGES,
            r"cannot be read \(it holds .*high.* in line 2\); expected file,score or index,score",
        ),
        ("index", [(0, "nan")], IMAGES, r"cannot be read .*'nan'} in line 2"),
        ("name", INDICES, IMAGES, "cannot be read .*; expected file,score or index,score in every row"),
        ("index", [], IMAGES, "cannot be read .*; expected file,score or index,score in every row"),
    ],
)
def test_what_is_wrong_with_the_scores(key: str, rows: list, split: data.Split, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        data.read_spuriosity(written(tmp_path / "scores.csv", key, rows), split)
    assert "scores.csv" in str(raised.value)


@pytest.mark.parametrize("content", ["{", "3", '{"a": 1}', '[{"file": "cat/1.jpg"}]'])
def test_json_of_another_kind(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json cannot be read .*a list of objects"):
        data.read_spuriosity(path, FILES)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.csv; expected spuriosity scores"):
        data.read_spuriosity(tmp_path / "none.csv", IMAGES)
