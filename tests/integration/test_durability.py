"""State files under kills and full disks, by real processes."""

import errno
import json
import subprocess
import sys
from pathlib import Path

KILLED_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import msgspec
from supervisor import jsonfile

class Notes(msgspec.Struct):
    schema_version: int = 1
    notes: list[str] = []

path, random_ = Path(sys.argv[1]), random.Random(7)
contents = [Notes(notes=[str(n)] * 20_000) for n in range(3)]
left_over = 0
for _ in range(100):
    child = os.fork()
    if child == 0:
        while True:
            for content in contents:
                jsonfile.write(path, content)
    time.sleep(random_.uniform(0.002, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left_over += len(list(path.parent.glob(".*")))
    notes, writer = jsonfile.open_state(path, Notes, schema_version=1)
    # Until the first write is through there is no file.
    assert notes is None or notes in contents, "not whole"
    assert not list(path.parent.glob(".*")), "not swept"
    assert not list(path.parent.glob("*unreadable*")), "set aside"
assert notes in contents
print(left_over)
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    killed = run_python(KILLED_WRITERS, str(tmp_path / "notes.json"))
    # Or no kill came in the middle of a write.
    assert int(killed.stdout) > 10


FULL_DISK = """
import resource, sys
from pathlib import Path
from supervisor import jsonfile

path = Path(sys.argv[1])
jsonfile.write(path, {"schema_version": 1, "notes": ["old"]})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    jsonfile.write(path, {"schema_version": 1, "notes": ["new"] * 10_000})
except OSError as error:
    print(error.errno)
"""


def test_a_file_that_may_not_grow_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    assert int(run_python(FULL_DISK, str(path)).stdout) == errno.EFBIG
    assert json.loads(path.read_text())["notes"] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
