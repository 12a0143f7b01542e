"""Builds llama-cpp-python's wheel for this machine, once, and keeps it.

The project publishes its source only. The wheel is built from the pinned and
hashed source in requirements/lock.txt with the pinned tools of
requirements/build.txt, without the parts that are not used here, and kept in
the cache folder under everything that shapes it. `python scripts/llama_wheel.py`
prints the wheel's path.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from steps import REQUIREMENTS, ROOT, StepError, cache_dir, exclusive, requirement, run, say

DISTRIBUTION = "llama-cpp-python"

_LOCK = REQUIREMENTS / "lock.txt"
_BUILD_LOCK = REQUIREMENTS / "build.txt"
_CMAKE_INCLUDE = ROOT / "scripts" / "llama-build.cmake"

# Instruction sets that llama.cpp's CPU kernels gain from, by the flag the Linux
# kernel lists. AVX512 is left out: it gained nothing, and not every host has it.
_X86_FEATURES = {
    "sse4_2": "GGML_SSE42",
    "avx": "GGML_AVX",
    "avx2": "GGML_AVX2",
    "bmi2": "GGML_BMI2",
    "fma": "GGML_FMA",
    "f16c": "GGML_F16C",
}


def definitions(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The CMake definitions for this machine.

    On x86-64 Linux the instruction sets are named one by one, so that the wheel
    does not depend on what the compiler makes of "native". Elsewhere llama.cpp's
    defaults stand (Metal on macOS).
    """
    chosen = {"LLAVA_BUILD": "OFF"}
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        present = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        flags = set(present[1].split()) if present else set()
        chosen["GGML_NATIVE"] = "OFF"
        for flag, option in _X86_FEATURES.items():
            chosen[option] = "ON" if flag in flags else "OFF"
    return chosen


def home() -> Path:
    """The folder of the wheel for this machine, whether or not it is built.

    The wheel runs on every Python 3, so the Python's version is no part of it.
    """
    pinned = requirement(DISTRIBUTION, _LOCK)
    version = re.search(r"==(\S+)", pinned)
    if version is None:
        raise StepError(f"{DISTRIBUTION} is not pinned in {_LOCK}")
    shape = [
        pinned,
        _BUILD_LOCK.read_text(),
        _CMAKE_INCLUDE.read_text(),
        *(f"{name}={value}" for name, value in sorted(definitions().items())),
        os.environ.get("CMAKE_ARGS", ""),
    ]
    digest = hashlib.sha256("\n".join(shape).encode()).hexdigest()[:12]
    machine = f"{platform.system()}-{platform.machine()}".lower()
    return cache_dir() / "wheels" / f"{DISTRIBUTION}-{version[1]}-{machine}-{digest}"


def wheel() -> Path:
    """The wheel's path; builds it, in minutes, when the cache has none.

    Raises StepError when there is no compiler or the build fails.
    """
    folder = home()
    if built := _find(folder):
        return built
    with exclusive(
        folder.parent / ".lock", f"Another set-up is building {DISTRIBUTION}; waiting for it ..."
    ):
        if built := _find(folder):
            return built
        # Nobody else is building now: what an interrupted build left can go.
        for left in folder.parent.glob(".build-*"):
            shutil.rmtree(left, ignore_errors=True)
        _build(folder)
    built = _find(folder)
    if built is None:
        raise StepError(f"the build of {DISTRIBUTION} left no wheel in {folder}")
    return built


def _find(folder: Path) -> Path | None:
    return next(folder.glob("*.whl"), None)


def _build(folder: Path) -> None:
    """Build in a scratch folder beside `folder`, and move the result there whole."""
    _check_compiler()
    say(f"Building {folder.name} (once; this takes some minutes) ...")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as name:
        scratch = Path(name)
        tools = scratch / "tools"
        temporary = scratch / "tmp"
        temporary.mkdir()
        wanted = scratch / "wanted.txt"
        wanted.write_text(requirement(DISTRIBUTION, _LOCK))
        logs = cache_dir() / "logs"

        run("build tools", [sys.executable, "-m", "venv", tools], log=logs / "build-venv.log")
        pip = tools / "bin" / "pip"
        run(
            "build tools",
            [pip, "install", "--require-hashes", "-r", _BUILD_LOCK],
            log=logs / "build-tools.log",
        )
        # Fetched first, as pip does not pass settings on to what a file names.
        run(
            "source",
            [
                *(pip, "download", "--no-deps", "--require-hashes", "--no-build-isolation"),
                *("--no-binary", DISTRIBUTION, "--dest", scratch, "-r", wanted),
            ],
            log=logs / "build-source.log",
        )
        settings = {
            "build.targets": "llama",
            "cmake.define.CMAKE_PROJECT_llama_cpp_INCLUDE": str(_CMAKE_INCLUDE),
            **{f"cmake.define.{name}": value for name, value in definitions().items()},
        }
        run(
            "llama.cpp",
            [
                *(pip, "wheel", "--verbose", "--no-deps", "--no-index", "--no-build-isolation"),
                # pip's own cache may hold a wheel that was built with other flags.
                *("--no-cache-dir", "--wheel-dir", scratch / "wheel"),
                *(f"--config-settings={name}={value}" for name, value in settings.items()),
                next(scratch.glob("*.tar.gz")),
            ],
            log=logs / f"{folder.name}.log",
            env={
                "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "TMPDIR": str(temporary),
                "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get(
                    "CMAKE_BUILD_PARALLEL_LEVEL", str(_cores())
                ),
            },
            detail=_progress,
        )
        shutil.rmtree(folder, ignore_errors=True)
        (scratch / "wheel").rename(folder)


def _check_compiler() -> None:
    advice = (
        "xcode-select --install"
        if platform.system() == "Darwin"
        else "apt-get install build-essential, dnf install gcc gcc-c++, or the like"
    )
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        # Either variable may carry arguments: CC="ccache gcc".
        candidates = os.environ[variable].split()[:1] if variable in os.environ else names
        found = next(filter(None, map(shutil.which, candidates)), None)
        # On a Mac without the command-line tools the compiler is a stub that fails.
        if found is None or subprocess.run([found, "--version"], capture_output=True).returncode:
            raise StepError(
                f"{DISTRIBUTION} is built from source and needs a C and C++ compiler; "
                f"no working one of {', '.join(candidates)} found ({advice})"
            )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _progress(line: str) -> str | None:
    if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):
        return f"{step[1]} of {step[2]} files built"
    return None


if __name__ == "__main__":
    try:
        print(wheel())
    except StepError as error:
        sys.exit(f"setup: {error}")
