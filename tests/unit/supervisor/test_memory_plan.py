"""What a model will take, from its header and the terms of its load."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import ModelKind
from supervisor import modelfiles
from supervisor.geometry import Geometry
from supervisor.memory_plan import (
    CONTEXT_STEP,
    MemoryPlan,
    Terms,
    context_length,
    largest_context,
    plan_memory,
)
from supervisor.modelfiles import ModelFiles
from supervisor.traits import Traits

SHAPE = Geometry(embedding=64, feed_forward=256, vocabulary=1000, heads=4, kv=100)


def files(
    shape: Geometry = SHAPE, *, size: int = 10_000_000, trained: int | None = 4096
) -> ModelFiles:
    traits = Traits("llama", "", 0, trained, ModelKind.GENERATE, True, shape, float_bytes=4)
    return ModelFiles(Path("/m/x.gguf"), "gguf", traits, size, "digest")


def plan(backend: str = "llama", context: int | None = None, **more: int) -> MemoryPlan:
    return plan_memory(files(), Terms(backend, context, more.pop("sequences", 4), **more))


def test_llama_shares_its_cells() -> None:
    one, four = plan(sequences=1), plan(sequences=4)
    assert one.kv == four.kv == 100 * 4096 * 2
    assert four.at_load == four.weights + four.overhead + four.kv


def test_mlx_has_a_cache_for_each_sequence_and_fills_it_by_and_by() -> None:
    four = plan("mlx", 1000)
    assert four.kv == 4 * 100 * 1000 * 4
    assert four.at_load == four.weights + four.overhead
    assert four.growth >= four.kv + four.prompt_cache


def test_layers_with_a_window_keep_no_more_than_that_on_mlx() -> None:
    shape = Geometry(kv=10, windowed_kv=50, window=512)
    on_mlx = plan_memory(files(shape), Terms("mlx", 2048, 1))
    assert on_mlx.kv == (10 * 2048 + 50 * 512) * 4
    # llama.cpp keeps every token of them.
    assert plan_memory(files(shape), Terms("llama", 2048, 1)).kv == 60 * 2048 * 2


def test_a_recurrent_state_is_kept_once_for_each_sequence() -> None:
    shape = Geometry(state=1000)
    assert plan_memory(files(shape), Terms("llama", 2048, 3)).kv == 3 * 4000


def test_the_context_is_what_the_backend_will_choose() -> None:
    assert context_length(files(), Terms("llama", None, 1)) == 4096
    assert context_length(files(trained=None), Terms("llama", None, 1)) == 8192
    assert context_length(files(trained=131_072), Terms("llama", None, 1)) == 8192
    assert context_length(files(trained=131_072), Terms("llama", 100_000, 1)) == 100_000
    # The backend refuses it, which is not a question of memory.
    assert context_length(files(), Terms("llama", 1_000_000, 1)) == 4096


def test_the_prompt_cache_is_what_an_operator_says() -> None:
    assert plan().prompt_cache == plan().kv
    assert plan(prompt_cache=5).prompt_cache == 5
    assert plan(prompt_cache=0).total == plan().required


def test_a_draft_model_has_weights_as_well() -> None:
    assert plan("mlx", draft_bytes=1000).weights == plan("mlx").weights + 1000


def test_a_correction_counts_but_never_below_what_is_certain() -> None:
    assert plan_memory(files(), Terms("llama", None, 4), 500).required == plan().required + 500
    least = plan_memory(files(), Terms("llama", None, 4), -(10**12))
    assert least.required == least.weights + least.kv + least.compute


def test_real_headers(tiny_gguf: Path, demo_gguf: Path) -> None:
    for path, cells in ((tiny_gguf, 512), (demo_gguf, 11_520)):
        found = modelfiles.inspect(path)
        assert plan_memory(found, Terms("llama", 1024, 1)).kv == cells * 1024 * 2


@given(
    st.integers(0, 2000),
    st.sampled_from(["llama", "mlx"]),
    st.integers(0, 10**9),
    st.integers(1, 8),
)
def test_a_context_that_is_offered_fits_and_is_the_largest(
    kv: int, backend: str, available: int, sequences: int
) -> None:
    model, terms = files(Geometry(kv=kv, heads=2)), Terms(backend, None, sequences)
    found = largest_context(model, terms, 0, available)

    def needs(context: int) -> int:
        return plan_memory(model, Terms(backend, context, sequences)).required

    if found is None:
        assert needs(512) > available
        return
    assert found < context_length(model, terms)
    assert needs(found) <= available
    after = found + CONTEXT_STEP
    assert after >= context_length(model, terms) or needs(after) > available
