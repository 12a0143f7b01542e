"""What a reload applies, what it leaves for the next start, and what it tells of both."""

from __future__ import annotations

from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from supervisor.changes import LIVE, SECRET, changes, in_effect, without_logins
from supervisor.presets import Preset
from supervisor.settings import ModelSetting, Settings

BEFORE = Settings(home=Path("/home"))
OTHER = Settings(
    home=Path("/other"),
    port=9,
    max_body_bytes=1,
    models=(ModelSetting("/m.gguf", id="m"),),
    aliases={"fast": "m", "best": ("m", "n")},
    presets={"p": Preset(model="m")},
    admin_key="secret-a",
    api_key="secret-b",
    models_dir=Path("/models"),
    log_level="debug",
    keep_alive_sec=3,
)
CHANGED = [
    name for name in Settings.__struct_fields__ if getattr(BEFORE, name) != getattr(OTHER, name)
]


def test_what_is_live_is_a_setting() -> None:
    assert set(Settings.__struct_fields__) >= LIVE


def test_where_a_server_listens_is_for_its_next_start() -> None:
    told = changes(BEFORE, OTHER)
    assert told.needs_restart == ["home", "port", "max_body_bytes"]
    assert [each.name for each in told.changed] == CHANGED
    assert told.applied == [name for name in CHANGED if name not in told.needs_restart]


def test_keys_are_not_told() -> None:
    told = changes(BEFORE, OTHER)
    values = {each.name: (each.before, each.after) for each in told.changed}
    assert values["admin_key"] == (None, SECRET)
    assert b"secret-" not in msgspec.json.encode(told)
    rotated = changes(OTHER, msgspec.structs.replace(OTHER, api_key="secret-c"))
    assert [(each.name, each.before, each.after) for each in rotated.changed] == [
        ("api_key", SECRET, SECRET)
    ]


def test_values_are_told_as_json_has_them() -> None:
    told = msgspec.json.decode(msgspec.json.encode(changes(BEFORE, OTHER)))
    values = {each["name"]: each["after"] for each in told["changed"]}
    assert values["home"] == "/other"
    assert values["aliases"] == {"fast": "m", "best": ["m", "n"]}
    assert values["presets"] == {"p": {"model": "m", "parameters": {}}}
    assert values["models"][0]["path"] == "/m.gguf"


@given(st.sets(st.sampled_from(CHANGED)))
def test_a_second_reload_finds_what_still_waits_for_a_restart(names: set[str]) -> None:
    asked = msgspec.structs.replace(BEFORE, **{name: getattr(OTHER, name) for name in names})
    effective = in_effect(BEFORE, asked)
    for name in Settings.__struct_fields__:
        expected = asked if name in LIVE else BEFORE
        assert getattr(effective, name) == getattr(expected, name)
    again = changes(effective, asked)
    assert again.applied == []
    assert again.needs_restart == changes(BEFORE, asked).needs_restart
    assert changes(asked, asked).changed == []


def test_no_login_of_a_url_is_told() -> None:
    assert without_logins("hub: 'https://me:pass@hub.example/a@b'") == (
        "hub: 'https://hub.example/a@b'"
    )
    assert without_logins("https://hub.example/a@b and more") == "https://hub.example/a@b and more"
