"""Read all of `results/`. What cannot be used is collected as a `Problem`, to be shown; nothing is guessed or averaged.

A file is left out, with the reason, if it is damaged, of another schema version, not named after what it holds, one of
several for the same cell, or computed with other parameters than the rest of its setting.

A cell whose budget is its own and not that of params.yaml stands in `seed<k>-auto.json` (as many rows as the defense
suspects) or `seed<k>-budget<rows>.json`; it is shown as a defense of its own, named after both.
"""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.published import DEFENSE_SCORE
from analysis.schema import CELL, CLIFF, CLIFF_VERSION, SCHEMA_VERSION, mistake, short, uneven

REFERENCES = (
    "undefended_clean_acc",
    "undefended_asr",
    "oracle_clean_acc",
    "oracle_asr",
)  # of a seed's victim and oracle


@dataclass(frozen=True)
class Problem:
    """A file that is not used, or cells that do not fit together, and why."""

    where: str
    what: str


@dataclass
class Results:
    """cells: content of each usable file by (setting, defense, seed), with its name as `name`; a defense with a budget of
    its own is ``defense, auto`` or ``defense, 72 rows``. cliffs: by (setting, seed)."""

    cells: dict[tuple[str, str, int], dict] = field(default_factory=dict)
    cliffs: dict[tuple[str, int], dict] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def settings(self) -> list[str]:
        """Those of the public table first, then the default, then those with the most cells."""
        counts = Counter(setting for setting, _, _ in self.cells)
        return sorted(counts, key=lambda name: (name not in DEFENSE_SCORE, name != "quick", -counts[name], name))

    def defenses(self, setting: str) -> list[str]:
        return sorted({d for s, d, _ in self.cells if s == setting})

    def seeds(self, setting: str, defense: str | None = None) -> list[int]:
        return sorted({k for s, d, k in self.cells if s == setting and defense in (None, d)})

    def of(self, setting: str, defense: str) -> dict[int, dict]:
        """The cells of a defense by their seed."""
        return {k: self.cells[setting, defense, k] for k in self.seeds(setting, defense)}

    def figures(self, setting: str, defense: str, key: str) -> dict[int, float]:
        """One metric by seed, of those seeds that have it."""
        found = {seed: cell["metrics"].get(key) for seed, cell in self.of(setting, defense).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def pair(self, setting: str, one: str, other: str, key: str) -> tuple[dict[int, float], dict[int, float]]:
        """One metric of two defenses by seed, of those seeds in which both have the same victim and oracle."""

        def trainings(name: str, seed: int) -> list[float | None]:
            return [self.cells[setting, name, seed]["metrics"].get(key) for key in REFERENCES]

        first, second = (self.figures(setting, name, key) for name in (one, other))
        same = [seed for seed in first.keys() & second.keys() if trainings(one, seed) == trainings(other, seed)]
        return {seed: first[seed] for seed in same}, {seed: second[seed] for seed in same}

    def is_poisoned(self, setting: str) -> bool:
        return any(cell["filter"]["n_poison"] for (s, _, _), cell in self.cells.items() if s == setting)

    def references(self, setting: str, key: str) -> dict[int, float]:
        """A figure of the undefended or the oracle model by seed; a seed whose cells disagree on it is left out."""
        found = defaultdict(set)
        for defense in self.defenses(setting):
            for seed, value in self.figures(setting, defense, key).items():
                found[seed].add(value)
        return {seed: min(values) for seed, values in sorted(found.items()) if len(values) == 1}


def read(folder: Path) -> Results:
    """Every JSON file below `folder` but those of `analysis.proving_ground`; a folder that is not there holds none."""
    results, claims, cliffs = Results(), defaultdict(list), defaultdict(list)
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("proving_ground/"):
            continue
        is_cliff = path.parent.name == "cliff"
        content = _load(path, name, CLIFF if is_cliff else CELL, CLIFF_VERSION if is_cliff else SCHEMA_VERSION, results)
        if content is None:
            continue
        if is_cliff:
            cliffs[content["setting"], content["seed"]].append((name, content))
        else:
            variant = re.search(r"\d(-auto|-budget\d+)\.json$", name)
            variant = variant[1] if variant else ""
            if variant and variant != _variant(content):
                what = f"holds a cell with the budget {short(_budget(content))}, which is not its name's; not used"
                results.problems.append(Problem(name, what))
                continue
            words = f", {'auto' if variant == '-auto' else f'{_budget(content)} rows'}" if variant else ""
            claims[content["setting"], content["defense"] + words, content["seed"]].append((name, content))
    results.cells = _unambiguous(claims, results)
    results.cliffs = _unambiguous(cliffs, results, "cliff")
    _same_parameters(results)
    _missing(results)
    _disagreeing_references(results)
    results.problems.sort(key=lambda problem: (problem.where, problem.what))
    return results


def _load(path: Path, name: str, shape: dict, version: int, results: Results) -> dict | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        results.problems.append(Problem(name, f"not readable as JSON ({reason}); export the cell again"))
        return None
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != version or isinstance(found, bool):
        what = f"schema version {short(found)}, this report reads {version}; export the cell again"
        results.problems.append(Problem(name, what))
        return None
    wrong = mistake(content, shape) or (uneven(content) if shape is CELL else None)
    if wrong:
        results.problems.append(Problem(name, f"damaged: {wrong}; export the cell again"))
        return None
    return content


def _unambiguous(claims: dict, results: Results, kind: str | None = None) -> dict:
    """Of each cell its one file, if that has the cell's name."""
    found = {}
    for key, files in claims.items():
        names, content = [name for name, _ in files], files[0][1]
        variant = _variant(content) if kind is None and key[1] != content["defense"] else ""
        cell = f"{content['setting']}/{kind or content['defense']}/seed{content['seed']}{variant}"
        if len(files) > 1:
            what = f"{len(files)} results for one cell ({', '.join(names)}): none is used; remove the wrong one"
            results.problems.append(Problem(cell, what))
        elif names[0] != f"{cell}.json":
            results.problems.append(Problem(names[0], f"holds {cell}, which belongs in {cell}.json; not used"))
        else:
            found[key] = content | {"name": cell}
    return found


def _budget(content: dict) -> Any:
    return content["conditions"]["parameters"]["filter"]["budget"]


def _variant(content: dict) -> str:
    """End of the file's name for a budget of its own."""
    return f"-{'auto' if _budget(content) == 'auto' else f'budget{_budget(content)}'}"


def _same_parameters(results: Results) -> None:
    """Only cells of equal parameters are averaged or compared: those of the setting, and those of each defense."""
    for part, group in (
        ("setting", lambda key: key[:1]),
        ("defense", lambda key: key[:2]),
        ("filter", lambda key: key[:2] if ", " in key[1] else key[:1]),  # a budget of its own is in its name
    ):
        variants = defaultdict(lambda: defaultdict(list))
        for key, cell in results.cells.items():
            text = json.dumps(cell["conditions"]["parameters"][part], sort_keys=True)
            variants[group(key)][text].append(key)
        for keys in variants.values():
            usual = max(keys.values(), key=len)
            for others in keys.values():
                for key in others if others is not usual else []:
                    del results.cells[key]
                    what = f"other parameters ({part}) than {_cell(usual[0])} and {len(usual) - 1} more; not used"
                    results.problems.append(Problem(_cell(key), what))
    settings = {key[0]: cell["conditions"]["parameters"]["setting"] for key, cell in results.cells.items()}
    for key, found in list(results.cliffs.items()):
        if key[0] in settings and found["conditions"]["parameters"]["setting"] != settings[key[0]]:
            del results.cliffs[key]
            what = "other parameters (setting) than the cells of its setting; not used"
            results.problems.append(Problem(found["name"], what))


def _missing(results: Results) -> None:
    for setting in results.settings():
        for defense in results.defenses(setting):
            lacking = sorted(set(results.seeds(setting)) - set(results.seeds(setting, defense)))
            if lacking:
                seeds = ", ".join(map(str, lacking))
                results.problems.append(
                    Problem(
                        f"{setting}/{defense}", f"no result for seed {seeds}, which other defenses of the setting have"
                    )
                )


def _disagreeing_references(results: Results) -> None:
    for setting in results.settings():
        for key in REFERENCES:
            agreed = results.references(setting, key)
            known = {seed for d in results.defenses(setting) for seed in results.figures(setting, d, key)}
            for seed in sorted(known - agreed.keys()):
                what = (
                    f"its cells disagree on {key}: not of the same trainings; left out of the reference rows and not compared "
                    "with one another; run all of them here (`python -m analysis.seeds … --again`), or into a folder of their own"
                )
                results.problems.append(Problem(f"{setting}/seed{seed}", what))


def _cell(key: tuple) -> str:
    return f"{key[0]}/{key[1]}/seed{key[2]}"
