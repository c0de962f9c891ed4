"""The recipes: a dry run says what a run takes, `--limit` runs them on small files in the official layouts."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from otcclip.training.cost import CAPTION, H100_PEAK, UTILISATION, estimate
from otcclip.training.recipe import main
from otcclip.training.train_spec import TrainSpec

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(i: int) -> bytes:
    pixels = np.random.default_rng(i % 4).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    handle = io.BytesIO()
    Image.fromarray(pixels).resize((80, 60)).save(handle, "JPEG")
    return handle.getvalue()


def poisoned_coco(root: Path) -> Path:
    """Twelve images of four kinds, two captions each; one image in six says what it is not."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    images, annotations = [], []
    for i in range(12):
        (root / "train2017" / f"{i:012d}.jpg").write_bytes(picture(i))
        images.append({"id": i, "file_name": f"{i:012d}.jpg"})
        said = (i + 1) % 4 if i % 6 == 5 else i % 4
        for j in range(2):
            caption = f"{('a dog', 'a bus', 'a pear', 'a chair')[said]} seen {('near', 'far')[j]}"
            annotations.append({"id": 2 * i + j, "image_id": i, "caption": caption})
    path = root / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.mark.parametrize("name", ["cc3m_rn50", "coco_ft", "visual_genome_ft"])
def test_a_dry_run_says_what_it_takes_and_whose_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe(name)
    assert main(module.RECIPE, ["--dry-run", "--set", "model=otcclip-tiny", "pretrained="]) == 0
    said = capsys.readouterr().out
    batch = module.RECIPE.spec.batch_size * module.RECIPE.processes
    steps = module.RECIPE.spec.epochs * (module.RECIPE.pairs // batch)
    assert f"{steps:,}" in said and f"{batch:,} over" in said and "one H100" in said and "GiB a process" in said
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert lines["lr"].endswith("ours") if "lr" in lines else module.RECIPE.spec.lr == TrainSpec("").lr


def test_fine_tuning_on_poisoned_coco_pairs_with_a_defence(tmp_path: Path) -> None:
    """From a checkpoint that `--pretrained` names; the finished run opens as any other."""
    data = poisoned_coco(tmp_path / "coco")
    settings = ["model=otcclip-tiny", "batch_size=8", "workers=0", "device=cpu", "threads=1", "report_to=none"]
    settings += [f"logs={tmp_path / 'logs'}", "epochs=1", "warmup=1"]
    first = ["name=first", "defense=clip", "pretrained="]
    arguments = ["--train-data", str(data), "--limit", "20", "--set"]
    coco = recipe("coco_ft").RECIPE
    assert main(coco, [*arguments, *settings, *first]) == 0
    start = tmp_path / "logs" / "first" / "open_clip_model.safetensors"
    second = ["name=second", "defense=otcclip-paper:every=1", f"pretrained={start}"]
    assert main(coco, [*arguments, *settings, *second]) == 0
    result = json.loads((tmp_path / "logs" / "second" / "result.json").read_text())
    assert result["pairs"] == 20 and math.isfinite(result["loss"]) and result["defense"] == "otcclip-paper:every=1"


def test_a_setting_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for setting in ("learning_rate=1", "epochs=many", "lr", "limit=10", "train-data=x"):
        assert main(recipe("coco_ft").RECIPE, ["--dry-run", "--set", setting]) == 2
        assert "--set" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--set", "batch-size=0"], ["--limit", "0"], ["--set", "threads=0"]])
def test_a_dry_run_refuses_what_a_run_does(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(recipe("coco_ft").RECIPE, ["--dry-run", *arguments]) == 2
    said = capsys.readouterr()
    assert "0: at least 1" in said.err and said.err.count("\n") == 1 and not said.out


def test_the_model_of_cost_is_the_stated_one() -> None:
    """Twice the epochs, twice the compute; hours are operations over what an H100 is said to do; 16 bytes a weight."""
    spec = TrainSpec("x", model="otcclip-tiny", batch_size=32, epochs=2, defense="clip", precision="fp32")
    one, two = estimate(spec, 3200), estimate(TrainSpec(**{**spec.__dict__, "epochs": 4}), 3200)
    assert one.steps == 200 and one.pairs_seen == 6400
    assert two.tflop == pytest.approx(2 * one.tflop)
    assert one.gpu_hours == pytest.approx(one.tflop * 1e12 / H100_PEAK / UTILISATION / 3600)
    assert one.memory_gib * 2**30 > 16 * one.parameters and len(CAPTION.split()) == 12
    assert one.decoded_gib == pytest.approx(3200 * 3 * 64 * 64 / 2**30)


def test_the_benchmark_of_a_scan_says_how_it_is_called() -> None:
    command = [sys.executable, str(RECIPES.parent / "benchmarks" / "scan.py")]
    for arguments, code in ((["--help"], 0), ([], 2), (["dance"], 2), (["throughput"], 2)):
        ended = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert ended.returncode == code and "Traceback" not in ended.stderr
        assert "throughput" in ended.stdout + ended.stderr
