"""Text files that people edit, as every reader of a list reads them: any usual encoding, line ending and delimiter."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# The error of a reader for a fault in its file: of what was found, and what was expected.
Damaged = Callable[[str, str], ValueError]

_MARKS = {  # UTF-32 first: its mark in the byte order of PCs begins as that of UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode(content: bytes) -> str:
    """The text of bytes in UTF-8, UTF-16 or UTF-32, or else in the code page of Western Windows or Latin-1.

    A byte-order mark decides. UTF-16 without one is told by the zero bytes of its Latin letters.
    """
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    zeros = {"utf-16-be": content[:1000:2].count(0), "utf-16-le": content[1:1000:2].count(0)}
    likely = max(zeros, key=zeros.__getitem__)
    if zeros[likely] > min(len(content), 1000) // 8:  # a quarter of the letters; fewer are a fault within other text
        return content.decode(likely, errors="replace")
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")  # in which every byte is a letter


def read_text(path: Path) -> str:
    """The text of a file, its lines ended by ``\\n``; see ``decode``."""
    return decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, without blanks around them, each with its number from 1."""
    lines = ((number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1))
    return [(number, line) for number, line in lines if line]


class Row(NamedTuple):
    """One line of a table: its number from 1, and its values by column, without blanks around them."""

    line: int
    values: dict[str, str]


def read_table(path: Path, columns: Sequence[str], damaged: Damaged) -> list[Row]:
    """The rows of a table whose first line names its columns, with commas, semicolons or tabs between.

    Blank lines are passed over, and columns may stand in any order and be more than those needed.

    Args:
        columns: that are needed.
        damaged: makes the error.

    Raises:
        ValueError: a column is missing; a line holds fewer or more values than the first, none of a column that is
            needed, or quotes that do not end.
    """
    content = read_text(path)
    first = next((line for line in content.split("\n") if line.strip()), "")
    delimiter = max(",;\t", key=lambda mark: len({*columns} & {part.strip(' "') for part in first.split(mark)}))
    (_, header), *lines = [*_lines_of(content, delimiter, damaged)] or [(0, [])]
    absent = [column for column in columns if column not in header]
    if absent:
        found = f"lacks the column {', '.join(absent)}" if header else "is empty"
        raise damaged(found, f"columns {', '.join(columns)}, named by the first line")
    rows = []
    for line, fields in lines:
        if len(fields) < len(header) or any(fields[len(header) :]):
            raise damaged(f"holds {len(fields)} values in line {line}", f"{len(header)}, as its first line names")
        rows.append(Row(line, dict(zip(header, fields, strict=False))))
        empty = [column for column in columns if not rows[-1].values[column]]
        if empty:
            raise damaged(f"holds no {', '.join(empty)} in line {line}", f"values of {', '.join(columns)}")
    return rows


def _lines_of(content: str, delimiter: str, damaged: Damaged) -> Iterator[tuple[int, list[str]]]:
    """The number and the values of each line that is not blank; a value in quotes may go over several lines."""
    ended = (line.rstrip(" \n") + "\n" for line in io.StringIO(content))  # csv takes no blanks after quotes
    reader = csv.reader(ended, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for fields in reader:
            stripped = [field.strip() for field in fields]
            if any(stripped):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise damaged(f"is no table in line {reader.line_num} ({error})", "values whose quotes end") from error
