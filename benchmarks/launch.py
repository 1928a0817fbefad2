"""Start one command and say what it cost: run as `python -I -S launch.py LOG COMMAND...` by sample.py.

A process of its own, without imports, because the kernel carries the launcher's own peak memory over into the child's
maximum: the benchmark with numpy and matplotlib loaded would hide every figure below its own.

Prints the child's process id when it runs, and when it has ended: seconds of wall, user and system time, its maximum
resident KiB, the launcher's own (below which the child's is unknown), and its exit code (negative for a signal).
"""

import os
import sys
import time


def main() -> None:
    log, *command = sys.argv[1:]
    redirect = [
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    start = time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=redirect)
    print(pid, flush=True)
    _, status, usage = os.wait4(pid, 0)
    wall_seconds = time.monotonic() - start
    with open("/proc/self/status") as file:  # noqa: PTH123 (no pathlib in here); getrusage would tell the parent's peak
        own_kib = next(line.split()[1] for line in file if line.startswith("VmHWM"))
    exit_code = os.waitstatus_to_exitcode(status)
    print(wall_seconds, usage.ru_utime, usage.ru_stime, usage.ru_maxrss, own_kib, exit_code, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # whoever measures hears it too, and says so
        sys.exit(130)
