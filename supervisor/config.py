"""Settings from a TOML file, the environment and flags; the later one wins.

The file is the ``config`` flag, ``OPTA_LMX_CONFIG``, or ``config.toml`` in the
home folder when there is one. Its keys are the fields of ``Settings``, models are
``[[models]]`` tables. A variable is ``OPTA_LMX_`` and the field in capitals. A key
that nobody knows is an error: a misspelt ``admin_key`` must not mean "no key". An
empty variable counts as unset, but not that of a key, for the same reason.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from supervisor.ids import complaint_about_id
from supervisor.modelfiles import configured_id
from supervisor.names import NameConflict, Names, names
from supervisor.settings import ModelSetting, Settings

_PREFIX = "OPTA_LMX_"
#: Variables that are read elsewhere.
_NOT_SETTINGS = frozenset({"CACHE", "CONFIG", "URL", "WORKER_BOOT"})
_NOT_SETTINGS_PREFIX = "TEST_"
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
#: Tables that a variable could not hold.
_ONLY_IN_THE_FILE = frozenset({"aliases", "presets"})
_FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}


class ConfigError(Exception):
    """A setting is wrong; the message names the file or variable and the key."""


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Raise ``ConfigError``. A flag of None was not given; ``models`` replaces the file's."""
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in flags.items() if value is not None}
    config = given.pop("config", None) or environ.get(f"{_PREFIX}CONFIG") or None
    home = _expand_user(given.get("home") or environ.get(f"{_PREFIX}HOME") or "~/.opta-lmx")

    values: dict[str, Any] = {"home": home.absolute()}
    sources: dict[str, str] = {}

    def add(name: str, value: Any, source: str) -> None:
        values[name] = value
        sources[name] = source

    for name, value in _read_file(config, home).items():
        add(name, value, f"{_file(config, home)}: {name}")
    for name, text in _variables(environ).items():
        variable = f"{_PREFIX}{name.upper()}"
        add(name, _from_text(name, text, variable), variable)
    for name, value in given.items():
        if name not in _FIELDS:
            raise ConfigError(f"unknown setting {name!r}")
        flag = f"--{'model' if name == 'models' else name.replace('_', '-')}"
        if name == "models":
            value = _models(value, flag)
        add(name, _convert(name, value, flag), flag)
    settings = Settings(**values)
    _validate(settings, lambda name: sources.get(name, name))
    return settings


def names_of(settings: Settings) -> Names:
    """What models may be asked for by. Looks for the files of configured models."""
    ids = [configured_id(model) for model in settings.models]
    return names(settings.aliases, settings.presets, ids)


def parse_model(text: str) -> ModelSetting:
    """A path, an id, or ``NAME=PATH``. A relative path that exists becomes absolute."""
    name, equals, path = text.partition("=")
    if equals and not _exists(_expand_user(text)):
        if not name or not path:
            raise ConfigError(f"{text!r}: expected NAME=PATH, with both")
        return ModelSetting(path=_expand(path), id=name)
    if not text:
        raise ConfigError("expected a path, an id or NAME=PATH")
    return ModelSetting(path=_expand(text))


def model_to_load(text: str) -> tuple[str, str | None]:
    """The id to load and, when ``text`` names a file or folder, its path. ``ConfigError``."""
    setting = parse_model(text)
    path = Path(setting.path)
    if setting.id is not None:
        return setting.id, str(path.absolute())
    if _exists(path):
        return path.absolute().name.removesuffix(".gguf"), str(path.absolute())
    if text.startswith((".", "~")):
        raise ConfigError(f"{text}: no such file or folder")
    return text, None


def _models(values: Sequence[str], source: str) -> tuple[ModelSetting, ...]:
    try:
        return tuple(parse_model(value) for value in values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _expand(text: str) -> str:
    path = _expand_user(text)
    return str(path.absolute()) if _exists(path) or text.startswith("~") else text


def _expand_user(text: str | os.PathLike[str]) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{os.fspath(text)!r}: {error}") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # Too long for a name, or in a folder that is not ours to look into.
        return False


def _file(config: str | os.PathLike[str] | None, home: Path) -> Path:
    return home / "config.toml" if config is None else _expand_user(config)


def _read_file(config: str | os.PathLike[str] | None, home: Path) -> dict[str, Any]:
    file = _file(config, home)
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if config is None:
            return {}
        raise ConfigError(f"{file}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    for name in content:
        if name not in _FIELDS:
            raise ConfigError(f"{file}: unknown key {name!r}")
    return {name: _convert(name, value, f"{file}: {name}") for name, value in content.items()}


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX):
            continue
        suffix = variable.removeprefix(_PREFIX)
        if suffix in _NOT_SETTINGS or suffix.startswith(_NOT_SETTINGS_PREFIX):
            continue
        if suffix != suffix.upper() or suffix.lower() not in _FIELDS:
            raise ConfigError(f"{variable}: unknown setting")
        if suffix.lower() in _ONLY_IN_THE_FILE:
            raise ConfigError(f"{variable}: {suffix.lower()} can only be set in the file")
        if text or suffix.endswith("_KEY"):
            found[suffix.lower()] = text
    return found


def _from_text(name: str, text: str, source: str) -> Any:
    """``OPTA_LMX_MODELS`` is a list of what ``--model`` takes, separated by commas."""
    if name == "models":
        return _models([part.strip() for part in text.split(",") if part.strip()], source)
    return _convert(name, text, source, strict=False)


def _convert(name: str, value: Any, source: str, *, strict: bool = True) -> Any:
    kind = _FIELDS[name].type
    if name in _ONLY_IN_THE_FILE and isinstance(value, dict):
        each = get_args(kind)[1]
        return {key: _to(each, entry, f"{source}.{key}") for key, entry in value.items()}
    return _to(kind, value, source, strict=strict)


def _to(kind: Any, value: Any, source: str, *, strict: bool = True) -> Any:
    try:
        return msgspec.convert(value, kind, strict=strict, str_keys=True, dec_hook=_to_path)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except msgspec.ValidationError as error:
        message = str(error).replace("`", "").replace("$", "").replace(" - at .", " - at ")
        raise ConfigError(f"{source}: {message[0].lower()}{message[1:]}") from error


def _to_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value:
        return _expand_user(value).absolute()
    raise TypeError(f"expected a path, got {value!r}")


def _validate(settings: Settings, source: Callable[[str], str]) -> None:
    def require(name: str, ok: bool, what: str) -> None:
        if not ok:
            value = "" if name.endswith("_key") else f", not {getattr(settings, name)!r}"
            raise ConfigError(f"{source(name)}: must be {what}{value}")

    require("port", 0 <= settings.port <= 65535, "a port from 0 to 65535")
    require("host", bool(settings.host), "a host name or address")
    require("log_level", settings.log_level in _LOG_LEVELS, f"one of {', '.join(_LOG_LEVELS)}")
    for name in _FIELDS:
        if name.endswith("_s"):
            # Not an upper bound to any purpose: it keeps out infinity and NaN.
            require(name, 0 < getattr(settings, name) < 1e9, "a positive number of seconds")
    for name in ("max_body_bytes", "max_queue", "max_stream_buffer_bytes", "max_sequences"):
        require(name, getattr(settings, name) >= 1, "at least 1")
    require("max_downloads", settings.max_downloads >= 1, "at least 1")
    require("failure_threshold", settings.failure_threshold >= 1, "at least 1")
    for name in ("threads", "context_length", "memory_budget_bytes"):
        value = getattr(settings, name)
        require(name, value is None or value >= 1, "at least 1")
    for name in ("prompt_cache_bytes", "keep_alive_sec"):
        value = getattr(settings, name)
        require(name, value is None or value >= 0, "at least 0")
    for name in (
        "response_store_max",
        "response_store_max_bytes",
        "stream_store_max",
        "stream_store_max_bytes",
        "safe_start_after",
        "resume_exact_tokens",
        "warm_spares",
        "download_disk_reserve_bytes",
    ):
        require(name, getattr(settings, name) >= 0, "at least 0")
    require("draft_tokens", 0 <= settings.draft_tokens <= 64, "from 0 to 64")
    endpoint = settings.hub_endpoint
    is_url = endpoint is None or endpoint.startswith(("http://", "https://"))
    require("hub_endpoint", is_url, "an http:// or https:// address")
    for name in ("admin_key", "api_key"):
        require(name, _is_key(getattr(settings, name)), "printable ASCII without spaces, not empty")
    if settings.admin_key is not None and settings.admin_key == settings.api_key:
        raise ConfigError(
            f"{source('api_key')}: must differ from admin_key: an inference key never opens admin"
        )
    require(
        "beat_timeout_s",
        settings.beat_timeout_s > settings.beat_interval_s,
        "longer than beat_interval_s",
    )
    for model in settings.models:
        context_ok = model.context_length is None or model.context_length >= 1
        keep_alive_ok = model.keep_alive_sec is None or model.keep_alive_sec >= 0
        if not (model.path and model.id != "" and context_ok and keep_alive_ok):
            raise ConfigError(f"{source('models')}: wrong values for model {model.path!r}")
        complaint = None if model.id is None else complaint_about_id(model.id)
        if complaint is not None:
            raise ConfigError(f"{source('models')}: the id {model.id!r} {complaint}")
    for name, preset in settings.presets.items():
        if complaint := preset.parameters.complaint():
            raise ConfigError(f"{source('presets')}.{name}.parameters.{complaint}")
    try:
        names_of(settings)
    except NameConflict as error:
        table = str(error).partition(".")[0]
        raise ConfigError(f"{source(table).removesuffix(table)}{error}") from error


def _is_key(key: str | None) -> bool:
    return key is None or (bool(key) and key.isascii() and key.isprintable() and " " not in key)
