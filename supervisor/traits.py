"""What a model's own files say of it, whatever their format."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import CodedError, ErrorCode
from protocol.messages import ModelKind
from supervisor.geometry import UNKNOWN, Geometry


@dataclass(frozen=True, slots=True)
class Traits:
    """``quantization`` is empty where the weights are as trained, or nothing says so.

    ``context_length``: tokens it was trained for; None where nothing says so.
    ``float_bytes``: of a number as the model calculates.
    """

    architecture: str
    quantization: str
    parameters: int
    context_length: int | None
    kind: ModelKind
    has_chat_template: bool
    geometry: Geometry = UNKNOWN
    float_bytes: int = 2


def incomplete(name: str, problems: list[str]) -> CodedError:
    """The refusal of a model with all that is missing, short or damaged."""
    return CodedError(ErrorCode.MODEL_INCOMPLETE, f"{name} is incomplete: {'; '.join(problems)}")
