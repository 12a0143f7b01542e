"""What each model took more, or less, than planned when it was loaded; also after a restart."""

from __future__ import annotations

from pathlib import Path

import msgspec

from supervisor import jsonfile

FILE_NAME = "memory.json"
SCHEMA_VERSION = 1
#: Models that are remembered; those learned first go first.
MAX_LESSONS = 1000
#: What changes by less is not worth writing, nor planning with.
_NOISE_BYTES = 1024 * 1024


class LessonKey(msgspec.Struct, frozen=True):
    """Other files, or another backend, teach anew."""

    model: str
    digest: str
    backend: str


class _Lesson(msgspec.Struct, frozen=True):
    key: LessonKey
    correction: int


class _File(msgspec.Struct, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    lessons: list[_Lesson] = []


class MemoryLessons:
    """Corrections in bytes. Call it on the event loop, under the home lock."""

    def __init__(self, home: Path) -> None:
        path = home / FILE_NAME
        found, self._writer = jsonfile.open_state(path, _File, schema_version=SCHEMA_VERSION)
        lessons = found.lessons if found is not None else []
        self._corrections = {lesson.key: lesson.correction for lesson in lessons}

    def correction(self, key: LessonKey) -> int:
        return self._corrections.get(key, 0)

    def learn(self, key: LessonKey, correction: int) -> None:
        """Remember the newest; it reaches the disk in the background."""
        if abs(correction - self.correction(key)) < _NOISE_BYTES:
            return
        self._corrections.pop(key, None)
        self._corrections[key] = correction
        while len(self._corrections) > MAX_LESSONS:
            del self._corrections[next(iter(self._corrections))]
        lessons = [_Lesson(each, value) for each, value in self._corrections.items()]
        self._writer.save(_File(lessons=lessons))

    async def flush(self) -> None:
        """Wait for all that was learned to be on disk."""
        await self._writer.flush()
