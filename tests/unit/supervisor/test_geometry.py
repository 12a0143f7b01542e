"""The shape of a model, read from headers that may say anything."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.geometry import Geometry, of_config, of_gguf
from supervisor.gguf import GgufHeader, read_header
from tests.support.tiny_hybrid import write_tiny_hybrid
from tests.support.tiny_mamba import write_tiny_mamba

LLAMA = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}


def header(numbers: dict[str, int], **arrays: list[int]) -> GgufHeader:
    values: dict[str, str | int] = {f"a.{key}": value for key, value in numbers.items()}
    named = {f"a.{key}": value for key, value in arrays.items()}
    return GgufHeader("a", "", values, {}, named, 0)


def test_keys_and_values_of_every_layer() -> None:
    numbers = {"block_count": 3, "embedding_length": 64}
    heads = {"attention.head_count": 8, "attention.head_count_kv": 2}
    shape = of_gguf(header({**numbers, **heads}))
    assert (shape.kv, shape.heads, shape.state) == (3 * 2 * (8 + 8), 8, 0)


def test_as_many_heads_as_queries_where_nothing_else_is_said() -> None:
    shape = of_gguf(header({"block_count": 2, "embedding_length": 64, "attention.head_count": 4}))
    assert shape.kv == 2 * 4 * 32


def test_layers_may_differ() -> None:
    numbers = {"block_count": 4, "attention.key_length": 16, "attention.value_length": 8}
    state = {"ssm.inner_size": 8, "ssm.state_size": 4, "ssm.conv_kernel": 4}
    arrays = {"attention.head_count_kv": [0, 2, 0, 4], "feed_forward_length": [10, 30, 20, 10]}
    shape = of_gguf(header({**numbers, **state}, **arrays))
    assert shape.kv == 6 * 24
    assert shape.feed_forward == 30
    assert shape.state == 2 * (3 * 8 + 8 * 4)


def test_recurrent_models(tmp_path: Path) -> None:
    mamba = of_gguf(read_header(write_tiny_mamba(tmp_path / "mamba.gguf")))
    assert mamba.kv == 0
    assert mamba.state > 0
    hybrid = of_gguf(read_header(write_tiny_hybrid(tmp_path / "hybrid.gguf")))
    assert hybrid.state > 0


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, (4 * 4 * 32, 0)),
        ({"num_key_value_heads": 2}, (4 * 2 * 32, 0)),
        ({"head_dim": 10}, (4 * 4 * 20, 0)),
        ({"kv_lora_rank": 30, "qk_rope_head_dim": 5}, (4 * 35, 0)),
        ({"sliding_window": 7, "sliding_window_pattern": 2}, (2 * 128, 2 * 128)),
        ({"sliding_window": 7, "layer_types": ["sliding_attention"] * 3}, (128, 3 * 128)),
        ({"sliding_window": 7, "use_sliding_window": False}, (4 * 128, 0)),
        ({"sliding_window": 7}, (4 * 128, 0)),
    ],
)
def test_configs(more: dict[str, Any], expected: tuple[int, int]) -> None:
    shape = of_config({**LLAMA, **more})
    assert (shape.kv, shape.windowed_kv) == expected
    inside = of_config({"vocab_size": 7, "text_config": {**LLAMA, **more}})
    assert inside == shape


_JSON = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
)


@given(st.dictionaries(st.sampled_from([*LLAMA, "sliding_window", "layer_types"]), _JSON))
def test_a_config_may_say_anything(config: dict[str, Any]) -> None:
    shape = of_config(config)
    assert all(getattr(shape, name) >= 0 for name in Geometry.__slots__)
