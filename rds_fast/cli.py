"""The command line: ``rds-fast train | evaluate | sweep | demo | doctor``."""

from __future__ import annotations

import typer

from .doctor import doctor
from .evaluation.commands import demo, evaluate, sweep
from .experiments.train import train

app = typer.Typer(
    help="Training with penalties on input gradients, exactly and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # errors are shown by __main__, in one line
)
for command in (train, evaluate, sweep, demo, doctor):
    app.command()(command)
