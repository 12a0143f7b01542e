"""What a preset adds to a request that asks for it: everything the request does not say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

from supervisor.gateway.endpoint import Gateway
from supervisor.presets import Preset


class Named(Protocol):
    """A request, as it was decoded."""

    model: str


@runtime_checkable
class Prompting(Protocol):
    """A request whose prompt is made by a chat template."""

    chat_template_kwargs: dict[str, Any] | None

    @property
    def has_system_prompt(self) -> bool: ...

    @property
    def settled_options(self) -> Collection[str]:
        """Variables of the template that the request has set in other words."""

    def add_system_prompt(self, prompt: str) -> None:
        """Put it first."""


def add_preset(gateway: Gateway, request: Named, *, has_system_prompt: bool = False) -> None:
    """Complete a request that names a preset; others stay as they are.

    ``has_system_prompt``: there is one in what the request goes on from.
    """
    route = gateway.names.routes.get(request.model)
    if route is not None and route.preset is not None:
        _add(route.preset, request, has_system_prompt=has_system_prompt)


def _add(preset: Preset, request: Named, *, has_system_prompt: bool) -> None:
    given = dict(preset.given())
    options = given.pop("chat_template_kwargs", {})
    for name, value in given.items():
        if name == "stop" and hasattr(request, "stop_sequences"):
            name, value = "stop_sequences", [value] if isinstance(value, str) else value
        # Not every request has every parameter.
        if getattr(request, name, value) is None:
            setattr(request, name, value)
    if not isinstance(request, Prompting):
        return
    kept = {name: options[name] for name in options.keys() - set(request.settled_options)}
    if kept:
        request.chat_template_kwargs = {**kept, **(request.chat_template_kwargs or {})}
    if preset.system_prompt and not has_system_prompt and not request.has_system_prompt:
        request.add_system_prompt(preset.system_prompt)


def settled_by_effort(effort: str | None) -> Collection[str]:
    """Who says how much is to be thought has said whether."""
    return () if effort is None else ("reasoning_effort", "enable_thinking")
