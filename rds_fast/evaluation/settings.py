"""The settings of an evaluation."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from ..training.fields import absolute
from ..training.names import check_name

ALL = "all"


def _setting(
    default: Any,
    group: str,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    names: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
) -> Any:
    """A field, and what the command line says of it.

    ``least``, ``above``, ``most``: the range of a number, or of each number of several. ``names``: what a word may be.
    ``flags``: further spellings of the option.
    """
    bounds = {"least": least, "above": above, "most": most}
    metadata = {"group": group, "help": help, "names": names, "flags": flags, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What decides the figures besides the model and the data.

    The radii of the attacks are for images in [0, 1]. On BlockMNIST cross-entropy alone loses nearly all of its
    accuracy at either. Paths are kept absolute.

    Raises:
        TypeError: a value is not of its setting's kind.
        ValueError: a value is unknown or out of range; the message names the setting and what it may be.
    """

    metrics: tuple[str, ...] = _setting(
        (),
        "Evaluation",
        "What to measure: names, or all (default: what is cheap and applies).",
    )
    seed: int = _setting(
        0,
        "Evaluation",
        "Of the attacks' random starts, and of the choice of samples where fewer than all are measured.",
        least=0,
        most=2**63 - 1,
        flags=("--attack-seed",),
    )
    limit: int | None = _setting(
        None, "Evaluation", "Measure this many samples, drawn at random, not the whole split.", least=1
    )
    batch_size: int = _setting(
        500, "Evaluation", "Samples at a time: it decides the memory, and how the random starts are dealt out.", least=1
    )

    linf_epsilon: float = _setting(
        0.1, "Attacks", "Radius of the L∞ attacks; inputs are in [0, 1].", least=0, flags=("--linf",)
    )
    l2_epsilon: float = _setting(1.0, "Attacks", "Radius of the L2 attacks.", least=0, flags=("--l2",))
    steps: int = _setting(40, "Attacks", "Steps of PGD.", least=1)
    linf_step_size: float | None = _setting(None, "Attacks", "Of the L∞ PGD (default: 2.5 radii / steps).", above=0)
    l2_step_size: float | None = _setting(None, "Attacks", "Of the L2 PGD (default: 2.5 radii / steps).", above=0)
    restarts: int = _setting(1, "Attacks", "Random starts of PGD; a sample counts as right if all fail.", least=1)
    strong_limit: int = _setting(200, "Attacks", "Samples of autoattack and sanity, drawn at random.", least=1)
    strong_steps: int = _setting(100, "Attacks", "Steps of AutoAttack's APGD and FAB.", least=1)
    square_queries: int = _setting(5000, "Attacks", "Queries of the Square attack, in autoattack and sanity.", least=1)

    attribution_limit: int = _setting(200, "Attributions", "Samples with attacked or perturbed attributions.", least=1)
    attribution_k: int = _setting(100, "Attributions", "Pixels of the top-k intersection.", least=1)
    attribution_epsilon: float | None = _setting(
        None, "Attributions", "L∞ radius of the attribution attack (default: that of the L∞ attacks).", least=0
    )
    attribution_steps: int = _setting(100, "Attributions", "Steps of the attribution attack.", least=1)
    attribution_step_size: float = _setting(0.01, "Attributions", "Step size of the attribution attack.", above=0)
    attribution_restarts: int = _setting(3, "Attributions", "Random starts of the attribution attack.", least=1)
    attribution_keep: str = _setting(
        "top_k",
        "Attributions",
        "The iterate that the attribution attack keeps: of the least top-k intersection or Kendall's tau.",
        names=("top_k", "kendall"),
    )
    attribution_softplus: float = _setting(
        20.0,
        "Attributions",
        "The attribution attack follows the gradient of the network with softplus of this sharpness for ReLU.",
        above=0,
    )
    path_steps: int = _setting(100, "Attributions", "Points of the path of integrated gradients.", least=1)
    attack_path_steps: int = _setting(10, "Attributions", "The same inside the attribution attack.", least=1)
    perturbation_attribution: str = _setting(
        "input_gradient",
        "Attributions",
        "What says which pixels are relevant.",
        names=("input_gradient", "integrated_gradients", "saliency", "input_x_gradient", "deeplift", "smoothgrad"),
    )
    perturbation_ratios: tuple[float, ...] = _setting(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "Attributions",
        "Shares of the pixels that are removed, rising.",
        above=0,
        most=1,
    )
    fill: str = _setting(
        "mean", "Attributions", "What removed pixels become: mean (of those kept), or a number from 0 to 1."
    )

    ood_data: tuple[str, ...] = _setting(
        (),
        "Other data",
        "What is out of distribution: names of data sets, NAME=FOLDER for those on the disk, noise or uniform.",
    )
    spuriosity: str | None = _setting(None, "Other data", "File of the samples' spuriosity scores.")
    spuriosity_k: int = _setting(100, "Other data", "Images of each class that count as most, and as least.", least=1)

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            kind = _KINDS[name]
            value = getattr(self, name)
            if typing.get_origin(kind) is tuple:
                if isinstance(value, str):  # would be taken for its letters
                    raise TypeError(f"{name} is {value!r}; it must be a tuple or a list, such as ({value!r},)")
                value = tuple(value)  # a list, as JSON has it, is welcome
                object.__setattr__(self, name, value)
            for each in value if isinstance(value, tuple) else (value,):
                _check(name, each, kind, field.metadata)
        if self.spuriosity is not None:
            object.__setattr__(self, "spuriosity", absolute(self.spuriosity))
        self._check_metrics()
        self._check_fill()
        self._check_ood_data()
        if not self.perturbation_ratios:  # no curve, under which there would be no area
            raise ValueError("perturbation_ratios is empty; it must have at least one share of the pixels")
        if list(self.perturbation_ratios) != sorted(set(self.perturbation_ratios)):
            raise ValueError(f"perturbation_ratios is {self.perturbation_ratios}; it must rise from each to the next")

    def _check_metrics(self) -> None:
        from .metrics import METRICS  # which are built on this file

        for name in self.metrics:
            check_name("a metric", name, (*METRICS, ALL))

    def _check_ood_data(self) -> None:
        from .other_data import parse_source

        sources = [parse_source(source) for source in self.ood_data]
        if len({name for name, _ in sources}) < len(sources):
            raise ValueError(f"ood_data is {self.ood_data}; each data set may be named once")
        named = (f"{name}={absolute(folder)}" if folder else name for name, folder in sources)
        object.__setattr__(self, "ood_data", tuple(named))

    def _check_fill(self) -> None:
        if self.fill == "mean":
            return
        try:
            inside = 0 <= float(self.fill) <= 1
        except ValueError:
            inside = False
        if not inside:
            raise ValueError(f"fill is {self.fill!r}; it must be 'mean' or a number from 0 to 1")

    def to_settings(self) -> dict[str, Any]:
        """The settings by their names, as JSON has them."""
        values = dataclasses.asdict(self).items()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @staticmethod
    def from_settings(settings: dict[str, Any]) -> EvaluationSettings:
        """The settings that ``to_settings`` gave.

        Raises:
            ValueError: a name is unknown, or a value is wrong.
        """
        for name in settings:
            check_name("a setting of the evaluation", name, FIELDS)
        return EvaluationSettings(**settings)

    def differences(self, other: EvaluationSettings) -> dict[str, tuple[Any, Any]]:
        """The settings by which figures of one name may differ: name -> (this one's value, the other's)."""
        ours, theirs = self.wherever(), other.wherever()
        return {name: (ours[name], theirs[name]) for name in FIELDS if name != "metrics" and ours[name] != theirs[name]}

    def wherever(self) -> dict[str, Any]:
        """The settings as JSON has them, without the folders of data sets, which the names tell wherever they lie.

        An imagefolder is told by its folder alone, and spuriosity scores by their file: those stay.
        """
        folderless = [source if source.startswith("imagefolder=") else source.split("=")[0] for source in self.ood_data]
        return self.to_settings() | {"ood_data": folderless}


def _check(name: str, value: Any, kind: Any, metadata: typing.Mapping[str, Any]) -> None:
    """One value, or each of several, against its kind and range."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return
    kinds = tuple(each for each in kinds if each not in (type(None), Ellipsis))
    accepted = (int, float) if float in kinds else kinds
    if not isinstance(value, accepted) or isinstance(value, bool):
        wanted = {int: "a whole number", float: "a number", str: "a word"}[kinds[0]]
        raise TypeError(f"{name} is {value!r}; it must be {wanted}")
    if isinstance(value, (int, float)):
        _check_range(name, value, metadata["least"], metadata["above"], metadata["most"])
    if metadata["names"]:
        check_name(name, value, metadata["names"])


def _check_range(name: str, value: float, least: float | None, above: float | None, most: float | None) -> None:
    if (
        math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    ):
        return
    lower = f"{least:g} or more" if least is not None else f"above {above:g}"
    upper = "finite" if most is None else f"at most {most:g}"
    raise ValueError(f"{name} is {value!r}; it must be {lower} and {upper}")


FIELDS = {field.name: field for field in dataclasses.fields(EvaluationSettings)}
_KINDS = typing.get_type_hints(EvaluationSettings)
