"""Where settings come from, which one wins, and how a mistake is named."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.config import ConfigError, load_settings, names_of, parse_model
from supervisor.settings import ModelSetting, Settings

NOTHING: Mapping[str, Any] = {}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def write(home: Path, text: str) -> Path:
    home.mkdir(exist_ok=True)
    file = home / "config.toml"
    file.write_text(text)
    return file


def load(home: Path, flags: Mapping[str, Any] = NOTHING, /, **environ: str) -> Settings:
    variables = {f"OPTA_LMX_{name.upper()}": value for name, value in environ.items()}
    return load_settings(flags, {"OPTA_LMX_HOME": str(home), "PATH": "/bin", **variables})


def test_defaults(home: Path) -> None:
    assert load(home) == Settings(home=home)
    assert load_settings({}, {}).home == Path.home() / ".opta-lmx"


def test_the_later_one_wins(home: Path) -> None:
    write(home, "port = 1\nhost = '::1'\nlog_level = 'debug'\n")
    assert load(home).port == 1
    assert load(home, port="2").port == 2
    settings = load(home, {"port": 3, "host": None}, port="2", log_level="error")
    assert (settings.port, settings.host, settings.log_level) == (3, "::1", "error")


def test_every_kind_of_value_from_the_environment(home: Path) -> None:
    settings = load(
        home,
        port="9000",
        sse_keepalive_s="2.5",
        enable_simulated="true",
        admin_key="k",
        models_dir="~/models",
        models="/a/b.gguf, org/name,fast=/c",
        threads="4",
    )
    assert settings.port == 9000
    assert settings.sse_keepalive_s == 2.5
    assert settings.enable_simulated is True
    assert settings.admin_key == "k"
    assert settings.models_dir == Path.home() / "models"
    assert settings.threads == 4
    assert settings.models == (
        ModelSetting(path="/a/b.gguf"),
        ModelSetting(path="org/name"),
        ModelSetting(path="/c", id="fast"),
    )


def test_models_in_the_file(home: Path) -> None:
    write(
        home, '[[models]]\npath = "/a"\nid = "x"\ncontext_length = 512\n[[models]]\npath = "b/c"\n'
    )
    assert load(home).models == (
        ModelSetting(path="/a", id="x", context_length=512),
        ModelSetting(path="b/c"),
    )
    assert load(home, {"models": ["n=/d"]}).models == (ModelSetting(path="/d", id="n"),)


def test_aliases_and_presets_are_tables_of_the_file(home: Path) -> None:
    write(
        home,
        """
        [aliases]
        fast = "org/small"
        best = ["org/big", "fast"]
        [presets.coder]
        model = "best"
        system_prompt = "You write code."
        parameters = { temperature = 0, stop = "END", logit_bias = { "7" = -100 } }
        load = { context_length = 512 }
        """,
    )
    settings = load(home)
    assert settings.aliases == {"fast": "org/small", "best": ("org/big", "fast")}
    preset = settings.presets["coder"]
    assert preset.given() == {"temperature": 0.0, "stop": "END", "logit_bias": {7: -100.0}}
    assert preset.load.options() == {"context_length": 512}
    route = names_of(settings).routes["preset:coder"]
    assert route.candidates == ("org/big", "org/small")
    assert route.preset == preset
    with pytest.raises(ConfigError, match="OPTA_LMX_ALIASES: aliases can only be set in the file"):
        load(home, **{"aliases": "{}"})


def test_the_file_can_be_elsewhere(home: Path, tmp_path: Path) -> None:
    write(home, "port = 1")
    other = tmp_path / "other.toml"
    other.write_text("port = 2")
    assert load(home, config=str(other)).port == 2
    third = tmp_path / "third.toml"
    third.write_text("port = 3")
    assert load(home, {"config": third}, config=str(other)).port == 3


def test_home_flag(home: Path, tmp_path: Path) -> None:
    write(home, "port = 1")
    settings = load(tmp_path, {"home": str(home)})
    assert (settings.home, settings.port) == (home, 1)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("prot = 1", "prot"),
        ("port = '1'", "port"),
        ("port = 70000", "port"),
        ("port = -1", "port"),
        ("port = true", "port"),
        ("admin_key = ''", "admin_key"),
        ("api_key = 'a b'", "api_key"),
        ("sse_keepalive_s = 0", "sse_keepalive_s"),
        ("response_store_max = -1", "response_store_max"),
        ("response_store_max_bytes = -1", "response_store_max_bytes"),
        ("stream_store_max = -1", "stream_store_max"),
        ("stream_store_max_bytes = -1", "stream_store_max_bytes"),
        ("stream_keep_s = 0", "stream_keep_s"),
        ("sse_keepalive_s = inf", "sse_keepalive_s"),
        ("load_stall_s = nan", "load_stall_s"),
        ("failure_threshold = 0", "failure_threshold"),
        ("max_queue = 0", "max_queue"),
        ("threads = 0", "threads"),
        ("context_length = 0", "context_length"),
        ("prompt_cache_bytes = -1", "prompt_cache_bytes"),
        ("draft_tokens = 65", "draft_tokens"),
        ("log_level = 'loud'", "log_level"),
        ("beat_timeout_s = 0.5", "beat_timeout_s"),
        ("[[models]]\nid = 'x'", "models"),
        ("[[models]]\npath = 'x'\nsize = 1", "size"),
        ("[[models]]\npath = ''", "models"),
        ("[[models]]\npath = 'x'\ncontext_length = 0", "models"),
        ("host = ''", "host"),
        ("aliases = 'x'", "aliases"),
        ("[aliases]\na = 3", "aliases.a: expected"),
        ("[aliases]\na = []", "aliases.a: stands for no model"),
        ("[aliases]\na = 'a'", "aliases.a: leads back to itself"),
        ("[aliases]\na = 'b'\n[[models]]\npath = '/p/a.gguf'\nid = 'a'", "aliases.a: the name"),
        ("[aliases]\n'org/a' = 'b'\n[[models]]\npath = 'org/a'", "aliases.org/a: the name"),
        ("[presets.p]\nsystem_prompt = 'x'", "presets.p: object missing required field model"),
        ("[presets.p]\nmodel = 'm'\nmodle = 'x'", "presets.p: object contains unknown field"),
        ("[presets.p]\nmodel = 'm'\nparameters = {temp = 1}", "unknown field temp"),
        ("[presets.p]\nmodel = 'm'\nparameters = {temperature = 3}", "presets.p: expected float"),
        ("[presets.p]\nmodel = 'm'\nparameters = {stop = ['']}", "presets.p.parameters.stop"),
        ("[presets.p]\nmodel = 'm'\nload = {path = '/x'}", "unknown field path"),
        (
            "[presets.p]\nmodel = 'm'\nparameters = {chat_template_kwargs = {tools = []}}",
            "presets.p.parameters.chat_template_kwargs: 'tools'",
        ),
        ("models_dir = 3", "models_dir"),
        ("models_dir = '~nobody-of-this-name'", "models_dir"),
    ],
)
def test_mistakes_in_the_file_name_it_and_the_key(home: Path, text: str, key: str) -> None:
    file = write(home, text)
    with pytest.raises(ConfigError) as error:
        load(home)
    assert str(file) in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "http"),
        ("prot", "1"),
        ("models", "=x"),
        ("models", "~nobody-of-this-name/x"),
        ("models_dir", "~nobody-of-this-name/x"),
        ("enable_simulated", "maybe"),
        ("admin_key", ""),
    ],
)
def test_mistakes_in_the_environment_name_the_variable(home: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"OPTA_LMX_{name.upper()}"):
        load(home, **{name: value})


def test_an_empty_variable_counts_as_unset(home: Path) -> None:
    write(home, "port = 1\nmodels = [{path = 'x'}]\n")
    settings = load(home, port="", models="", config="", threads="", prompt_cache_bytes="")
    assert settings.port == 1
    assert settings.models == (ModelSetting(path="x"),)
    assert settings.prompt_cache_bytes is None


def test_no_prompt_cache_is_a_choice(home: Path) -> None:
    assert load(home, prompt_cache_bytes="0").prompt_cache_bytes == 0


@pytest.mark.parametrize("name", ["load", "a//b", "/a", "a/", "../a", "a" * 257, "a\nb"])
def test_a_name_that_cannot_be_an_id(home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--model: the id"):
        load(home, {"models": [f"{name}=/d"]})


def test_mistakes_in_flags_name_the_flag(home: Path) -> None:
    with pytest.raises(ConfigError, match="--max-queue: must be at least 1, not 0"):
        load(home, {"max_queue": 0})
    with pytest.raises(ConfigError, match="--model"):
        load(home, {"models": ["=x"]})
    with pytest.raises(ConfigError, match="unknown setting 'prot'"):
        load(home, {"prot": 1})


def test_files_that_cannot_be_read(home: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(home, {"config": home / "missing.toml"})
    file = write(home, "port = ")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load(home)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load(home)


def test_one_key_for_both_sides_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="OPTA_LMX_API_KEY: must differ from admin_key"):
        load(home, {"admin_key": "same"}, api_key="same")


def test_keys_are_not_repeated_in_errors(home: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(home, api_key="two words")
    assert "two words" not in str(error.value)


@pytest.mark.parametrize("name", ["URL", "CONFIG_", "TEST_X", "WORKER_BOOT", "CACHE"])
def test_other_variables_of_ours(home: Path, name: str) -> None:
    if name.endswith("_"):
        with pytest.raises(ConfigError):
            load(home, **{name: "x"})
    else:
        load(home, **{name: "x"})


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("/a/b.gguf", ModelSetting(path="/a/b.gguf")),
        ("org/name:file", ModelSetting(path="org/name:file")),
        ("x=/a", ModelSetting(path="/a", id="x")),
        ("x=~/a", ModelSetting(path=str(Path.home() / "a"), id="x")),
        ("a/b=c=d", ModelSetting(path="c=d", id="a/b")),
    ],
)
def test_parse_model(text: str, setting: ModelSetting) -> None:
    assert parse_model(text) == setting


def test_a_relative_path_is_one_only_if_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_model("./m.gguf").path == "./m.gguf"
    (tmp_path / "m.gguf").touch()
    assert parse_model("./m.gguf").path == str(tmp_path / "m.gguf")
    assert parse_model("n=m.gguf") == ModelSetting(path=str(tmp_path / "m.gguf"), id="n")


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a=b.gguf"
    path.touch()
    assert parse_model(str(path)) == ModelSetting(path=str(path))


@given(
    st.dictionaries(st.sampled_from(["PORT", "MODELS", "API_KEY", "THREADS"]), st.text(max_size=8))
)
def test_no_variable_is_more_than_a_config_error(values: dict[str, str]) -> None:
    environ = {f"OPTA_LMX_{name}": value.replace("\0", "") for name, value in values.items()}
    with contextlib.suppress(ConfigError):
        load_settings({}, {"OPTA_LMX_HOME": "/nonexistent", **environ})
