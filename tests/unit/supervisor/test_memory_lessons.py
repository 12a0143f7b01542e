"""What was learned of a model's memory outlives the server."""

from pathlib import Path

from supervisor.memory_lessons import MAX_LESSONS, LessonKey, MemoryLessons

KEY = LessonKey("m", "digest", "llama")
MB = 1024 * 1024


async def test_a_lesson_is_there_after_a_restart(tmp_path: Path) -> None:
    lessons = MemoryLessons(tmp_path)
    assert lessons.correction(KEY) == 0
    lessons.learn(KEY, 50 * MB)
    lessons.learn(KEY, -70 * MB)
    await lessons.flush()
    again = MemoryLessons(tmp_path)
    assert again.correction(KEY) == -70 * MB
    assert again.correction(LessonKey("m", "another", "llama")) == 0


async def test_noise_is_not_learned(tmp_path: Path) -> None:
    lessons = MemoryLessons(tmp_path)
    lessons.learn(KEY, MB // 2)
    assert lessons.correction(KEY) == 0


async def test_only_so_many_are_kept(tmp_path: Path) -> None:
    lessons = MemoryLessons(tmp_path)
    for number in range(MAX_LESSONS + 1):
        lessons.learn(LessonKey(f"m{number}", "", "llama"), 2 * MB)
    assert lessons.correction(LessonKey("m0", "", "llama")) == 0
    assert lessons.correction(LessonKey(f"m{MAX_LESSONS}", "", "llama")) == 2 * MB
    await lessons.flush()


async def test_a_damaged_file_costs_what_was_learned_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text("{")
    lessons = MemoryLessons(tmp_path)
    lessons.learn(KEY, 5 * MB)
    await lessons.flush()
    assert MemoryLessons(tmp_path).correction(KEY) == 5 * MB
