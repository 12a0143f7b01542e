"""What a model was promised, and what it was found to take."""

from dataclasses import replace
from pathlib import Path

from protocol.messages import ModelKind
from supervisor.gate import ModelSpec
from supervisor.memory_lessons import MemoryLessons
from supervisor.memory_plan import MemoryPlan
from supervisor.memory_share import MemoryShare, lesson_key
from supervisor.modelfiles import ModelFiles
from supervisor.traits import Traits

MB = 1024 * 1024
PLAN = MemoryPlan(
    context_length=2048,
    sequences=4,
    weights=100 * MB,
    kv=50 * MB,
    compute=20 * MB,
    overhead=60 * MB,
    prompt_cache=50 * MB,
)
TRAITS = Traits("llama", "", 0, None, ModelKind.GENERATE, has_chat_template=False)
FILES = ModelFiles(Path("/m/x.gguf"), "gguf", TRAITS, 100 * MB, "digest")
SPEC = ModelSpec("m", FILES, "llama", "1.0", None, None, 500 * MB, plan=PLAN)


def test_the_plan_is_promised_until_it_is_measured(tmp_path: Path) -> None:
    share = MemoryShare(SPEC, MemoryLessons(tmp_path))
    share.spawned()
    assert share.promised == PLAN.total
    assert share.measured(1, 70 * MB).baseline == FILES.size_bytes
    assert share.promised == PLAN.total


async def test_the_first_size_after_the_load_takes_the_plans_place(tmp_path: Path) -> None:
    lessons = MemoryLessons(tmp_path)
    share = MemoryShare(SPEC, lessons)
    share.spawned()
    share.loaded()
    footprint = share.measured(3, 230 * MB)
    assert (footprint.baseline, footprint.generation, footprint.limit) == (230 * MB, 3, 500 * MB)
    assert share.promised == 230 * MB + PLAN.compute + PLAN.prompt_cache
    assert share.measured(3, 280 * MB).growth == 50 * MB
    assert lessons.correction(lesson_key(SPEC)) == 230 * MB - PLAN.at_load
    share.spawned()
    assert share.promised == PLAN.total
    await lessons.flush()


def test_what_was_never_planned_is_what_it_takes(tmp_path: Path) -> None:
    share = MemoryShare(replace(SPEC, plan=None), MemoryLessons(tmp_path))
    share.loaded()
    assert share.promised == 0
    share.measured(1, 30 * MB)
    assert share.promised == 30 * MB


async def test_what_it_shares_with_others_just_now_is_its_own(tmp_path: Path) -> None:
    lessons = MemoryLessons(tmp_path)
    share = MemoryShare(SPEC, lessons)
    share.loaded()
    # Half of its weights are counted at another worker that has them mapped as well.
    share.measured(1, 120 * MB)
    assert share.promised == PLAN.weights + PLAN.kv + PLAN.growth
    assert lessons.correction(lesson_key(SPEC)) == -PLAN.overhead
    await lessons.flush()
