"""What is in a model folder as the Hugging Face hub has them, and what is missing of it.

Reads headers and small JSON files only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from weights.safetensors import Damaged, SafetensorsHeader, read_header

#: Such files are a few kB, an index some MB; what is larger is none.
MAX_JSON_BYTES = 64 * 1024 * 1024

INDEX = "model.safetensors.index.json"
#: Any of these makes a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
_MAX_SHARDS = 1000


@dataclass
class Folder:
    """``problems`` are all that is missing, short or damaged, as far as was looked."""

    path: Path
    problems: list[str] = field(default_factory=list)

    def read_json(self, name: str) -> dict[str, Any]:
        """An empty object, and a problem, where there is no such file or it is none."""
        try:
            if not self.has(name):  # opening a pipe would wait for ever
                raise FileNotFoundError(name)
            with (self.path / name).open("rb") as file:
                content = file.read(MAX_JSON_BYTES)
            return msgspec.json.decode(content, type=dict[str, Any])
        except FileNotFoundError:
            self.problems.append(f"{name} is missing")
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
        return {}

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read_weights(self) -> list[SafetensorsHeader]:
        """The headers of all shards. What is in which is not compared with the index: that
        may be older, as it is where none of what it names is there, but other weights are."""
        present = sorted(each.name for each in self.path.glob("*.safetensors"))
        known = len(self.problems)
        names = self._shards() if self.has(INDEX) else present
        if names and present and not any(map(self.has, names)):
            names = present
        if not names and len(self.problems) == known:
            self.problems.append("no weights are there (*.safetensors)")
        headers = []
        for name in names:
            if not self.has(name):
                self.problems.append(f"{name} is missing")
                continue
            try:
                headers.append(read_header(self.path / name))
            except (Damaged, OSError) as error:
                self.problems.append(f"{name}: {error}")
        return headers

    def check_tokenizer(self) -> None:
        """Only whether one is there."""
        if not any(map(self.has, TOKENIZERS)) and not any(self.path.glob("*.tiktoken")):
            self.problems.append(f"no tokenizer is there (one of {', '.join(TOKENIZERS)})")

    def _shards(self) -> list[str]:
        """The files that the index says are there."""
        known = len(self.problems)
        weight_map = self.read_json(INDEX).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map):
            if len(self.problems) == known:
                self.problems.append(f"{INDEX} has no weight_map")
            return []
        for name in weight_map.values():
            if not isinstance(name, str) or not name or PurePosixPath(name).name != name:
                self.problems.append(f"{INDEX} names a file {name!r}"[:200])
                return []
        names = list(dict.fromkeys(weight_map.values()))
        if len(names) > _MAX_SHARDS:
            self.problems.append(f"{INDEX} names {len(names)} files")
            return []
        return names
