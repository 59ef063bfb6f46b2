"""What dvc.yaml promises: every module a stage loads is a dependency, and no stage before `evaluate` can see the truth."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGE_MARKERS = ("stages/__init__.py", "stages/lib/__init__.py")


def file_of(module: str) -> Path | None:
    """Source of a module of this project, else None."""
    base = ROOT / module.replace(".", "/")
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


def imports(path: Path) -> set[str]:
    """Modules of this project that the file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; this test follows absolute ones"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {str(file_of(name).relative_to(ROOT)) for name in names if file_of(name)}
    return found - set(PACKAGE_MARKERS)


def closure(path: str) -> set[str]:
    seen, todo = set(), {path}
    while todo:
        current = todo.pop()
        seen.add(current)
        todo |= imports(ROOT / current) - seen
    return seen


def module_of(stage: dict) -> str:
    return re.match(r"python -m (stages\.\w+) ", stage["cmd"])[1].replace(".", "/") + ".py"


def plain_deps(stage: dict) -> list[str]:
    return [dep if isinstance(dep, str) else next(iter(dep)) for dep in stage["deps"]]


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_import_closure(name):
    stage = STAGES[name]
    listed = {dep for dep in plain_deps(stage) if dep.endswith(".py") and "${" not in dep}
    assert listed == closure(module_of(stage))


def test_the_closure_sees_what_it_should():
    assert "stages/lib/published.py" in closure("stages/prepare.py")  # two steps away
    assert "stages/lib/seeds.py" in closure("stages/train.py")


def test_package_markers_hold_nothing_that_changes_a_result():
    """They are imported by every stage and are nobody's dependency: a docstring, defaults of the environment, and the module
    that notes the sources, which every stage depends on."""
    assert all("stages/lib/stage.py" in plain_deps(stage) for stage in STAGES.values())
    for path in PACKAGE_MARKERS:
        docstring, *body = ast.parse((ROOT / path).read_text()).body
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
        for node in body:
            text = ast.unparse(node)
            assert text in ("import os", "import stages.lib.stage") or text.startswith("os.environ.setdefault('GOMP_")


def test_a_defense_file_invalidates_score_alone():
    """And `check`, which stands first, so that DVC runs it first, and on which nothing depends."""
    users = [name for name, stage in STAGES.items() if "defenses/${defense}.py" in plain_deps(stage)]
    assert users == ["check", "score"] and next(iter(STAGES)) == "check"
    assert not any("check" in ancestors(name) for name in STAGES)


def test_every_file_and_every_argument_is_declared():
    """A path on the command line is a dependency or an output, and the other way round."""
    for name, stage in STAGES.items():
        on_command_line = {word for word in stage["cmd"].split() if word.startswith("artifacts/")}
        outs = [out if isinstance(out, str) else next(iter(out)) for kind in ("outs", "metrics", "plots")
                for out in stage.get(kind, [])]  # fmt: skip
        declared = {path for path in [*plain_deps(stage), *outs] if path.startswith("artifacts/")}
        expanded = on_command_line - {"artifacts/plots"} | {p for p in declared if p.startswith("artifacts/plots/")}
        assert expanded == declared, name


def producers() -> dict[str, str]:
    return {out: name for name, stage in STAGES.items() for out in stage["outs"] if isinstance(out, str)}


def ancestors(name: str) -> set[str]:
    made_by, found, todo = producers(), set(), [name]
    while todo:
        for dep in plain_deps(STAGES[todo.pop()]):
            if dep in made_by and made_by[dep] not in found:
                found.add(made_by[dep])
                todo.append(made_by[dep])
    return found


def test_nothing_leaks_to_the_defense():
    """`score` reads the features and nothing else that was made; what follows reads the truth only in `evaluate`
    (`retrain` needs the index to rebuild the training set, but chooses its rows by `kept.h5` alone)."""
    artifacts = [dep for dep in plain_deps(STAGES["score"]) if dep.startswith("artifacts/")]
    assert artifacts == ["artifacts/${setting}/seed${seed}/features.h5"]
    assert STAGES["score"]["params"] == ["defenses.${defense}"]
    assert [dep for dep in plain_deps(STAGES["filter"]) if dep.startswith("artifacts/")] == [
        "artifacts/${setting}/seed${seed}/${defense}/scores.h5"
    ]
    assert "--rows artifacts/${setting}/seed${seed}/${defense}/kept.h5" in STAGES["retrain"]["cmd"]
    assert "retrain_oracle" not in ancestors("retrain")


def test_left_of_score_nothing_depends_on_the_defense():
    for name in ancestors("score") | {"retrain_oracle", "evaluate_reference"}:
        assert "${defense}" not in yaml.safe_dump(STAGES[name])
        assert not any(param.startswith(("defense", "filter")) for param in STAGES[name].get("params", []))


def test_stages_use_absolute_blocks_of_the_parameters_they_read():
    expected = {
        "check": ["defenses.${defense}", "filter", "settings.${setting}.poison"],
        "prepare": ["settings.${setting}.data"],
        "poison": ["settings.${setting}.poison"],
        "train_victim": ["settings.${setting}.model", "settings.${setting}.train"],
        "retrain_oracle": ["settings.${setting}.model", "settings.${setting}.train"],
        "retrain": ["settings.${setting}.model", "settings.${setting}.train"],
        "score": ["defenses.${defense}"],
        "filter": ["filter"],
    }
    assert {name: stage["params"] for name, stage in STAGES.items() if "params" in stage} == expected


def test_every_defense_has_a_line_in_params():
    listed = yaml.safe_load((ROOT / "params.yaml").read_text())["defenses"]
    files = {path.stem for path in (ROOT / "defenses").glob("*.py") if not path.stem.startswith("_")}
    assert set(listed) == files


def test_the_committed_metrics_are_those_of_the_committed_parameters():
    """What `dvc metrics diff HEAD` compares with."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    found = json.loads((ROOT / "artifacts/metrics.json").read_text())
    assert found["cell"] == f"{values['setting']}/{values['defense']}/seed{values['seed']}"
