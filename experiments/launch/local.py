"""Starts a group of processes on this machine, and starts it again when one of them is lost.

    python -m experiments.launch.local --processes=2 --gpus_each=4 -- \\
        --config=configs/imagenet.py:vvt_tiny --workdir=runs/tiny
    python -m experiments.launch.local --processes=2 --devices=4 -- \\
        --config=configs/digits.py --workdir=runs/digits

What follows `--` goes to `python -m vvt_jax.main`. After a process is lost or fails, the others
end within `--grace` seconds, and the group starts again from its newest checkpoint. A mistake that
only the user can mend (exit status 1) ends it for good, and so do SIGTERM and Ctrl-C, which save.

Exit status: 0 on success; that of the processes otherwise, 128 + N for one that signal N ended.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from vvt_jax.system.errors import CRASH, USER_ERROR

_LOOK = 0.2  # seconds between looks at the processes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--gpus_each", type=int, help="GPUs of a process, dealt out in order")
    parser.add_argument("--devices", type=int, help="simulated CPU devices of a process")
    parser.add_argument("--restarts", type=int, default=10, help="how often to start again at most")
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        help="seconds that the others get to end by themselves after the first has failed",
    )
    parser.add_argument("arguments", nargs="+", help="of python -m vvt_jax.main, after --")
    options = parser.parse_args()
    if options.processes < 1 or options.restarts < 0:
        parser.error("--processes has to be 1 or more, --restarts 0 or more")

    group = Group(options)
    for start in range(options.restarts + 1):
        if start:
            print(f"Restart {start} of {options.restarts}.", flush=True)
        statuses = group.run()
        # Those that came first are the reason, and the others follow
        lost = any(status < 0 or status == CRASH for status in group.first_statuses)
        if USER_ERROR in group.first_statuses and not lost:
            return USER_ERROR
        if not any(statuses) or group.signalled or not lost:
            break
    return max((128 - s if s < 0 else s for s in statuses), default=128 + signal.SIGTERM)


class Group:
    """The processes of one run."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._processes: list[subprocess.Popen] = []
        self.signalled = False
        self.first_statuses: set[int] = set()  # of the processes that failed first
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._forward)

    def run(self) -> Sequence[int]:
        """Starts all and waits for all; their exit statuses, -N for one that signal N ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = []
        for number in range(self._options.processes):
            if self.signalled:
                break
            self._processes.append(self._start(number, port))
        if self.signalled:  # also one that came while the last process started
            self._forward(signal.SIGTERM, None)
        reported: set[int] = set()
        self.first_statuses = failed = set[int]()
        end: float | None = None  # when those that are left are killed
        while True:
            running = [p for p in self._processes if p.poll() is None]
            for i, process in enumerate(self._processes):
                if process.returncode is not None and i not in reported:
                    reported.add(i)
                    print(f"Process {i} ended with {process.returncode}.", flush=True)
                    if process.returncode and end is None:
                        failed.add(process.returncode)
            if failed and end is None:
                self.first_statuses = failed
                if not self.signalled:
                    end = time.monotonic() + self._options.grace
            if not running:
                return [p.returncode for p in self._processes]
            if end is not None and time.monotonic() >= end:
                for process in running:
                    process.kill()
            time.sleep(_LOOK)

    def _start(self, number: int, port: int) -> subprocess.Popen:
        options, environment = self._options, dict(os.environ)
        if options.gpus_each:
            first = number * options.gpus_each
            visible = range(first, first + options.gpus_each)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible))
        if options.devices:
            flags = environment.get("XLA_FLAGS", "")
            count = f"--xla_force_host_platform_device_count={options.devices}"
            environment["XLA_FLAGS"] = f"{flags} {count}"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vvt_jax.main",
                *options.arguments,  # --config first: fields come after their file
                f"--config.distributed.coordinator=127.0.0.1:{port}",
                f"--config.distributed.num_processes={options.processes}",
                f"--config.distributed.process_id={number}",
            ],
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal comes by this program alone, once
        )
        print(f"Process {number} is {process.pid}.", flush=True)
        return process

    def _forward(self, signum: int, frame: object) -> None:
        del frame
        self.signalled = True
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)


if __name__ == "__main__":
    sys.exit(main())
