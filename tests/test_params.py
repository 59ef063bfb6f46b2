"""`params.yaml`: what stands in it, and one line for every way to write it wrong."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from stages.lib import params, published

REAL = Path(__file__).resolve().parents[1] / "params.yaml"
SETTINGS = sorted(yaml.safe_load(REAL.read_text())["settings"])
GONE = object()
SMALL = {
    "setting": "s",
    "defense": "d",
    "seed": 1,
    "filter": {"budget": "fraction", "budget_multiplier": 1.0},
    "defenses": {"d": {}, "with_options": {"n": 3}},
    "settings": {
        "s": {
            "data": {"source": "digits"},
            "poison": {"trigger": {"name": "badnets"}, "poison_fraction": 0.05},
            "model": {"network": "resnet20"},
            "train": {"epochs": 3, "batch_size": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "crop_padding": 2,
                      "flip": False},
        }
    },
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write the small file with changes, ``{"settings.s.train.lr": 1}``, and return its path."""

    def changed(changes):
        content = copy.deepcopy(SMALL)
        for key, value in changes.items():
            *blocks, last = key.split(".")
            block = content
            for name in blocks:
                block = block[name]
            if value is GONE:
                del block[last]
            else:
                block[last] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return changed


@pytest.fixture
def read(write):
    """Read one value back: ``read("settings.s.train.lr", 1)``."""

    def value_of(key, value):
        path = write({key: value})
        if key.startswith("filter."):
            return getattr(params.filter_(path), key.split(".")[-1])
        found = params.setting(path, "s")
        for name in key.split(".")[2:]:
            found = getattr(found, name)
        return found

    return value_of


def test_what_is_left_out_has_its_default(write):
    found = params.setting(write({"filter": GONE}), "s")
    assert found.data == params.Data("digits", None, None, None, None)
    assert found.poison == params.AllToOne(params.BadNets("badnets", 3, "bottom_right"), 0.05, 0)
    assert found.train == params.Train(3, 4, 0.1, 0.9, 0.0, 2, False)
    assert params.filter_(write({"filter": GONE})) == params.Filter("fraction", 1.0)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("settings.s.modle", "model"),
        ("settings.s.data.imagesize", "image_size"),
        ("settings.s.poison.poison_fractoin", "poison_fraction"),
        ("settings.s.poison.trigger.patch_sise", "patch_size"),
        ("settings.s.model.netwrok", "network"),
        ("settings.s.train.epoch", "epochs"),
    ],
)
def test_unknown_key_in_a_setting(write, refuses, key, meant):
    path, (block, _, word) = write({key: 1}), key.rpartition(".")
    with refuses(path, block, f"unknown key {word!r}", f"did you mean {meant}?", "known: "):
        params.setting(path, "s")


def test_unknown_key_elsewhere(write, refuses):
    path = write({"sede": 1})
    with refuses(path, "unknown key 'sede' (did you mean seed?); known: setting, defense, seed, filter"):
        params.read(path)
    path = write({"filter.bugdet": 1})
    with refuses(path, "filter: unknown key 'bugdet' (did you mean budget?); known: budget, budget_multiplier"):
        params.filter_(path)


def test_a_word_like_no_other_gets_the_list_and_no_guess(write, refuses):
    with refuses("unknown key 'xyz'; known: data, poison, model, train"):
        params.setting(write({"settings.s.xyz": 1}), "s")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.source", "mnist", "one of digits, cifar10, cifar100, fashion_mnist"),
        ("data.source", ["digits"], "one of digits, cifar10"),
        ("data.image_size", 7, "a whole number or null in [8, 256]"),
        ("data.image_size", 257, "a whole number or null in [8, 256]"),
        ("data.image_size", 16.0, "a whole number or null"),
        ("data.image_size", True, "a whole number or null"),
        ("data.pad_to", "32", "a whole number or null in [8, 256]"),
        ("data.train_per_class", 1, "[2, 10000000]"),
        ("data.test_per_class", 0, "[1, 10000000]"),
        ("data.imbalance_factor", 0.5, "a number or null in [1, 10000]"),
        ("poison.poison_fraction", 0, "a number or null in (0, 0.5]"),
        ("poison.poison_fraction", 0.51, "a number or null in (0, 0.5]"),
        ("poison.poison_fraction", float("nan"), "(0, 0.5]"),
        ("poison.poison_fraction", True, "a number or null"),
        ("poison.target_label", -1, "a whole number in [0, 1000000]"),
        ("poison.target_label", None, "a whole number"),
        ("poison.target_label", False, "a whole number"),
        (
            "poison",
            None,
            "a block with attack (one of all_to_one, clean_label, source_specific, two_targets, all_to_all)",
        ),
        ("poison.attack", "all", "one of all_to_one, clean_label, source_specific, two_targets, all_to_all"),
        ("poison.attack", ["all_to_all"], "one of all_to_one, "),
        ("poison.trigger", "none", "a block with name (one of badnets, blend, sig, wanet, adaptive_blend, none)"),
        ("poison.trigger", None, "a block with name (one of badnets, blend, "),
        ("poison.trigger.name", "badnet", "one of badnets, blend, sig, wanet, adaptive_blend, none"),
        ("poison.trigger.name", None, "one of badnets, blend, "),
        ("poison.trigger.patch_size", 0, "a whole number in [1, 256]"),
        ("poison.trigger.corner", "top_left", "one of bottom_right, bottom_left"),
        ("model.network", "resnet18", "one of resnet20, vgg16bn, mobilenetv2"),
        ("train.epochs", 0, "a whole number in [1, 100000]"),
        ("train.epochs", 30.0, "a whole number"),
        ("train.epochs", "1e2", "a whole number"),
        ("train.epochs", True, "a whole number"),
        ("train.batch_size", 0, "a whole number in [1, 1000000]"),
        ("train.lr", 0, "a number in (0, 1000]"),
        ("train.lr", "-1e-3", "a number in (0, 1000]"),
        ("train.lr", "0.1", "a number"),
        ("train.lr", "1e-5 or so", "a number"),
        ("train.lr", True, "a number"),
        ("train.lr", float("inf"), "a number"),
        ("train.momentum", 1.5, "a number in [0, 1]"),
        ("train.weight_decay", -1e-4, "a number in [0, 1]"),
        ("train.crop_padding", -1, "a whole number in [0, 64]"),
        ("train.flip", 1, "true or false"),
        ("train.flip", "yes", "true or false"),
    ],
)
def test_wrong_value_in_a_setting(write, refuses, key, value, expected):
    path = write({f"settings.s.{key}": value})
    with refuses(path, f"settings.s.{key} is ", "expected ", expected):
        params.setting(path, "s")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.image_size", 8), ("data.image_size", 256), ("data.image_size", None), ("data.train_per_class", 2),
        ("poison.poison_fraction", 0.5), ("poison.trigger.patch_size", 1), ("poison.trigger.patch_size", 256),
        ("train.momentum", 0.0), ("train.momentum", 1.0), ("train.lr", 1000.0), ("train.crop_padding", 0),
    ],
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(read, key, value):
    assert read(f"settings.s.{key}", value) == value


@pytest.mark.parametrize(
    ("key", "value", "number"),
    [
        ("train.lr", "1e-5", 1e-5), ("train.lr", "2.5E+1", 25.0), ("train.weight_decay", "5e-4", 5e-4),
        ("poison.poison_fraction", "+5.e-2", 0.05), ("train.lr", 1, 1.0), ("train.momentum", 0, 0.0),
    ],
)  # fmt: skip
def test_numbers_that_yaml_reads_as_text_or_as_whole(read, key, value, number):
    found = read(f"settings.s.{key}", value)
    assert found == number and type(found) is float


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data", "a block"), ("poison", "a block"), ("model", "a block"), ("train", "a block"),
        ("data.source", "one of digits, "), ("model.network", "one of resnet20, "), ("poison.trigger", "a block"),
        ("poison.trigger.name", "one of badnets, blend, sig, "), ("train.epochs", "a whole number in [1, 100000]"),
        ("train.lr", "a number in (0, 1000]"), ("train.flip", "true or false"),
    ],
)  # fmt: skip
def test_missing_value(write, refuses, key, expected):
    path, (block, _, word) = write({f"settings.s.{key}": GONE}), f"settings.s.{key}".rpartition(".")
    with refuses(path, f"{block}: {word} is missing", f"; expected {expected}"):
        params.setting(path, "s")


BADNETS, BLEND, SIG = {"name": "badnets"}, {"name": "blend"}, {"name": "sig"}
WANET, ADAPTIVE, NONE = {"name": "wanet"}, {"name": "adaptive_blend"}, {"name": "none"}
TACT = {"attack": "source_specific", "trigger": BADNETS, "poison_fraction": 0.05, "target_label": 2, "source_label": 1}
TWO = {"attack": "two_targets", "trigger": BADNETS, "second_trigger": BLEND, "poison_fraction": 0.05,
       "second_target_label": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("trigger", "key", "value", "expected"),
    [
        (BLEND, "alpha", 0, "a number in (0, 1]"),
        (BLEND, "alpha", 1.01, "a number in (0, 1]"),
        (BLEND, "pattern", 3, "a text"),
        (SIG, "delta", 0, "a number in (0, 255]"),
        (SIG, "frequency", 129, "a number in (0, 128]"),
        (WANET, "grid", 1, "a whole number in [2, 64]"),
        (WANET, "strength", 0, "a number in (0, 100]"),
        (WANET, "cover_ratio", -1, "a number in [0, 100]"),
        (ADAPTIVE, "alpha", 2, "a number in (0, 1]"),
        (ADAPTIVE, "pieces_per_side", 1, "a whole number in [2, 64]"),
        (ADAPTIVE, "cover_ratio", "half", "a number in [0, 100]"),
    ],
)
def test_wrong_option_of_a_trigger(write, refuses, trigger, key, value, expected):
    path = write({"settings.s.poison.trigger": trigger | {key: value}})
    with refuses(path, f"settings.s.poison.trigger.{key} is ", f"; expected {expected}"):
        params.setting(path, "s")


@pytest.mark.parametrize(
    ("trigger", "key", "known"),
    [
        (BADNETS, "alpha", "name, patch_size, corner"),
        (BADNETS, "pattern", "name, patch_size, corner"),
        (BADNETS, "cover_ratio", "name, patch_size, corner"),
        (BLEND, "patch_size", "name, alpha, pattern"),
        (SIG, "alpha", "name, delta, frequency"),
        (WANET, "patch_size", "name, grid, strength, cover_ratio"),
        (ADAPTIVE, "grid", "name, alpha, pattern, pieces_per_side, cover_ratio"),
        (NONE, "patch_size", "name"),
    ],
)
def test_an_option_that_the_trigger_does_not_read(write, refuses, trigger, key, known):
    path = write({"settings.s.poison.trigger": trigger | {key: 1}})
    with refuses(path, f"settings.s.poison.trigger: unknown key {key!r} for {trigger['name']}", f"known: {known}"):
        params.setting(path, "s")


@pytest.mark.parametrize(
    ("poison", "key"),
    [
        (TACT, "second_target_label"),
        (TWO, "cover_ratio"),
        ({"attack": "all_to_all", "trigger": BADNETS, "poison_fraction": 0.1}, "target_label"),
        ({"attack": "clean_label", "trigger": SIG, "poison_fraction": 0.1}, "source_label"),
        ({"trigger": BADNETS, "poison_fraction": 0.1}, "cover_ratio"),
    ],
)
def test_an_option_that_the_attack_does_not_read(write, refuses, poison, key):
    path = write({"settings.s.poison": poison | {key: 1}})
    word = poison.get("attack", "all_to_one")
    with refuses(path, f"settings.s.poison: unknown key {key!r} for {word}", "known: trigger, "):
        params.setting(path, "s")


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (TACT | {"source_label": 2}, "source_label and target_label are both 2"),
        (TWO | {"target_label": 1}, "target_label and second_target_label are both 1"),
        (TWO | {"second_trigger": BADNETS | {"patch_size": 3}}, "trigger and second_trigger are the same"),
        (TACT | {"trigger": WANET}, "trigger.name is 'wanet'; expected one of badnets, blend, sig"),
        (TWO | {"second_trigger": NONE}, "second_trigger.name is 'none'; expected one of badnets, blend, sig"),
        ({"attack": "clean_label", "trigger": ADAPTIVE, "poison_fraction": 0.1}, "expected one of badnets, blend, sig"),
        (
            {k: v for k, v in TACT.items() if k != "source_label"},
            "source_label is missing for source_specific; expected ",
        ),
        (
            {k: v for k, v in TWO.items() if k != "second_trigger"},
            "second_trigger is missing for two_targets; expected ",
        ),
        (
            {k: v for k, v in TWO.items() if k != "poison_fraction"},
            "poison_fraction is missing for two_targets; expected ",
        ),
        (TACT | {"poison_fraction": None}, "poison_fraction is None; expected a number in (0, 0.5]"),
    ],
)
def test_attacks_that_make_no_sense(write, refuses, poison, words):
    path = write({"settings.s.poison": poison})
    with refuses(path, "settings.s.poison", words):
        params.setting(path, "s")


def test_attacks_are_told_apart_by_their_word(write):
    def poison(block):
        return params.setting(write({"settings.s.poison": block}), "s").poison

    badnets, blend = params.BadNets("badnets"), params.Blend("blend")
    assert poison(TACT) == params.SourceSpecific(badnets, 1, 0.05, 2, cover_ratio=1.0)
    assert poison(TWO) == params.TwoTargets(badnets, blend, 1, 0.05, target_label=0)
    assert poison({"attack": "all_to_all", "trigger": BLEND, "poison_fraction": 0.1}) == params.AllToAll(blend, 0.1)
    assert poison({"trigger": WANET, "poison_fraction": 0.1}).trigger == params.WaNet("wanet", 4, 0.5, 2.0)


@pytest.mark.parametrize(("name", "fraction"), [("none", 0.05), ("badnets", None), ("badnets", GONE), ("blend", None)])
def test_a_trigger_and_a_fraction_belong_together(write, refuses, name, fraction):
    path = write({"settings.s.poison.trigger.name": name, "settings.s.poison.poison_fraction": fraction})
    with refuses(path, "settings.s.poison", f"trigger {name!r}", "(0, 0.5]", "null"):
        params.setting(path, "s")


@pytest.mark.parametrize("fraction", [None, GONE])
def test_no_trigger_and_no_fraction(write, fraction):
    path = write({"settings.s.poison.trigger.name": "none", "settings.s.poison.poison_fraction": fraction})
    assert params.setting(path, "s").poison.poison_fraction is None


def test_only_digits_are_enlarged(write, refuses):
    with refuses("settings.s.data.image_size", "only digits"):
        params.setting(write({"settings.s.data": {"source": "cifar10", "image_size": 32}}), "s")


def test_unknown_setting(write, refuses):
    path = write({"settings.resnet20-cifar10": SMALL["settings"]["s"]})
    with refuses(
        path, "setting 'resnet20-cifar' is not in", "did you mean resnet20-cifar10?", "known: resnet20-cifar10, s"
    ):
        params.setting(path, "resnet20-cifar")


@pytest.mark.parametrize("name", ["a/b", "..", "a.b", ".hidden", "-x", "a b", "a\nb", "", "ä"])
def test_a_setting_names_a_folder(tmp_path, refuses, name):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"settings": {name: SMALL["settings"]["s"]}}, allow_unicode=True))
    with refuses(path, repr(name), "cannot name a folder", "letters, digits"):
        params.setting(path, name)


@pytest.mark.parametrize("block", [None, 3, [], "text"])
def test_a_setting_that_is_no_block(write, refuses, block):
    with refuses(f"settings.s is {block!r}", "a block with data, poison, model, train"):
        params.setting(write({"settings.s": block}), "s")


@pytest.mark.parametrize("budget", ["fraction", "auto", 0, 12])
def test_budgets(read, budget):
    assert read("filter.budget", budget) == budget


@pytest.mark.parametrize("budget", ["half", "12", "1e2", 0.1, True, None, [1], -1])
def test_wrong_budget(write, refuses, budget):
    path = write({"filter.budget": budget})
    with refuses(path, f"filter.budget is {budget!r}", "number of rows"):
        params.filter_(path)
    if budget != -1:
        with refuses("expected fraction, auto or a number of rows"):
            params.filter_(path)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, 101.0, "much", True, None])
def test_wrong_multiplier(write, refuses, multiplier):
    path = write({"filter.budget_multiplier": multiplier})
    with refuses(path, f"filter.budget_multiplier is {multiplier!r}; expected a number in (0, 100]"):
        params.filter_(path)


def test_filter_without_a_block(write, refuses):
    with refuses("filter is None", "a block with budget, budget_multiplier"):
        params.filter_(write({"filter": None}))


def test_defense_options(write, refuses):
    assert params.defense_options(write({}), "d") == {}
    assert params.defense_options(write({}), "with_options") == {"n": 3}
    with refuses("defense 'with_option' has no line", "did you mean with_options?", "known: d, with_options", "{}"):
        params.defense_options(write({}), "with_option")


def test_the_file_of_the_defense_is_looked_at_before_anything_is_trained(write, refuses, tmp_path):
    path = write({})
    params.read(path)  # no folder of defenses beside it
    (tmp_path / "defenses").mkdir()
    with refuses("defense 'd' has a line in", "but there is no file", "defenses/d.py"):
        params.read(path)
    (tmp_path / "defenses/d.py").write_text("class BackdoorDefense:\n    def fit(self:\n")
    with refuses("defenses/d.py, line 2: ", "mend the file of the defense"):
        params.read(path)
    (tmp_path / "defenses/d.py").write_text("class BackdoorDefense: ...\n")
    params.read(path)


@pytest.mark.parametrize("key", ["size", "nfiles"])
def test_no_parameter_has_a_name_that_the_run_cache_does_not_see(write, refuses, key):
    """dvc/stage/cache.py hashes a stage's parameters without keys of these names."""
    path = write({"defenses.with_options": {key: 5}})
    with refuses(path, f"defenses.with_options.{key}", "run cache does not look", "another name"):
        params.defense_options(path, "with_options")
    blocks = [
        block for block in vars(params).values() if isinstance(block, type) and hasattr(block, "__dataclass_fields__")
    ]
    assert len(blocks) > 10 and not any(key in block.__dataclass_fields__ for block in blocks)


@pytest.mark.parametrize("options", [None, 3, [], {1: 2}])
def test_wrong_defense_options(write, refuses, options):
    path = write({"defenses.d": options})
    with refuses(path, f"defenses.d is {options!r}", "{} for none"):
        params.defense_options(path, "d")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", ["not valid YAML"]),
        (b"a: b: c\n\n", ["not valid YAML"]),
        (b"a: \xff", ["not valid YAML"]),
        (b"seed: 2024-13-45", ["not valid YAML"]),
        (b"", ["expected a mapping with setting, defense, seed, settings, defenses and filter"]),
        (b"- 1", ["expected a mapping"]),
        (b"settings: {}", ["expected a block `defenses:`", "None"]),
        (b"defenses: {}\nsettings: 3", ["expected a block `settings:`", "3"]),
    ],
)
def test_a_file_that_is_no_parameter_file(tmp_path, refuses, content, words):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with refuses(path, *words):
        params.read(path)


def test_no_file(tmp_path, refuses):
    with refuses(tmp_path / "params.yaml", "is not there", "--params"):
        params.setting(tmp_path / "params.yaml", "s")


# What stands in the project's own file.


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_loads(name):
    assert isinstance(params.setting(REAL, name), params.Setting)


def test_the_cell_that_is_named_at_the_top():
    content = params.read(REAL)
    assert content["setting"] in content["settings"] and content["defense"] in content["defenses"]
    assert type(content["seed"]) is int
    assert params.filter_(REAL) == params.Filter("fraction", 1.0)


PATCH, NOISE = params.BadNets("badnets", 3), params.Blend("blend", 0.2, "noise")
BENCHMARK = {  # network, source, trigger, poison_fraction, padded to, flipped, share of poison in the target class
    "resnet20-cifar10-badnets": ("resnet20", "cifar10", PATCH, 0.05, None, True, 33),
    "vgg16bn-cifar100-blend": ("vgg16bn", "cifar100", NOISE, 0.05, None, True, 83),
    "mobilenetv2-fmnist-badnets": ("mobilenetv2", "fashion_mnist", PATCH, 0.08, 32, False, 44),
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARK)
def test_benchmark_settings_follow_the_recipe(name):
    network, source, trigger, fraction, pad_to, flip, _ = BENCHMARK[name]
    assert params.setting(REAL, name) == params.Setting(
        params.Data(source, pad_to=pad_to),
        params.AllToOne(trigger, fraction, 0),
        params.Model(network),
        params.Train(100, 128, 0.1, 0.9, 5e-4, 4, flip),
    )


@pytest.mark.parametrize("name", BENCHMARK)
def test_what_the_source_leaves_open_is_marked(name):
    block = re.search(rf"^  {name}:\n((?:    .*\n)+)", REAL.read_text(), re.MULTILINE)[1]
    open_ = {"trigger", "target_label", "batch_size", "crop_padding", "flip", "pad_to"}
    marked = {line.split(":")[0].strip() for line in block.splitlines() if "# assumed" in line}
    assert marked == {key for key in open_ if f" {key}: " in block}


def share_in_target_class(name) -> float:
    """Poisoned share of the rows that bear the target label, in percent."""
    setting = params.setting(REAL, name)
    facts = published.FACTS[setting.data.source]
    per_class = setting.data.train_per_class or facts.per_class[0]
    poisoned = round(setting.poison.poison_fraction * per_class * len(facts.class_names))
    return 100 * poisoned / (poisoned + per_class)


@pytest.mark.parametrize("name", BENCHMARK)
def test_twins_have_the_full_settings_share_of_poison(name):
    assert round(share_in_target_class(name)) == BENCHMARK[name][-1]
    assert share_in_target_class(f"{name}-small") == pytest.approx(share_in_target_class(name), abs=0.5)


@pytest.mark.parametrize("name", BENCHMARK)
def test_twins_have_the_full_settings_data_attack_and_network(name):
    """Fewer images and epochs, and what so few steps call for: a milder crop, a smaller learning rate."""
    full, twin = params.setting(REAL, name), params.setting(REAL, f"{name}-small")
    assert (twin.data.source, twin.data.pad_to) == (full.data.source, full.data.pad_to)
    assert (twin.poison, twin.model) == (full.poison, full.model)
    for key in ("batch_size", "momentum", "weight_decay", "flip"):
        assert getattr(twin.train, key) == getattr(full.train, key)
    facts = published.FACTS[full.data.source]
    assert twin.data.train_per_class < facts.per_class[0] and twin.data.test_per_class < facts.per_class[1]


@pytest.mark.parametrize(
    ("audit", "words"),
    [
        ({"budget": "fraction"}, "audit.budget is 'fraction'; expected auto or a number of rows"),
        ({"budget": -1}, "audit.budget is -1"),
        ({"budget": True}, "audit.budget is True"),
        ({"bugdet": 1}, "audit: unknown key 'bugdet' (did you mean budget?)"),
    ],
)
def test_refused_audit(write, refuses, audit, words):
    with refuses(words):
        params.read(write({"audit": audit}))


def test_audit_budget(write):
    for audit in ({}, {"budget": "auto"}, {"budget": 0}, {"budget": 17}):
        params.read(write({"audit": audit}))
