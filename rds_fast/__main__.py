"""Entry of ``rds-fast`` and ``python -m rds_fast``: errors of use are one line, without a traceback."""

from __future__ import annotations

import os
import sys

from .training.extras import missing


def main() -> None:
    """Run the command line. ``RDS_FAST_TRACEBACK=1`` shows where an error was raised."""
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


if __name__ == "__main__":
    main()
