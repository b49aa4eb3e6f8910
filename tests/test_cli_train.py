"""``rds-fast train`` as a user calls it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rds_fast.__main__ import main
from rds_fast.training.config import FIELDS

pytest.importorskip("typer", reason="needs the extra train")
pytest.importorskip("safetensors", reason="needs the extra train")

Call = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "training"))  # the small data sets of idx_files and image_files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in IDX files: 220 samples to train on."""
    from idx_files import write_set

    return write_set(tmp_path_factory.mktemp("idx"))


# What the same computation may take different amounts of.
MEASURED = ("seconds", "images_per_second", "data_wait", "peak_memory_bytes")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rds_fast", "train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def run(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    output, errors = process.communicate()
    return process.returncode, output, errors


@pytest.fixture
def call(call: Call) -> Call:
    """The same within this process, for what needs no process of its own."""
    return lambda *arguments: call("train", *arguments)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def last_step(run_dir: Path) -> int:
    """The step of the last checkpoint, read from the file's header; 0 if there is none."""
    path = run_dir / "checkpoint" / "last.safetensors"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["state"])["step"]


SYNTHETIC = ("--data", "synthetic", "--image-size", 16, "--classes", 5, "--train-size", 220, "--model", "cnn")


@pytest.mark.parametrize("kind", ["block-mnist", "synthetic"])
def test_killed_and_resumed_ends_with_the_same_bits(kind: str, root: Path, tmp_path: Path) -> None:
    # 22 steps an epoch and a checkpoint every 7 of them, so most checkpoints are inside an epoch.
    settings: tuple[object, ...] = ("--batch-size", 10, "--epochs", 5, "--checkpoint-interval", 7)
    if kind == "synthetic":
        settings += (*SYNTHETIC, "--optimizer", "sgd", "--accumulate", 2, "--channels-last", "--amp", "bf16")
    else:
        settings += ("--data", "block-mnist", "--data-root", root)
    code, output, errors = run("--out", tmp_path / "straight", *settings)
    assert (code, errors) == (0, "")
    assert output.count("\n") == 6  # a line an epoch, and the result
    assert "epoch 5/5: loss" in output

    process = start("--out", tmp_path / "killed", *settings)
    wait_for(lambda: last_step(tmp_path / "killed") > 30, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    code, output, errors = run("--out", tmp_path / "killed", "--resume")
    assert (code, errors) == (0, "")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()

    def rows(run_dir: Path) -> list[dict[str, object]]:
        parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in parsed]

    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")


def test_a_whole_large_batch_job(tmp_path: Path) -> None:
    """The command for one GPU, in small: three steps of two micro-batches, then its evaluation."""
    pytest.importorskip("rich", reason="needs the extra train")
    if importlib.util.find_spec("torchvision") is None:  # importing it here would change what the command meets
        pytest.skip("needs torchvision")
    out = tmp_path / "job"
    code, output, errors = run(
        *("--out", out, "--data", "synthetic", "--image-size", 32, "--classes", 10, "--train-size", 24),
        *("--model", "resnet50", "--fuse", "--channels-last", "--amp", "bf16", "--threads", 1),
        *("--batch-size", 8, "--accumulate", 2, "--epochs", 1, "--log-interval", 1),
        *("--objective", "density", "--weight", 0.1, "--label-smoothing", 0.1),
        *("--optimizer", "sgd", "--nesterov", "--weight-decay", 1e-4, "--no-decay-norms"),
        *("--lr", 0.1, "--lr-scaling", "linear", "--lr-warmup-epochs", 1),
    )
    assert (code, errors) == (0, "")
    assert re.search(r"epoch 1/1: .* images/s, data wait \d+%, peak memory [\d.]+ GB\n", output)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([0.0, 0.1 * 8 / 256 / 3, 0.2 * 8 / 256 / 3])
    for row in rows:
        assert row["penalty"] > 0
        assert row["images_per_second"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert row["peak_memory_bytes"] > 23e6 * 4  # the weights alone
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert (settings["fuse"], settings["accumulate"], settings["lr_scaling"]) == (True, 2, "linear")

    command = [sys.executable, "-m", "rds_fast", "evaluate", out, "--limit", 2, "--steps", 1, "--device", "cpu"]
    evaluated = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True)
    assert evaluated.returncode == 0, evaluated.stderr
    assert re.fullmatch(r"(\w+: [\d.]+ s\n)+", evaluated.stderr)  # a line a metric, and no warning
    assert "leakage is left out: these data have no null block" in evaluated.stdout
    figures = json.loads((out / "evaluation.json").read_text())["scalars"]
    assert "leakage" not in figures
    assert figures["gradient_norm"] > 0


def test_a_folder_of_images(tmp_path: Path, call: Call) -> None:
    """Trained with workers; --data-root names what is wrong in one line; there is no test split to evaluate."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    import image_files

    images, out = image_files.write(tmp_path / "images"), tmp_path / "run"
    settings = ("--data", "imagefolder", "--data-root", images, "--image-size", 16, "--model", "cnn")
    code, output, errors = run("--out", out, *settings, "--batch-size", 4, "--epochs", 2, "--workers", 2)
    assert (code, errors) == (0, "")
    assert "epoch 2/2: loss" in output
    described = json.loads((out / "config.json").read_text())["data"]
    assert described == {"samples": 12, "classes": 3, "class_names": ["blue", "green", "red"]}
    image_files.remove(images / "val" / "red")
    code, _, errors = call("--out", tmp_path / "other", *settings)
    assert code == 1
    assert re.fullmatch(r"error: the classes under .* differ: val lacks red\. Each needs the same folders\n", errors)


def test_a_data_set_from_its_files_to_a_model(tmp_path: Path, call: Call) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    import data_files

    root, out = data_files.tiny_imagenet(tmp_path / "data"), tmp_path / "run"
    settings = ("--data", "tiny-imagenet", "--data-root", root, "--model", "cnn", "--epochs", 2, "--workers", 0)
    code, output, errors = call("--out", out, *settings, "--augment", "crop-flip-cutout", "--cutout", 8, "--normalize")
    assert (code, errors) == (0, "")
    assert "epoch 2/2: loss" in output
    described = json.loads((out / "config.json").read_text())
    assert described["data"]["class_names"] == ["goldfish", "European fire salamander", "n01641577"]
    assert described["settings"]["normalize"] is True
    code, _, errors = call("--out", tmp_path / "other", *settings[:2])
    assert errors.startswith("error: data is 'tiny-imagenet' and data_root is missing; give the folder that holds")
    code, _, errors = call("--out", tmp_path / "other", *settings, "--download")
    assert errors.startswith(
        "error: download is given and tiny-imagenet cannot be downloaded; get it from http://cs231n"
    )
    code, _, errors = call("--out", tmp_path / "other", *settings, "--cutout", 8)
    assert "--cutout would have no effect: it belongs to augment crop-cutout or crop-flip-cutout" in errors


@pytest.mark.parametrize("kind", ["mnist", "imagefolder"])
def test_ctrl_c_saves_and_says_how_to_go_on(kind: str, root: Path, tmp_path: Path) -> None:
    """A terminal sends it to every process, those that decode images too, and the step under way needs them."""
    out = tmp_path / "a run"  # the space has to be quoted in the command
    settings: tuple[object, ...] = ("--data", kind, "--data-root", root)
    if kind == "imagefolder":
        if importlib.util.find_spec("torchvision") is None:
            pytest.skip("needs torchvision")
        import image_files

        images = image_files.write(tmp_path / "images")
        settings = ("--data", kind, "--data-root", images, "--image-size", 16, "--workers", 2, "--batch-size", 4)
    process = start("--out", out, *settings, "--epochs", 100000)
    wait_for(lambda: last_step(out) > 0, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    match = re.search(r"training stopped after step (\d+) and was saved in .*\. To go on:\n  (.*)\n", errors)
    assert match is not None, errors
    assert last_step(out) == int(match[1])
    assert match[2] == f"python -m rds_fast train --out '{out}' --resume"


def test_settings_of_a_resumed_run_are_its_own(root: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "run"
    settings = ("--data", "mnist", "--data-root", root, "--epochs", 1, "--model", "cnn")
    assert call("--out", out, *settings)[0] == 0
    code, _, errors = call("--out", out, "--resume", "--lr", 0.5, "--epochs", 1, "--log-interval", 3)
    assert code == 1
    assert "lr was 0.001 and is now 0.5. Leave them out, or start a new run" in errors
    assert errors.count("\n") == 1
    assert call("--out", out, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet81"), "error: model is 'resnet81'; did you mean 'resnet18'"),
        (
            ("--objective", "cross-entropy", "--weight", 1),
            "--weight would have no effect: the objective is cross-entropy",
        ),
        (("--momentum", 0.5), "--momentum would have no effect: it belongs to optimizer sgd"),
        (("--data-root", "/nowhere"), "error: the data root /nowhere is not a folder"),
        (
            ("--data", "imagefolder"),
            "error: data is 'imagefolder' and data_root is missing; give the folder that",
        ),
        (
            ("--data", "imagefolder", "--data-root", "/nowhere"),
            "error: the data root /nowhere is not a folder; exp",
        ),
        (("--data", "synthetic", "--data-root", "/nowhere"), "--data-root would have no effect: it belongs to data"),
        (("--classes", 5), "--classes would have no effect: it belongs to data synthetic, and data is block-mnist"),
        (("--workers", 2), "--workers would have no effect: it belongs to data tiny-imagenet or gtsrb or"),
        (("--accumulate", 3), "error: batch_size is 100 and accumulate is 3, which does not divide it"),
        (("--optimizer", "sgd", "--nesterov", "--momentum", 0), "error: nesterov is given and momentum is 0"),
        (("--resume",), "holds no run: there is no config.json"),
        (("--epochs", 0), "error: epochs is 0; it must be a whole number, 1 or more"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_errors_of_use_are_one_line(tmp_path: Path, call: Call, arguments: tuple[object, ...], message: str) -> None:
    code, output, errors = call("--out", tmp_path / "run", *arguments)
    assert (code, output) == (1, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (("--train-size", 33), "A batch_size of 9 has none such"),
        (("--train-size", 35, "--accumulate", 4), "A batch_size of 12 has none such"),  # the last three are 2 and 1
        (("--train-size", 32, "--accumulate", 8), "A batch_size of 16 has none such"),
        (("--train-size", 32, "--penalty-share", 0.15), "A batch_size of 11 has none such"),
        (("--train-size", 32, "--penalty-share", 0.01), "Give another batch_size or penalty_share"),
    ],
    ids=["last", "micro-batch", "all", "share", "small share"],
)
def test_batch_norm_of_one_value_is_said_before_the_first_step(
    settings: tuple[object, ...], remedy: str, tmp_path: Path, call: Call
) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    small = ("--data", "synthetic", "--image-size", 8, "--classes", 3, "--model", "resnet18", "--batch-size", 8)
    code, output, errors = call("--out", tmp_path / "run", *small, *settings)
    assert (code, output) == (1, "")
    assert errors.startswith("error: some step would run the model resnet18 on one sample, from ")
    assert "The batch norm 'layer4.0.bn1' would have one value a channel there, which has no variance" in errors
    assert remedy in errors
    assert not (tmp_path / "run").exists()


def test_batch_norm_of_several_values_is_not_refused(tmp_path: Path, call: Call) -> None:
    """Four pixels of one sample are enough; the last batch is not reached; or there is no batch norm."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    small = ("--data", "synthetic", "--classes", 3, "--train-size", 9, "--batch-size", 8, "--quiet")
    small += ("--objective", "cross-entropy", "--threads", 1)
    for number, (model, size, steps) in enumerate((("vgg11_bn", 32, 2), ("vgg11_bn", 16, 1), ("cnn", 8, 2))):
        run = ("--out", tmp_path / f"{number}", "--model", model, "--image-size", size, "--steps", steps)
        code, _, errors = call(*run, *small)
        assert (code, errors) == (0, "")


def test_a_diverging_run_stops(root: Path, tmp_path: Path, call: Call) -> None:
    settings = ("--data", "mnist", "--data-root", root, "--objective", "cross-entropy", "--epochs", 3)
    code, _, errors = call("--out", tmp_path / "run", *settings, "--optimizer", "sgd", "--lr", 1e30)
    assert code == 1
    assert re.search(r"error: step \d of epoch \d: .*not finite", errors)
    assert json.loads((tmp_path / "run" / "non_finite_batch.json").read_text())["indices"]


@pytest.mark.parametrize("package", ["typer", "safetensors"])
def test_a_missing_extra_is_named(root: Path, tmp_path: Path, package: str) -> None:
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["rds-fast", "train", "--out", {str(tmp_path / "run")!r}, "--data", "mnist", "--data-root", {str(root)!r}]
from rds_fast.__main__ import main
from rds_fast.training.config import FIELDS
main()
"""
    process = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert process.returncode == 1
    assert re.fullmatch(
        rf"error: {package} is not installed and is needed for .*; pip install 'rds_fast\[train\]' brings it\n",
        process.stderr,
    )


def test_help_names_each_setting_once(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, output, _ = call("--help")
    assert code == 0
    for name in FIELDS:
        flag = "--" + name.replace("_", "-")
        flag = flag.removesuffix("s") if name.endswith("_milestones") else flag
        assert len(re.findall(rf"^\W*{flag}\s", output, re.MULTILINE)) == 1, flag


def test_help_is_readable_in_80_columns(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer, no name is cut, and every setting keeps room for its explanation."""
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = call("--help")
    assert code == 0
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in output
    for line in lines:
        if match := re.match(r"│\W*--[\w-]+.*?<\w+(\[\w+\])?>", line):
            assert 80 - match.end() >= 20, line


def test_a_recipe_is_trained(root: Path, tmp_path: Path, call: Call) -> None:
    """With a variant and settings, by words and by options."""
    words = ("block-mnist", "variant=density-fd", "weight=0.25", f"data_root={root}", "epochs=1")
    code, output, errors = call("--out", tmp_path / "run", *words, "--batch-size", 50, "--threads", 1)
    assert (code, errors) == (0, "")
    assert "after 1 epochs" in output
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    shown = {name: settings[name] for name in ("objective", "method", "weight", "epochs", "batch_size", "lr")}
    assert shown == {
        **{"objective": "density", "method": "finite_difference", "weight": 0.25},
        **{"epochs": 1, "batch_size": 50, "lr": 0.001},
    }
    code, output, errors = call("--out", tmp_path / "run", "--resume", *words, "batch_size=50", "threads=1")
    assert (code, errors) == (0, "")
    code, _, errors = call("--out", tmp_path / "run", "--resume", *words, "batch_size=25")
    assert code == 1
    assert "batch_size was 50 and is now 25" in errors
    code, output, errors = call("--out", tmp_path / "steps", *words[:1], f"data_root={root}", "steps=3")
    assert (code, errors) == (0, "")
    assert "after 3 steps" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("blok-mnist",), "recipe is 'blok-mnist'; did you mean 'block-mnist'? It must be one of "),
        (("/nowhere/mine.toml",), "there is no recipe /nowhere/mine.toml; give a TOML file, or one of block-fashion"),
        (("block-mnist", "variant=densty"), "variant is 'densty'; did you mean 'density'"),
        (("variant=density",), "variant=density is given without a recipe; give one: block-fashion-mnist, "),
        (("block-mnist", "wieght=1"), "a key is 'wieght'; did you mean 'weight'?"),
        (("block-mnist", "weight=much"), "weight is 'much'; it must be a number"),
        (("block-mnist", "weight=-1"), "weight is -1.0; it must be 0 or more and finite"),
        (("block-mnist", "data=cifar"), "data is 'cifar'; did you mean 'cifar10'"),
        (("block-mnist", "epsilon=0.1"), "epsilon would have no effect: it belongs to objective adversarial or "),
        (
            ("block-mnist", "weight=1", "--weight", 2),
            "weight is given twice, as --weight and as weight=1; give it once",
        ),
        (("fashion-mnist-rar", "epochs=3"), "epochs would have no effect: steps is 100000, which decides the length"),
        (("cifar10-madry",), "data is 'cifar10' and data_root is missing"),
        (
            ("evaluation.steps=3",),
            "evaluation.steps=3 is given, and training measures the accuracy alone",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_words_are_one_line(tmp_path: Path, call: Call, words: tuple[object, ...], message: str) -> None:
    code, output, errors = call("--out", tmp_path / "run", *words)
    assert (code, output) == (1, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RDS_FAST_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["rds-fast", "train", "--epochs", "0", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="epochs is 0"):
        main()
