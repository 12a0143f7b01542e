"""The gate: which backend, and which combinations are known to be bad."""

from pathlib import Path

import pytest

from protocol.errors import CodedError, ErrorCode
from supervisor.admission import BlockRule, check_blocklist, choose_backend, find_block
from supervisor.blocklist import OPERATOR_FILE, BlocklistError, load_blocklist

INSTALLED = {"mlx": "0.32.2", "llama": "0.3.36", "simulated": None}
RULE = BlockRule(
    signature={"architecture": "gemma*", "quantization": "4bit"},
    backend="mlx",
    versions=">=0.31,<0.33",
    reason="crashes in the first decode step",
)
TRAITS = {"id": "m", "format": "mlx", "architecture": "Gemma3", "quantization": "4bit"}


def test_the_format_decides() -> None:
    assert choose_backend("gguf", None, INSTALLED) == "llama"
    assert choose_backend("mlx", None, INSTALLED) == "mlx"
    assert choose_backend("gguf", "llama", INSTALLED) == "llama"


def test_a_failing_backend_is_better_than_none() -> None:
    assert choose_backend("gguf", None, INSTALLED, {"llama"}) == "llama"
    assert choose_backend("gguf", "llama", INSTALLED, {"llama"}) == "llama"


@pytest.mark.parametrize(
    ("model_format", "requested", "message"),
    [
        ("gguf", "mlx", "does not read gguf"),
        ("gguf", "vllm", "unknown backend 'vllm'"),
        ("simulated", None, "not available"),
    ],
)
def test_what_cannot_be_used_is_refused(
    model_format: str, requested: str | None, message: str
) -> None:
    with pytest.raises(CodedError, match=message) as refusal:
        choose_backend(model_format, requested, INSTALLED)
    assert refusal.value.code is ErrorCode.MODEL_UNSUPPORTED_BACKEND


@pytest.mark.parametrize(("backend", "extra"), [("mlx", "mlx"), ("llama", "llama")])
def test_a_missing_backend_says_how_to_get_it(backend: str, extra: str) -> None:
    model_format = {"mlx": "mlx", "llama": "gguf"}[backend]
    with pytest.raises(CodedError, match=rf"opta-lmx\[{extra}\]") as refusal:
        choose_backend(model_format, None, {**INSTALLED, backend: None})
    assert refusal.value.code is ErrorCode.MODEL_UNSUPPORTED_BACKEND


def test_a_rule_matches_all_of_its_signature() -> None:
    assert find_block([RULE], TRAITS, "mlx", "0.32.2") is RULE
    assert find_block([RULE], {**TRAITS, "quantization": "8bit"}, "mlx", "0.32.2") is None
    assert find_block([RULE], {**TRAITS, "architecture": "llama"}, "mlx", "0.32.2") is None


def test_a_rule_is_for_its_backend_and_versions() -> None:
    assert find_block([RULE], TRAITS, "llama", "0.32.2") is None
    assert find_block([RULE], TRAITS, "mlx", "0.33") is None
    assert find_block([RULE], TRAITS, "mlx", "0.32.2.dev1") is RULE
    assert find_block([RULE], TRAITS, "mlx", "built yesterday") is None


def test_a_rule_without_versions_is_for_all() -> None:
    rule = BlockRule({"id": "org/bad-*"}, "llama", "", "answers nonsense")
    assert find_block([rule], {**TRAITS, "id": "org/bad-one"}, "llama", "whatever") is rule


def test_the_refusal_tells_the_reason_and_the_way_out() -> None:
    check_blocklist([RULE], TRAITS, "mlx", "0.33")
    with pytest.raises(CodedError) as raised:
        check_blocklist([RULE], TRAITS, "mlx", "0.32.2")
    refusal = raised.value
    assert refusal.code is ErrorCode.MODEL_UNSUPPORTED_BACKEND
    assert RULE.reason in refusal.message
    assert "allow_unsupported_runtime" in refusal.message


def test_the_shipped_blocklist_can_be_read(tmp_path: Path) -> None:
    load_blocklist(tmp_path)


def test_the_operators_rules_are_added(tmp_path: Path) -> None:
    (tmp_path / OPERATOR_FILE).write_text(
        '[[rule]]\nbackend = "llama"\nreason = "hangs"\nsignature = { id = "x" }\n'
    )
    assert load_blocklist(tmp_path)[-1] == BlockRule({"id": "x"}, "llama", "", "hangs")


@pytest.mark.parametrize(
    "content",
    [
        "[[rule",
        '[[rule]]\nbackend = "llama"',
        '[[rule]]\nbackend = "llama"\nreason = "r"\nsignature = {}\nversion = "1"',
        '[[rule]]\nbackend = "llama"\nreason = "r"\nsignature = {}\nversions = "new"',
    ],
)
def test_a_broken_rule_stops_the_start(tmp_path: Path, content: str) -> None:
    (tmp_path / OPERATOR_FILE).write_text(content)
    with pytest.raises(BlocklistError, match=OPERATOR_FILE):
        load_blocklist(tmp_path)
