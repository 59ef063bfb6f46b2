"""The two larger networks for real, on a few hundred images of the real data sets (slow: needs them on disk)."""

import json
import os
from pathlib import Path

import pytest
import yaml

from stages.lib import checkpoints, storage

ROOT = os.environ.get("BACKDOOR_DATA_ROOT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROOT, reason="set BACKDOOR_DATA_ROOT to a folder that holds the real data sets"),
]


@pytest.mark.parametrize(
    "setting, per_class, width, size",
    [("vgg16bn-cifar100-blend", 4, 512, 32), ("mobilenetv2-fmnist-badnets", 40, 1280, 28)],
)
def test_a_whole_cell(setting, per_class, width, size, tmp_path, command):
    """Two epochs of the benchmark setting on 400 images: every stage, the real network, the real images."""

    def run_stage(name, *words):
        ended = command(name, *words, BACKDOOR_DATA_ROOT=ROOT)
        assert ended.status == 0, ended.err

    values = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    block = values["settings"][setting]
    block["data"] |= {"train_per_class": per_class, "test_per_class": 1}
    block["train"] |= {"epochs": 2, "lr": 0.01}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    common = ["--params", tmp_path / "params.yaml", "--setting", setting]
    seed, files = (
        ["--seed", 1],
        {name: tmp_path / f"{name}.h5" for name in ("data", "index", "features", "scores", "kept")},
    )
    made = ["--data", files["data"], "--index", files["index"]]
    run_stage("prepare", *common, "--out", files["data"])
    run_stage("poison", *common, *seed, "--data", files["data"], "--out", files["index"])
    models = {name: tmp_path / f"{name}.pt" for name in ("victim", "oracle", "retrained")}
    run_stage("train", *common, *seed, *made, "--rows", "all", "--out", models["victim"])
    run_stage("train", *common, *seed, *made, "--rows", "clean", "--out", models["oracle"])
    run_stage("extract", *made, "--checkpoint", models["victim"], "--out", files["features"])
    run_stage("score", "--defense", "confidence_filter", "--features", files["features"], "--out", files["scores"])
    run_stage("filter", "--params", tmp_path / "params.yaml", "--scores", files["scores"], "--out", files["kept"])
    run_stage("train", *common, *seed, *made, "--rows", files["kept"], "--out", models["retrained"])
    reference, metrics = tmp_path / "reference.json", tmp_path / "metrics.json"
    references = ["--victim", models["victim"], "--oracle", models["oracle"], "--out", reference]
    run_stage("evaluate_reference", *made, *references)
    run_stage(
        "evaluate", "--setting", setting, *seed, *made, "--scores", files["scores"], "--kept", files["kept"],
        "--checkpoint", models["retrained"], "--reference", reference, "--metrics", metrics,
        "--cell-metrics", tmp_path / "cell.json", "--plots", tmp_path / "plots",
    )  # fmt: skip
    with storage.open_(files["data"], "dataset") as file:
        n = len(file["train/labels"])
        assert file["train/images"].shape[1:3] == (size, size)
    with storage.open_(files["features"], "features") as file:
        assert file["features"].shape == (n, width) and file["features"][:].std() > 0
    found = json.loads(metrics.read_text())
    assert found["rows_removed"] == round(block["poison"]["poison_fraction"] * n)
    assert 0 <= found["asr"] <= 1 and 0 <= found["clean_acc"] <= 1
    victim = checkpoints.load(models["victim"])
    assert victim.architecture.image_size == 32 and len(victim.history) == 2
