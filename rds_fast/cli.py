"""The command line: ``rds-fast recipes | train | evaluate | compare | sweep | demo | doctor``."""

from __future__ import annotations

import typer

from .doctor import doctor
from .evaluation.command import compare, evaluate
from .experiments.commands import demo, recipes, sweep
from .experiments.train import train

app = typer.Typer(
    help="Training with penalties on input gradients, exactly and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # errors are shown by __main__, in one line
)
for command in (recipes, train, evaluate, compare, sweep, demo, doctor):
    app.command()(command)
