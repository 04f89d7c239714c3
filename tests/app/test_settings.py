"""Settings: parsing, errors, help and the checks against each other."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from flwr_moe.app.registry import SECTIONS, SYSTEMS
from flwr_moe.app.section import choices, shown, word
from flwr_moe.app.settings import (
    ConfigError,
    Settings,
    parse_assignments,
    parse_utc,
    pyproject_table,
    settings_help,
)
from flwr_moe.network import wire_dtype

# The keys the design promises, with the defaults users may rely on.
PROMISED = {
    "system": "ems-fl",
    "task": "digits",
    "seed": 0,
    "links": "satellite",
    "horizon-hours": 48.0,
    "num-rounds": "auto",
    "num-clients": "auto",
    "num-clusters": 6,
    "num-experts": 12,
    "top-k": 2,
    "partition": "domains",
    "dirichlet-alpha": 0.3,
    "learning-rate": "auto",
    "batch-size": 16,
    "local-steps": "auto",
    "max-local-steps": 1000,
    "ems-fl.gate": "random-features",
    "ems-fl.assignment": "exact",
    "ems-fl.train-shared": False,
    "fedmoe-da.p": 3,
    "fedmoe-da.tau": 1.0,
    "fedmoe-da.interval": 5,
    "fedmoe-da.gate": "mixed",
    "fedmoe-da.relay": False,
}
PROMISED_WITHOUT_DEFAULT = {
    *("split.cut", "split.prune", "split.bits", "split.dropout", "split.interval"),
    *("emo.overlays", "emo.tap", "emo.scaling", "emo.controller"),
}


def test_promised_keys_and_defaults() -> None:
    mapping = Settings().to_mapping()
    assert {key: mapping[key] for key in PROMISED} == PROMISED
    assert set(mapping) >= PROMISED_WITHOUT_DEFAULT


def test_every_default_is_valid_and_of_its_type() -> None:
    for section in (Settings, *SECTIONS.values()):
        for key, _, field in section.described():
            value = Settings()[key]
            assert value == shown(field, field.default)
            assert type(value) is (str if word(field) else type(field.default))
            assert Settings.from_mapping({key: value}) == Settings()


def test_strings_and_typed_values_give_the_same_settings() -> None:
    texts = {"seed": "3", "horizon-hours": "24", "ems-fl.train-shared": "true", "task": "digits"}
    typed = {"seed": 3, "horizon-hours": 24, "ems-fl.train-shared": True, "task": "digits"}
    settings = Settings.from_mapping(texts)
    assert settings == Settings.from_mapping(typed)
    assert (settings.seed, settings.horizon_hours, settings["ems-fl.train-shared"]) == (
        3,
        24.0,
        True,
    )
    assert type(settings.horizon_hours) is float


def test_mapping_round_trip() -> None:
    settings = Settings.from_mapping({"ems-fl.gate": "linear", "fedbuff.buffer-size": 2})
    assert Settings.from_mapping(settings.to_mapping()) == settings
    as_text = {key: str(value) for key, value in settings.to_mapping().items()}
    assert Settings.from_mapping(as_text) == settings


def test_replace_takes_attributes_and_keys_and_checks_them() -> None:
    settings = Settings().replace(seed=7, **{"ems-fl.gate": "plain"})
    assert (settings.seed, settings["ems-fl.gate"]) == (7, "plain")
    assert Settings().seed == 0
    with pytest.raises(ConfigError, match=r"seed=-1"):
        settings.replace(seed=-1)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("horizn-hours", 1, r"unknown setting 'horizn-hours' \(did you mean horizon-hours\?\)"),
        ("ems-fl.gates", "x", r"did you mean ems-fl\.gate"),
        ("zzz", 1, r"unknown setting 'zzz'$"),
        ("fedsl.cut", "x", r"unknown setting 'fedsl\.cut': it is split\.cut now$"),
        ("seed", "2.0", r"seed='2\.0': expected a whole number"),
        ("num-rounds", 2.0, r"num-rounds=2\.0: expected auto or a whole number at least 1"),
        ("num-rounds", 0, r"num-rounds=0: expected auto or a whole number at least 1"),
        ("num-rounds", "none", r"num-rounds='none': expected auto or a whole number"),
        ("learning-rate", "0", r"learning-rate=0\.0: expected auto or a number above 0"),
        ("split.clip", "auto", r"split\.clip='auto': expected none or a number above 0"),
        ("seed", "two", r"seed='two': expected a whole number at least 0"),
        ("seed", 1.5, r"seed=1\.5: expected a whole number"),
        ("seed", True, r"seed=True: expected a whole number"),
        ("horizon-hours", "0", r"horizon-hours=0\.0: expected a number above 0"),
        ("horizon-hours", "nan", r"horizon-hours='nan': expected a number"),
        ("horizon-hours", "inf", r"horizon-hours='inf'"),
        ("min-elevation", 90, r"min-elevation=90\.0: .* at least 0 and below 90"),
        ("beam-share", 0, r"beam-share=0\.0: expected a number above 0 and at most 1"),
        ("beam-share", 1.01, r"beam-share=1\.01"),
        ("ems-fl.train-shared", "yes", r"ems-fl\.train-shared='yes': expected true or false"),
        ("ems-fl.train-shared", 1, r"ems-fl\.train-shared=1: expected true or false"),
        ("ems-fl.gate", "linnear", r"'linnear' is unknown \(did you mean linear\?\); .*plain"),
        ("task", 3, r"task=3: expected text"),
        ("start", "tomorrow", r"start='tomorrow': expected an ISO 8601 time"),
        ("links", "carrier", r"links='carrier' is unknown; expected one of satellite, wireless"),
        ("partition", "idd", r"partition='idd' is unknown \(did you mean iid\?\)"),
        (
            "wireless.coherence-s",
            0,
            r"wireless\.coherence-s=0\.0: expected a number at least 0\.001",
        ),
    ],
)
def test_bad_settings_are_named_in_one_line(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Settings.from_mapping({key: value})  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "edge"), [("min-elevation", 0), ("beam-share", 1), ("top-k", 1)])
def test_inclusive_bounds_are_accepted(key: str, edge: int) -> None:
    assert Settings.from_mapping({key: edge}).to_mapping()[key] == edge


def test_an_unknown_system_says_what_there_is() -> None:
    for system in SYSTEMS:
        assert Settings(system=system).system == system
    with pytest.raises(ConfigError) as caught:
        Settings(system="fedmoe-ad")
    assert str(caught.value) == (
        "system='fedmoe-ad' is unknown (did you mean fedmoe-da?); expected one of "
        + ", ".join(SYSTEMS)
    )


@pytest.mark.parametrize(
    ("changes", "num_nodes", "message"),
    [
        ({"num-experts": 5}, 18, r"num-experts=5: each of num-clusters=6"),
        ({"min-experts": 3}, 18, r"min-experts=3: num-clusters=6 need 18 .* num-experts=12"),
        ({"max-experts": 1}, 18, r"max-experts=1: num-clusters=6 can own 6 .* num-experts=12"),
        ({}, 5, r"num-clusters=6: needs at least as many clients, SuperNodes is 5"),
        ({"num-clients": 5}, 18, r"num-clusters=6: .* num-clients is 5"),
        ({"num-clients": 19}, 18, r"num-clients=19: only 18 SuperNodes"),
        ({"top-k": 13}, 18, r"top-k=13: more than num-experts=12"),
    ],
)
def test_settings_no_run_can_meet(changes: dict[str, int], num_nodes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.from_mapping(changes).validate_for(num_nodes)


def test_settings_at_the_edge_of_what_can_be_met() -> None:
    Settings().validate_for(6)
    edge = Settings.from_mapping({"min-experts": 2, "max-experts": 2, "top-k": 12})
    edge.validate_for(18)


def test_expert_bounds_default_is_rounded_up() -> None:
    assert Settings().expert_bounds == (1, 2)
    assert Settings(num_experts=13).expert_bounds == (1, 3)
    assert Settings(max_experts=5).expert_bounds == (1, 5)


def test_parse_utc() -> None:
    expected = "2026-01-01T12:00:00+00:00"
    for text in ("2026-01-01T12:00:00Z", "2026-01-01T12:00:00", "2026-01-01T14:00:00+02:00"):
        assert parse_utc(text).isoformat() == expected


def test_parse_assignments() -> None:
    assert parse_assignments(["seed=1", "data=a=b", "seed=2"]) == {"seed": "2", "data": "a=b"}
    with pytest.raises(ConfigError, match=r"'seed': expected KEY=VALUE"):
        parse_assignments(["seed"])


def test_help_lists_every_key_with_its_default() -> None:
    lines = settings_help().splitlines()
    for section in (Settings, *SECTIONS.values()):
        for key, _, field in section.described():
            (line,) = [line for line in lines if line.split()[0] == key]
            assert field.description and field.description in line
    assert any(line.endswith("[random-features]") for line in lines)


def test_pyproject_lists_every_setting_with_its_default() -> None:
    # `flwr run --run-config` accepts only keys that pyproject.toml lists.
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    listed = flatten(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    assert listed == Settings().to_mapping()
    assert pyproject_table() in text


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def test_results_do_not_tell_the_token() -> None:
    settings = Settings(exchange_token="secret")
    assert "secret" not in map(str, settings.to_results().values())
    assert settings.to_results().keys() == settings.to_mapping().keys()


def test_wire_dtypes_are_those_of_the_network() -> None:
    assert choices(Settings.model_fields["wire_dtype"]) == wire_dtype.WIRE_DTYPES
