"""Entry of ``rds-fast`` and ``python -m rds_fast``: errors of use are one line, without a traceback."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any

from .training.extras import missing


def main() -> None:
    """Run the command line. ``RDS_FAST_TRACEBACK=1`` shows where an error was raised."""
    _print_what_can_be_printed()
    _outlive_readers()
    try:
        try:
            from .cli import app
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("rds_fast"):
                raise
            raise missing(error.name, "the command line") from error
        app()
    except (ValueError, OSError, ImportError, ArithmeticError) as error:  # ArithmeticError: a loss is not finite
        if os.environ.get("RDS_FAST_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _print_what_can_be_printed() -> None:
    """Print plainly what standard output has no sign for, such as "∇" on a terminal of Windows or in a C locale.

    Python would raise instead, when all the work is done. Standard error replaces by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        codecs.register_error("rds_fast.plainly", _plainly)
        sys.stdout.reconfigure(errors="rds_fast.plainly")


def _outlive_readers() -> None:
    """Go on where nobody reads what is printed, such as behind ``| head``: the results are in files, written last."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # another's, who put it there
            continue
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        raw = getattr(stream.buffer, "raw", stream.buffer)  # the same where Python does not buffer
        if type(raw) is io.FileIO:
            stream.flush()
            outlasting = _Outlasting(raw.fileno(), "wb", closefd=False)
            kept = ("encoding", "errors", "line_buffering", "write_through")
            options = {option: getattr(stream, option) for option in kept}
            buffer = outlasting if raw is stream.buffer else io.BufferedWriter(outlasting)
            setattr(sys, name, io.TextIOWrapper(buffer, **options))


class _Outlasting(io.FileIO):
    """A pipe that takes and drops what is written after its reader has gone."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            return memoryview(content).nbytes


# Signs of tables and sentences without which a figure would be another, or two models of one name; others become "?".
_PLAIN = {"−": "-", "–": "-", "±": "+-", "×": "x", "∞": "inf", "‖": "|", "∇": "grad", "λ": "lambda", "ε": "eps"}
_PLAIN |= {"↑": "^", "↓": "v", "→": "->", "…": "...", "\u00a0": " "}


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """A handler of ``codecs.register_error``: the signs that cannot be printed, in letters, and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


if __name__ == "__main__":
    main()
