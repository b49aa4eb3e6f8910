"""The commands where text is not UTF-8: what cannot be printed is replaced, and every file is UTF-8 all the same."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rds_fast.__main__ import main
from rds_fast.experiments import recipes

ROOT = Path(__file__).resolve().parents[1]

# A C locale that Python takes at its word, where arguments are bytes, with the output of a redirected Windows console.
ENVIRONMENT = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}
# One process for all commands, since it takes seconds to start.
COMMANDS = """
import sys
from rds_fast.__main__ import main
out, page = sys.argv[1:]
tiny = "data=synthetic image_size=8 classes=3 train_size=24 model=cnn epochs=1 variant=density".split()
def call(*words):
    sys.argv = ["rds-fast", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
call("train", "block-mnist", *tiny, "--out", out, "--threads", "1")
call("evaluate", out, "--split", "validation", "--metrics", "accuracy,pgd", "--steps", "1", "--threads", "1")
call("compare", out, "--out", page)
call("compare", out, "--csv")
call("compare", out, "--markdown")
call("recipes")
call("doctor")
call("sweep", "block-mnist", *tiny, "weight=1", "evaluation.steps=1", "--out", out + "-sweep", "--threads", "1")
"""


def test_commands_print_what_can_be_printed_and_write_utf8(tmp_path: Path) -> None:
    for package in ("typer", "rich", "matplotlib", "safetensors"):
        pytest.importorskip(package, reason="needs the extra train")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ENVIRONMENT}
    out, page = tmp_path / "läufe", tmp_path / "läufe.html"
    command = [sys.executable, "-c", COMMANDS, str(out), str(page)]
    process = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert process.returncode == 0, process.stderr
    output = process.stdout.decode("cp1252")
    assert "PGD L? 0.1" in output
    assert "density ?? log p?" in output
    for path in (out / "evaluation.html", page, out / "config.json", out / "metrics.jsonl", out / "evaluation.json"):
        path.read_text(encoding="utf-8")
    assert f">{out}<" in page.read_text(encoding="utf-8")  # as its bytes are, whatever the locale calls them


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "xmlcharrefreplace"])
def test_what_has_no_sign_is_replaced(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python opens standard output as the first or, in a C locale, as the second; a choice of the user's stays."""
    pytest.importorskip("typer", reason="needs the extra train")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["rds-fast", "recipes", "block-mnist"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    stream.flush()
    expected = b"&#8711; log p" if errors == "xmlcharrefreplace" else b"density ?? log p?"
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
