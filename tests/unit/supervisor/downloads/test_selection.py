"""Which files of a repository make a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import CodedError
from supervisor.downloads.messages import PlannedFile
from supervisor.downloads.selection import Wanted, match_stem, select, wanted

BOTH = ("mlx", "gguf")
SAFETENSORS = (
    *("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"),
    *("chat_template.jinja", "tokenizer.model", "generation_config.json"),
)
NOT_NEEDED = (
    *("README.md", ".gitattributes", "pytorch_model.bin", "model.pt", "onnx/model.onnx"),
    *("original/consolidated.00.pth", "original/params.json", "consolidated.safetensors"),
    *("flax_model.msgpack", "tf_model.h5", "modeling_x.py", "onnx/config.json", "figure.png"),
)
QUANTISED = ("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf")


def files(*names: str) -> list[PlannedFile]:
    return [PlannedFile(name, 10, f"etag-{name}", lfs=True) for name in names]


def names(ask: str, *there: str, formats: tuple[str, ...] = BOTH) -> tuple[str, set[str]]:
    parts = wanted(ask)
    assert parts is not None
    model_id, selected = select(parts, files(*there), formats)
    assert len(selected) == len({file.name for file in selected})
    return model_id, {file.name for file in selected}


def refusal(ask: str, *there: str, formats: tuple[str, ...] = BOTH) -> CodedError:
    parts = wanted(ask)
    assert parts is not None
    with pytest.raises(CodedError) as caught:
        select(parts, files(*there), formats)
    return caught.value


def test_a_folder_is_its_weights_and_what_is_read_beside_them() -> None:
    assert names("org/m", *SAFETENSORS, *NOT_NEEDED, *QUANTISED) == ("org/m", {*SAFETENSORS})


def test_weights_under_another_name_are_better_than_none() -> None:
    there = ("config.json", "consolidated.safetensors")
    assert names("org/m", *there) == ("org/m", {*there})


def test_a_repository_of_both_gives_what_can_be_run_here() -> None:
    there = ("config.json", "model.safetensors", "m-Q8_0.gguf")
    assert names("org/m", *there, formats=("gguf",)) == ("org/m:m-Q8_0", {"m-Q8_0.gguf"})
    assert names("org/m", *there)[0] == "org/m"


@pytest.mark.parametrize("stem", ["m-Q4_K_M", "m-q4_k_m", "Q4_K_M", "q4_k_m", "m-Q4_K_M.gguf"])
def test_a_gguf_is_found_by_its_stem_or_its_quantisation(stem: str) -> None:
    found = names(f"org/m:{stem}", *QUANTISED, "config.json", "mmproj-Q4_K_M.gguf")
    assert found == ("org/m:m-Q4_K_M", {"m-Q4_K_M.gguf"})


def test_the_only_gguf_needs_no_name() -> None:
    there = ("README.md", "config.json", "m.gguf", "mmproj-m.gguf", "imatrix_unsloth.gguf")
    assert names("org/m", *there) == ("org/m:m", {"m.gguf"})


def test_one_of_several_has_to_be_named() -> None:
    error = refusal("org/m", *QUANTISED)
    assert (error.code, error.param) == ("invalid_value", "model_id")
    assert all(name.removesuffix(".gguf") in error.message for name in QUANTISED)
    assert refusal("org/m:q8_0", "a-q8_0.gguf", "b-q8_0.gguf").code == "invalid_value"


def test_a_split_gguf_is_all_its_parts() -> None:
    parts = {f"UD-Q4/m-UD-Q4-0000{number}-of-00002.gguf" for number in (1, 2)}
    assert names("org/m:UD-Q4", *parts, "m-Q8_0.gguf") == ("org/m:m-UD-Q4", parts)
    assert refusal("org/m", "m-00002-of-00002.gguf").code == "model_incomplete"


def test_what_is_not_there_is_told_with_what_is() -> None:
    error = refusal("org/m:Q2_K", *QUANTISED)
    assert error.code == "model_not_found"
    assert "m-Q8_0 (0.0 MB)" in error.message
    assert refusal("org/m:Q2_K", *SAFETENSORS).code == "model_not_found"


@pytest.mark.parametrize(
    ("there", "formats"),
    [
        (("README.md", "pytorch_model.bin"), BOTH),
        (("m.gguf",), ("mlx",)),
        (("config.json", "model.safetensors"), ("gguf",)),
        (("m.gguf",), ()),
    ],
)
def test_what_nothing_here_runs_is_not_fetched(
    there: tuple[str, ...], formats: tuple[str, ...]
) -> None:
    assert refusal("org/m", *there, formats=formats).code == "model_unsupported_backend"


@pytest.mark.parametrize(
    ("model_id", "ask"),
    [
        ("org/name", Wanted("org/name", None)),
        ("Org-1/na.me_2", Wanted("Org-1/na.me_2", None)),
        ("org/name:stem", Wanted("org/name", "stem")),
        ("org/name:a b.gguf", Wanted("org/name", "a b")),
        ("name", None),
        ("a/b/c", None),
        ("/abs/path", None),
        ("org/na--me", None),
        ("org/../x", None),
        ("org/name:", None),
        ("org/name:a/b", None),
        ("org/name.git", None),
        ("../x", None),
    ],
)
def test_ids_of_the_hub(model_id: str, ask: Wanted | None) -> None:
    assert wanted(model_id) == ask


@given(st.text(max_size=40), st.lists(st.text(max_size=20), max_size=8))
def test_any_name_is_matched_or_not(stem: str, stems: list[str]) -> None:
    found = match_stem(stem, stems)
    assert set(found) <= set(stems)
    assert not (stem in stems and set(found) != {stem})


NAMES = st.text("ab-_./0123", min_size=1, max_size=12)
SUFFIXES = st.sampled_from([".gguf", ".safetensors", ".json", ".bin", "-00001-of-00002.gguf"])


@given(st.lists(st.tuples(NAMES, SUFFIXES).map("".join), unique=True, max_size=12), st.booleans())
def test_any_repository_gives_files_of_it_or_a_reason(there: list[str], named: bool) -> None:
    ask = Wanted("org/m", "a" if named else None)
    try:
        model_id, selected = select(ask, files(*there), BOTH)
    except CodedError:
        return
    assert model_id.startswith("org/m")
    assert selected
    assert {file.name for file in selected} <= set(there)
    assert len({file.name.endswith(".gguf") for file in selected}) == 1
