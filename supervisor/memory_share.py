"""One model's share of the memory: what it was promised, and what it was found to take."""

from __future__ import annotations

from supervisor.gate import ModelSpec
from supervisor.memory import Footprint
from supervisor.memory_lessons import LessonKey, MemoryLessons


class MemoryShare:
    """Sizes are bytes. Its owner tells of each worker, and how much that holds."""

    def __init__(self, spec: ModelSpec, lessons: MemoryLessons) -> None:
        self._spec = spec
        self._lessons = lessons
        self._loaded = False
        self._baseline: int | None = None

    @property
    def promised(self) -> int:
        """What it may take: as planned, or as measured and what may still come."""
        plan = self._spec.plan
        if plan is None:
            return self._baseline or 0
        if self._baseline is None:
            return plan.total
        return max(self._baseline, plan.certain) + plan.growth

    def spawned(self) -> None:
        """A new worker is there; it has loaded nothing yet."""
        self._loaded = False
        self._baseline = None

    def loaded(self) -> None:
        """What is measured next is what the model takes before it is used."""
        self._loaded = True

    def measured(self, generation: int, size: int) -> Footprint:
        """Note what the worker holds."""
        spec = self._spec
        if self._baseline is None and self._loaded:
            self._baseline = size
            if spec.plan is not None:
                # What it shares with others just now it may have to take alone tomorrow.
                correction = max(size, spec.plan.certain) - spec.plan.at_load
                self._lessons.learn(lesson_key(spec), correction)
        return Footprint(
            model_id=spec.model_id,
            generation=generation,
            size=size,
            # While it loads, its weights are what it may well hold.
            baseline=self._baseline or spec.files.size_bytes,
            limit=spec.memory_limit_bytes,
        )


def lesson_key(spec: ModelSpec) -> LessonKey:
    """What is learned of a model is learned under this."""
    return LessonKey(spec.model_id, spec.files.digest, spec.backend)
