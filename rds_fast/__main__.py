"""Entry of ``rds-fast`` and ``python -m rds_fast``: errors of use are one line, without a traceback."""

from __future__ import annotations

import io
import os
import sys

from .training.extras import missing


def main() -> None:
    """Run the command line. ``RDS_FAST_TRACEBACK=1`` shows where an error was raised."""
    _print_what_can_be_printed()
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
    """Replace by "?" what standard output has no sign for, such as "∇" on a terminal of Windows or in a C locale.

    Python would raise instead, when all the work is done. Standard error replaces by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
