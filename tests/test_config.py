"""Experiment config: every problem at once, each naming key, value and what was expected."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from mobula import config
from mobula.config import key, section
from mobula.errors import ConfigError


@dataclass
class Inner:
    rate: float = key(0.1, "a rate", gt=0, lt=1)
    kinds: list[str] = key(["one"], "kinds", choices=("one", "two"))
    low: int = key(1, "low end", ge=0)
    high: int = key(2, "high end", ge=0)

    def problems(self) -> list[str]:
        return [f"low={self.low} is above high={self.high}"] if self.low > self.high else []


@dataclass
class Outer:
    name: str = key("x", "a name")
    seed: int = key(0, "a seed", ge=0, le=100)
    limit: int | None = key(None, "a limit", ge=1)
    rates: list[float] = key([0.5], "rates", gt=0)
    inner: Inner = section(Inner)


def problems(values: dict | None = None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.build(Outer, values or {}, overrides)
    return caught.value.problems


def test_defaults_file_and_overrides_in_that_order(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("seed: 3\ninner: {rate: 0.2}\n")
    loaded = config.load(Outer, path, ["inner.rate=0.3", "limit=4", "rates=[1, 2.5]"])
    assert (loaded.name, loaded.seed, loaded.inner.rate, loaded.limit, loaded.rates) == ("x", 3, 0.3, 4, [1.0, 2.5])


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("sede", "seed"), ("inner.rat", "inner.rate"), ("rate", "rates"), ("iner", "inner"), ("kinds", "inner.kinds")],
)
def test_an_unknown_key_names_the_nearest(name: str, suggestion: str) -> None:
    assert problems({}, f"{name}=1") == [f"unknown key {name} (did you mean {suggestion}?)"]


def test_all_problems_are_reported_at_once() -> None:
    found = problems({"sede": 1, "seed": -1, "inner": {"rate": "fast", "kinds": ["tow"]}}, "limit=0", "nonsense")
    assert len(found) == 6
    assert found[-1] == "limit=0: must be at least 1"
    assert "inner.kinds='tow': expected one of one, two (did you mean two?)" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=101", "seed=101: must be at most 100"),
        ("inner.rate=0", "inner.rate=0.0: must be more than 0"),
        ("inner.rate=1.0", "inner.rate=1.0: must be less than 1"),
        ("inner.rate=.nan", "inner.rate=nan: must be a finite number"),
        ("inner.rate=nan", "inner.rate=nan: must be a finite number"),
        ("rates=[1, .inf]", "rates=inf: must be a finite number"),
        ("rates=[-1e-3]", "rates=-0.001: must be more than 0"),
        ("seed='-1'", "seed=-1: must be at least 0"),
    ],
)
def test_ranges_hold_for_every_number_however_it_is_written(override: str, message: str) -> None:
    assert problems({}, override) == [message]


@pytest.mark.parametrize("override", ["seed=1.5", "seed=true", "inner.rate=true", "name=null", "rates=1", "seed=[1]"])
def test_a_wrong_type_names_key_value_and_what_was_expected(override: str) -> None:
    (found,) = problems({}, override)
    assert found.startswith(override.partition("=")[0] + "=")
    assert "expected" in found


def test_a_number_in_scientific_notation_is_a_number() -> None:
    assert config.build(Outer, {}, ["inner.rate=1e-3"]).inner.rate == 0.001


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a${seed}", ["${oc.env:HOME}"], {"a": "${seed}"}, "???", ["???"]])
def test_text_from_a_user_is_never_interpolated(value: object) -> None:
    """S7: no resolver runs, so a config cannot read the environment."""
    for name in ("name", "rates"):
        (found,) = problems({name: value})
        assert "not allowed" in found or "not a value" in found
        assert str(Path.home()) not in found


def test_contradictions_name_the_section() -> None:
    assert problems({"inner": {"low": 5}}) == ["inner.low=5 is above high=2"]


def test_a_section_needs_a_mapping() -> None:
    assert problems({"inner": None}) == ["inner is a section and needs a mapping, found None"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected a mapping of keys, found list"),
        ("a: [\n", "not valid YAML"),
        ("!!python/object/apply:os.system [id]\n", "not valid YAML"),
        ("seed: 1\nname: a\nseed: 2\n", "the key seed stands twice"),
        ("inner: {low: 0, low: 1}\n", "the key low stands twice"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(Outer, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot read the file \(FileNotFoundError\)"):
        config.load(Outer, tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the file"):
        config.load(Outer, tmp_path / "binary.yaml")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert config.load(Outer, tmp_path / "empty.yaml") == Outer()


def test_mutable_defaults_are_not_shared() -> None:
    Outer().rates.append(9.0)
    assert Outer().rates == [0.5]


def test_describe_lists_every_leaf_with_default_and_help() -> None:
    rows = config.describe(Outer)
    assert [name for name, _, _ in rows] == [
        "name", "seed", "limit", "rates", "inner.rate", "inner.kinds", "inner.low", "inner.high",
    ]  # fmt: skip
    assert rows[3] == ("rates", "[0.5]", "rates")


def test_yaml_of_a_config_loads_as_the_same_config(tmp_path: Path) -> None:
    before = config.build(Outer, {}, ["inner.rate=1e-5", "limit=7", "name='on'"])
    (tmp_path / "c.yaml").write_text(config.to_yaml(before))
    assert config.load(Outer, tmp_path / "c.yaml") == before


def test_differences_name_dotted_keys() -> None:
    a, b = {"x": {"y": 1, "z": 2}, "only": 1}, {"x": {"y": 3, "z": 2}}
    assert config.differences(a, b) == ["only: 1 -> (absent)", "x.y: 1 -> 3"]


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert config.digest({"a": 1, "b": 2}) == config.digest({"b": 2, "a": 1}) != config.digest({"a": 1, "b": 3})


def test_check_values_looks_at_each_pair_alone() -> None:
    assert config.check_values(Outer, [("inner.low", 5), ("seed", 5)]) == []
    assert config.check_values(Outer, [("seed", -5)]) == ["seed=-5: must be at least 0"]


def test_the_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"], "file")))
    assert (str(error), error.problems) == ("file: a; b", ["a", "b"])


@dataclass
class Renamed:
    RENAMED: ClassVar = {"speed": "rate", "old": "inner"}
    rate: float = key(1.0, "a rate")
    rule: str = key("snis", "a rule", choices=("snis", "hard"), renamed={"softmax": "snis"})
    inner: Inner = section(Inner)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("speed=2", "speed was renamed: use rate"),
        ("old.rate=0.3", "old.rate was renamed: use inner.rate"),
        ("rule=softmax", "rule='softmax' was renamed: use snis"),
    ],
)
def test_an_old_name_is_an_error_that_says_the_new_one(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.build(Renamed, {}, [override])
    assert caught.value.problems == [says]
    name, value = override.split("=")
    assert config.check_values(Renamed, [(name, value)]) == [says]


def test_an_old_section_of_a_file_is_an_error_too() -> None:
    with pytest.raises(ConfigError, match="old was renamed: use inner"):
        config.build(Renamed, {"old": {"rate": 0.2}})
