"""Becomes another program that dies with its parent. Run as a script by `processes.spawn`, never imported.

    python launch.py PARENT_PID SIGNAL PROGRAM [ARGUMENT…]

The kernel is asked to send SIGNAL when the parent ends, however it ends (PR_SET_PDEATHSIG, Linux); the wish
survives the exec that follows. A script of its own rather than `preexec_fn`, which is unsafe where the parent has
threads (Ray, grpc). Only the standard library, and little of it: this is 20 ms on the way of every child.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1
_CANNOT_EXECUTE = 127


def main() -> None:
    parent_pid, signal_number, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    if os.getppid() != int(parent_pid):
        sys.exit(f"The parent process {parent_pid} ended before {program[0]} began.")
    try:
        os.execvp(program[0], program)
    except OSError as error:
        print(f"{program[0]} cannot be executed: {error.strerror}", file=sys.stderr)
        sys.exit(_CANNOT_EXECUTE)


if __name__ == "__main__":
    main()
