"""Processes that need not import again what takes long to import.

A server imports the package once; each process is a fork of it, which then runs a module as
`python -m` would, or code as `python -c` would. It is a process like any other, with its own pid,
environment, signals, output and exit status. What a module does while it is first imported is not
shown this way: tests of that start Python itself.
"""

import atexit
import concurrent.futures
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
_MESSAGE = 2**17  # bytes, at most


def start(
    arguments: Sequence[object],
    environment: Mapping[str, str] | None = None,
    *,
    warnings_are_errors: bool = False,
    anew: bool = False,
) -> "Process | subprocess.Popen[str]":
    """Starts `python ARGUMENTS...` in the repository's folder, `-m MODULE` or `-c CODE` first.

    Args:
        arguments: of Python.
        environment: of the process, by default this one's.
        warnings_are_errors: as `python -W error`; not for what the server has imported.
        anew: by Python itself, so that importing is part of the test and hashes have their own
            seed.
    """
    texts = [str(argument) for argument in arguments]
    if anew:
        options = ["-W", "error"] if warnings_are_errors else []
        return subprocess.Popen(
            [sys.executable, *options, *texts],
            cwd=ROOT,
            env=dict(environment or os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    return Process(texts, dict(environment or os.environ), warnings_are_errors)


def run(arguments: Sequence[object], environment: Mapping[str, str] | None = None, **options):
    """`start`, and waits for the end: what subprocess.run returns with captured text."""
    process = start(arguments, environment, **options)
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Process:
    """A forked process, with what subprocess.Popen offers of one whose output is captured."""

    def __init__(self, args: list[str], environment: dict[str, str], warnings_are_errors: bool):
        self.args, self.returncode = args, None
        self._out, out = _read_in_background()
        self._err, err = _read_in_background()
        # jax reads its own variables while it is imported.
        known = {k: v for k, v in environment.items() if k.startswith("JAX_")}
        server = _server(tuple(sorted(known.items())))
        self._status, theirs = os.pipe()
        message = json.dumps([args, environment, warnings_are_errors]).encode()
        assert len(message) < _MESSAGE
        socket.send_fds(server, [message], [out, err, theirs])
        for descriptor in (out, err, theirs):
            os.close(descriptor)
        self._told = b""
        while b"\n" not in self._told:
            assert select.select([self._status], [], [], 120)[0], "the server of forks is stuck"
            self._told += self._read()
        self.pid = int(self._told.split(b"\n")[0])

    def _read(self) -> bytes:
        content = os.read(self._status, 100)
        assert content, "the server of forks has ended"
        return content

    def poll(self) -> int | None:
        while self.returncode is None:
            if self._told.count(b"\n") == 2:  # a short process has ended before it was looked at
                self.returncode = int(self._told.split(b"\n")[1])
                os.close(self._status)
            elif select.select([self._status], [], [], 0)[0]:
                self._told += self._read()
            else:
                break
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            select.select([self._status], [], [], left)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._out.result(timeout), self._err.result(timeout)

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _read_in_background() -> tuple[concurrent.futures.Future[str], int]:
    """The text that will have been written into a pipe, and the end to write into."""
    ours, theirs = os.pipe()
    text: concurrent.futures.Future[str] = concurrent.futures.Future()

    def read() -> None:
        with open(ours, errors="replace") as file:
            text.set_result(file.read())

    threading.Thread(target=read, daemon=True).start()
    return text, theirs


@functools.cache
def _server(variables: tuple[tuple[str, str], ...]) -> socket.socket:
    """Starts the one with these variables of jax's; its end of the connection is ours to use."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=ROOT,
            env={**environment, **dict(variables)},
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,  # as that of the forks: Python asks what it is when it starts
        )

    def end() -> None:  # a closed connection ends it
        ours.close()
        process.wait(timeout=60)

    atexit.register(end)
    return ours


def _serve(connection: socket.socket) -> None:
    # What the commands import, but none of the modules that are run as commands.
    import absl.app
    import matplotlib.figure
    import ml_collections.config_flags
    import sklearn.datasets
    import tensorboardX

    import vvt_jax.inference.predictor
    import vvt_jax.train

    del absl, matplotlib, ml_collections, sklearn, tensorboardX, vvt_jax
    gc.collect()
    gc.freeze()  # no fork looks through what was imported when it ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for children
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE, 3)
        if not message:
            return
        if not os.fork():
            connection.close()
            _fork(*json.loads(message), *descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)


def _fork(args, environment, warnings_are_errors, out, err, status) -> None:
    """Starts a process, and in it returns from its work; tells of it from one between."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():
        for descriptor in (out, err):
            os.close(descriptor)
        os.write(status, b"%d\n" % child)
        _, ended = os.waitpid(child, 0)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
        os._exit(0)
    os.close(status)
    for ours, standard in ((out, 1), (err, 2)):
        os.dup2(ours, standard)
        os.close(ours)
    os.environ.clear()
    os.environ.update(environment)
    if warnings_are_errors:
        warnings.simplefilter("error")
    kind, what, *rest = args
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
