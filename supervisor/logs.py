"""Logging: one line per event, to stderr."""

from __future__ import annotations

import logging
import sys

#: Loggers of libraries that say too much at the level an operator wants from us.
_QUIET = ("uvicorn", "uvicorn.error", "httpx", "httpcore", "asyncio")


class OneLine(logging.Formatter):
    """A traceback, or a message with line ends, becomes one line that greps as a whole."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def set_up(level: str) -> None:
    """Send everything to stderr at ``level``; libraries only from warnings up, unless debugging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    set_level(level)


def set_level(level: str) -> None:
    root = logging.getLogger()
    root.setLevel(level.upper())
    for name in _QUIET:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET if level == "debug" else max(root.level, logging.WARNING))
        logger.propagate = True
