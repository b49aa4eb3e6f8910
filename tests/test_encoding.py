"""The commands where text is not UTF-8 or nobody reads it: files are UTF-8, and whole, all the same."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rds_fast.__main__ import main
from rds_fast.experiments import recipes

sys.path.insert(0, str(Path(__file__).parent / "training"))
import image_files

ROOT = Path(__file__).resolve().parents[1]

Call = Callable[..., tuple[int, str, str]]

# A C locale that Python takes at its word, where arguments are bytes, with the output of a redirected Windows console.
ENVIRONMENT = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}
# One process for all commands, since it takes seconds to start.
SCRIPT = """
import json, sys
from rds_fast.__main__ import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["rds-fast", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


def run_elsewhere(commands: list[list[str]]) -> bytes:
    """What commands print in ENVIRONMENT; their words reach it as the bytes that they are here."""
    words = json.dumps(commands, ensure_ascii=False)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ENVIRONMENT}
    process = subprocess.run([sys.executable, "-c", SCRIPT, words], env=environment, capture_output=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_commands_in_another_locale(tmp_path: Path, call: Call) -> None:
    """They print what can be printed, write UTF-8, and find the paths and the classes of a run made in this locale."""
    for package in ("typer", "rich", "matplotlib", "safetensors"):
        pytest.importorskip(package, reason="needs the extra train")
    if importlib.util.find_spec("torchvision") is None:  # importing it here would change what the command meets
        pytest.skip("needs torchvision")
    images = image_files.write(tmp_path / "bücher")
    for split in ("train", "val"):
        (images / split / "green").rename(images / split / "grün")
    train = ["train", "--data-root", images, "--data", "imagefolder", "--image-size", 16, "--model", "cnn"]
    train += ["--epochs", 1, "--batch-size", 4, "--workers", 0, "--threads", 1, "--out"]
    evaluate = ["--split", "validation", "--metrics", "accuracy,pgd", "--steps", 1, "--threads", 1]
    tiny = ["data=synthetic", "image_size=8", "classes=3", "train_size=24", "model=cnn", "epochs=1", "variant=density"]
    here, there, page = tmp_path / "here", tmp_path / "läufe", tmp_path / "läufe.html"
    assert call(*train, here)[0] == 0
    commands = [
        *(["evaluate", here, *evaluate, "--no-page"], [*train, there], ["evaluate", there, *evaluate]),
        *(["compare", there, "--out", page], ["compare", there, "--csv"], ["compare", there, "--markdown"]),
        *(["recipes"], ["doctor"]),
        ["sweep", "block-mnist", *tiny, "weight=1", "evaluation.steps=1", "--threads", 1, "--out", tmp_path / "sweep"],
    ]
    output = run_elsewhere([[*map(str, command)] for command in commands]).decode("cp1252")
    assert "PGD Linf 0.1 ^ |" in output
    assert "density |grad log p|, lambda = 0.5" in output
    for name in ("evaluation.html", "config.json", "metrics.jsonl", "evaluation.json"):
        (there / name).read_text(encoding="utf-8")
    assert f">{there}<" in page.read_text(encoding="utf-8")  # as its bytes are, whatever the locale calls them
    code, _, errors = call("evaluate", there, *evaluate, "--no-page")
    assert code == 0, errors


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe's own error")
@pytest.mark.parametrize("buffered", [True, False, None])
def test_work_goes_on_where_nobody_reads(
    buffered: bool | None, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind ``| head``, with or without ``python -u``, or where standard output was closed from the start."""
    for package in ("typer", "rich", "safetensors"):
        pytest.importorskip(package, reason="needs the extra train")
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.ExitStack() as opened, monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            stream = None
            if buffered is not None:
                raw = io.FileIO(os.dup(writer), "wb")
                stream = opened.enter_context(io.TextIOWrapper(io.BufferedWriter(raw) if buffered else raw))
            patch.setattr(sys, name, stream)
            patch.setattr(sys, f"__{name}__", stream)
        words = ("--image-size", 8, "--classes", 3, "--train-size", 24, "--model", "cnn", "--epochs", 2, "--threads", 1)
        assert call("train", "--data", "synthetic", *words, "--out", tmp_path)[0] == 0
        assert call("evaluate", tmp_path, "--metrics", "accuracy", "--split", "validation", "--no-page")[0] == 0
        sys.stdout.close()
        sys.stderr.close()
    os.close(writer)
    assert (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "xmlcharrefreplace"])
def test_what_has_no_sign_is_printed_plainly(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python opens standard output as the first or, in a C locale, as the second; a choice of the user's stays."""
    pytest.importorskip("typer", reason="needs the extra train")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["rds-fast", "recipes", "block-mnist"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    print("5 − 8 ± ħ", flush=True)
    assert (b"5 - 8 +- ?" in stream.buffer.getvalue()) == (errors != "xmlcharrefreplace")
    expected = b"&#8711; log p" if errors == "xmlcharrefreplace" else b"density |grad log p|"
    assert expected in stream.buffer.getvalue()


def test_every_text_file_is_opened_with_its_encoding() -> None:
    """Without one it would be the locale's, in which another machine cannot read what this one wrote."""
    for path in (ROOT / "setup.py", *sorted((ROOT / "bench").glob("*.py")), *sorted((ROOT / "rds_fast").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert _names_its_encoding(node), f"{path}:{node.lineno}"


def _names_its_encoding(call: ast.Call) -> bool:
    """Whether a call opens no text, or says in which encoding. What os and Pillow open is bytes."""
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    if name not in ("open", "read_text", "write_text"):
        return True
    if function in ("os.open", "pillow.open", "read_text"):  # the last is the reader of lists, which finds it out
        return True
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    binary = name == "open" and any(isinstance(mode, str) and "b" in mode for mode in modes)
    return binary or any(keyword.arg == "encoding" for keyword in call.keywords)


def test_a_recipe_is_read_in_any_encoding(tmp_path: Path) -> None:
    path, text = tmp_path / "mine.toml", recipes.text("block-mnist").replace("title = ", 'title = "ä" # ', 1)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert recipes.load(str(path)).title == "ä"
