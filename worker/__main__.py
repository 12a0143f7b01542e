"""A worker process: guard, handshake, load, serve.

Exit status 0 after ``Shutdown``; ``protocol.handshake.EXIT_FAULT`` after a failure
that a message told about; anything else is a crash.
"""

from __future__ import annotations

import os
import sys

from protocol.handshake import BOOT_ENV, decode_boot
from worker import guard


def main() -> int:
    boot = decode_boot(os.environ.pop(BOOT_ENV))
    guard.arm(boot.parent_pid, boot.death_fd)
    # Only a guarded process may import anything heavy.
    from worker.session import run

    return run(boot)


if __name__ == "__main__":
    sys.exit(main())
