"""Results, the settings of an evaluation, the samples that are measured, and their record as JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rds_fast.evaluation import record
from rds_fast.evaluation.metrics import METRICS
from rds_fast.evaluation.results import Curve, Evaluation, Results, merged
from rds_fast.evaluation.samples import batches_of, drawn
from rds_fast.evaluation.settings import FIELDS, EvaluationSettings
from rds_fast.training import Images, TrainingConfig
from rds_fast.training.data import fingerprint


def evaluation() -> Evaluation:
    return Evaluation(
        {"accuracy": 0.75, "share": None},
        {"radius": Curve("ε", "accuracy", (0.0, 0.5), (1.0, 0.25))},
        {"groups": [{"group": "a", "samples": 3, "accuracy": None}]},
        ("A note.",),
        samples=4,
        seconds={"accuracy": 0.5},
    )


def images(count: int = 10, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Images(torch.rand(count, 1, 2, 2, generator=generator), labels, None, 3)


def test_a_record_comes_back_from_json_as_it_was() -> None:
    whole = record.Record(
        evaluation(),
        EvaluationSettings(metrics=("pgd", "accuracy"), perturbation_ratios=(0.25, 0.5), limit=4),
        "test",
        "0123456789abcdef",
        TrainingConfig(p=math.inf),
        "cpu",
        {"torch": "2.11", "triton": None},
    )
    text = json.dumps(whole.to_json(), allow_nan=False)
    assert record.Record.from_json(json.loads(text)) == whole
    assert set(json.loads(text)) == {
        *("scalars", "curves", "tables", "notes", "samples", "seconds"),
        *("split", "fingerprint", "settings", "training", "device", "versions", "identity"),
    }


def test_what_is_not_finite_is_null_in_json_and_nan_in_a_curve() -> None:
    results = Results({"a": math.nan, "b": math.inf}, {"c": Curve("x", "y", (0.0, 1.0), (math.nan, 1.0))})
    back = Results.from_json(json.loads(json.dumps(results.to_json(), allow_nan=False)))
    assert back.scalars == {"a": None, "b": None}
    assert math.isnan(back.curves["c"].y[0])
    assert back.curves["c"].y[1] == 1.0


def test_a_curve_needs_a_y_for_each_x() -> None:
    with pytest.raises(ValueError, match="2 values of x and 1 of y"):
        Curve("x", "y", (0.0, 1.0), (0.0,))


def test_results_of_metrics_are_merged_and_no_name_is_lost() -> None:
    one, other = Results({"a": 1.0}, notes=("n",)), Results({"b": None}, tables={"t": []}, notes=("m",))
    assert merged([one, other]) == Results({"a": 1.0, "b": None}, {}, {"t": []}, ("n", "m"))
    with pytest.raises(ValueError, match="two metrics give 'a' among their scalars"):
        merged([one, Results({"a": 2.0})])


def test_samples_are_drawn_without_repetition_in_order_and_alike_each_time() -> None:
    split = images(50)
    some = drawn(split, 20, 3)
    assert len(some) == 20
    positions = [(split.images == image).flatten(1).all(1).nonzero()[0, 0].item() for image in some.images]
    assert positions == sorted(set(positions))
    assert torch.equal(drawn(split, 20, 3).images, some.images)
    assert not torch.equal(drawn(split, 20, 4).images, some.images)
    assert drawn(split, 50, 0) is split
    assert drawn(split, None, 0) is split


def test_batches_hold_every_sample_once_in_order() -> None:
    split = images(10)
    batches = list(batches_of(split, 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.images for batch in batches]), split.images)
    assert list(batches_of(images(0), 4)) == []


def test_a_fingerprint_tells_samples_apart() -> None:
    split = images(40)
    assert fingerprint(split) == fingerprint(images(40))
    other_pixels, other_labels = images(40, seed=1), Images(split.images, split.labels.flip(0), None, 3)
    fewer = split.take(torch.arange(39))
    assert len({fingerprint(each) for each in (split, other_pixels, other_labels, fewer)}) == 4
    assert fingerprint(images(1)) != fingerprint(images(1, seed=1))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"metrics": ("acuracy",)}, ValueError, "a metric is 'acuracy'; did you mean 'accuracy'"),
        ({"metrics": "accuracy"}, TypeError, "must be a tuple or a list"),
        ({"seed": -1}, ValueError, "seed is -1; it must be 0 or more"),
        ({"limit": 0}, ValueError, "limit is 0; it must be 1 or more"),
        ({"batch_size": 2.5}, TypeError, "batch_size is 2.5; it must be a whole number"),
        ({"steps": True}, TypeError, "steps is True; it must be a whole number"),
        ({"linf_epsilon": math.inf}, ValueError, "linf_epsilon is inf; it must be 0 or more and finite"),
        ({"l2_epsilon": -1.0}, ValueError, "l2_epsilon"),
        ({"linf_step_size": 0.0}, ValueError, "linf_step_size is 0.0; it must be above 0"),
        ({"restarts": 0}, ValueError, "restarts"),
        ({"perturbation_ratios": (0.5, 1.5)}, ValueError, "at most 1"),
        ({"perturbation_ratios": ()}, ValueError, "perturbation_ratios is empty"),
        ({"perturbation_ratios": (0.5, 0.4)}, ValueError, "must rise"),
        ({"fill": "grey"}, ValueError, "fill is 'grey'; it must be 'mean' or a number from 0 to 1"),
        ({"fill": "1.5"}, ValueError, "fill"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EvaluationSettings(**settings)


def test_every_setting_says_what_it_is_and_every_number_has_a_range() -> None:
    for name, field in FIELDS.items():
        assert field.metadata["help"].endswith((".", ").", ")")), name
        default = field.default[0] if isinstance(field.default, tuple) and field.default else field.default
        if isinstance(default, (int, float)):
            assert {field.metadata["least"], field.metadata["above"]} != {None}, name


def test_settings_of_another_version_are_named() -> None:
    settings = EvaluationSettings().to_settings()
    assert EvaluationSettings.from_settings(settings) == EvaluationSettings()
    with pytest.raises(ValueError, match="a setting of the evaluation is 'step'; did you mean 'steps'"):
        EvaluationSettings.from_settings({**settings, "step": 3})
    one, other = EvaluationSettings(steps=3, metrics=("pgd",)), EvaluationSettings(metrics=("accuracy",))
    assert one.differences(other) == {"steps": (3, 40)}


def test_the_default_metrics_are_the_cheap_ones() -> None:
    unasked = [name for name, metric in METRICS.items() if metric.unasked]
    assert unasked == ["accuracy", "calibration", "groups", "pgd", "leakage", "gradient_norm"]
