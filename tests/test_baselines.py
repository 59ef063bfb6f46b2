"""Baselines are tags made of `results/` alone: nothing else in the repository moves, and DVC compares them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_results import cell, write

ROOT = Path(__file__).resolve().parents[1]


def run(folder, *words, fails=False) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def baselines(folder, **options) -> str:
    return run(folder, sys.executable, "-m", "analysis.baselines", **options)


@pytest.fixture
def clone(tmp_path):
    """What DVC and the command need of the repository, under git, with an edit that is not committed."""
    listed = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        wanted = (
            "analysis/",
            "stages/",
            "results/",
            "artifacts/",
            "params.yaml",
            "dvc.yaml",
            "dvc.lock",
            ".dvc",
            ".git",
        )
        if name.startswith(wanted) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, "git", "add", "-A")
    run(tmp_path, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "start")
    (tmp_path / "params.yaml").write_text((tmp_path / "params.yaml").read_text() + "# edited\n")
    return tmp_path


def state(folder) -> tuple:
    """Branches, index, work tree."""
    return tuple(run(folder, "git", *words) for words in (["branch", "-av"], ["ls-files", "-s"], ["status", "--short"]))


def test_baselines_touch_nothing_and_are_what_dvc_compares(clone):
    before = state(clone)
    cells = {path: json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*/*/seed*.json"))}
    cells = {path: content for path, content in cells.items() if path.parent.name != "cliff"}
    assert f"{len(cells)} baselines, {len(cells)} of them" in baselines(clone)
    assert state(clone) == before
    for path, content in cells.items():
        tag = f"baseline/{path.relative_to(ROOT / 'results').with_suffix('')}"
        assert json.loads(run(clone, "git", "show", f"{tag}:artifacts/metrics.json")) == content["metrics"]
        parameters = yaml.safe_load(run(clone, "git", "show", f"{tag}:params.yaml"))
        assert all(parameters[key] == content[key] for key in ("setting", "defense", "seed"))
        assert parameters["filter"] == content["conditions"]["parameters"]["filter"]
        assert parameters["audit"] == {"budget": "auto", "options": ""}
    assert "0 of them new or moved" in baselines(clone), "a second run changes nothing"

    diff = [sys.executable, "-m", "dvc", "metrics", "diff", "--no-path"]
    names = ("baseline/quick/random_filter/seed42", "baseline/quick/spectral_signature/seed42")
    found = [line.split() for line in run(clone, *diff, *names).splitlines()]
    shown = (ROOT / "README.md").read_text().partition(f"--no-path {' '.join(names)}\n")[2].partition("\n...")[0]
    assert len(shown.splitlines()) > 3 and all(line.split() in found for line in shown.splitlines()), (
        "the README shows this"
    )
    assert "workspace" in run(clone, *diff, names[0])


def test_tags_follow_head_and_plots_are_the_cells_own(clone):
    baselines(clone)
    shutil.rmtree(clone / "results")
    write(clone / "results", cell(asr=0.25))
    write(clone / "results", cell(setting="beta", poisoned=False))
    (clone / "results/alpha/one/seed2.json").write_text("{")
    output = baselines(clone)
    assert "2 baselines, 2 of them" in output and "not used: alpha/one/seed2.json" in output
    assert '"asr": 0.25' in run(clone, "git", "show", "baseline/alpha/one/seed1:artifacts/metrics.json")
    assert "5,0.8,this defense" in run(clone, "git", "show", "baseline/alpha/one/seed1:artifacts/plots/recall.csv")
    held = run(clone, "git", "ls-tree", "-r", "--name-only", "baseline/beta/one/seed1", "artifacts/plots")
    assert held.split() == ["artifacts/plots/scores.csv", "artifacts/plots/training.csv"], "no poison, no recall"
    run(
        clone, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty", "-m", "on"
    )
    assert "2 of them new or moved" in baselines(clone)
    assert run(clone, "git", "rev-parse", "baseline/alpha/one/seed1^") == run(clone, "git", "rev-parse", "HEAD")


def test_mistakes_are_one_line(clone):
    shutil.rmtree(clone / "results")
    assert "holds no usable cell" in baselines(clone, fails=True)
    write(clone / "results", cell(setting="a b"))
    assert "cannot be the name of a git tag" in baselines(clone, fails=True)
    shutil.rmtree(clone / "results")
    write(clone / "results", cell())
    shutil.rmtree(clone / ".git")
    output = baselines(clone, fails=True)
    assert "Traceback" not in output and "git rev-parse" in output
