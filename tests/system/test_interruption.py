"""Signals during a run: the first is noted, a second acts, and none tears a print apart."""

import array
import fcntl
import os
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time

import pytest

from vvt_jax.system.interruption import Interrupted, Interruption


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_second_has_its_usual_effect(signum, capfd):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with Interruption() as interruption:
        assert interruption.signum is None
        assert all(signal.getsignal(s) is not before[s] for s in before)
        os.kill(os.getpid(), signum)
        assert interruption.signum == signum
        assert {s: signal.getsignal(s) for s in before} == before
    assert {s: signal.getsignal(s) for s in before} == before
    assert f"{signum.name}: saving after this step." in capfd.readouterr().err


def test_without_a_signal_everything_is_as_before():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(KeyError), Interruption():
        raise KeyError
    assert {s: signal.getsignal(s) for s in before} == before


def test_other_threads_take_no_signals():
    noted = []

    def work():
        with Interruption() as interruption:
            noted.append(interruption.signum)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [None]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outcome(signum, status):
    outcome = Interrupted(signum, 7)
    assert outcome.exit_status == status
    assert str(outcome).startswith(f"{signum.name}: saved at step 7;")


def _start(code):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_signal_ends_the_program():
    program = _start("""
        import time
        from vvt_jax.system.interruption import Interruption
        with Interruption():
            print("ready", flush=True)
            time.sleep(60)
            print("slept on", flush=True)
            time.sleep(60)
    """)
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGTERM)
    lines = iter(program.stderr.readline, "")
    assert "SIGTERM: saving after this step.\n" in lines
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=300)
    assert (program.returncode, out, err) == (-signal.SIGTERM, "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="asks for the size of a pipe")
def test_a_signal_in_the_middle_of_a_print():
    """Python refuses a print from a handler that interrupted one, and the run would be lost."""
    program = _start("""
        import sys
        from vvt_jax.system.interruption import Interruption
        with Interruption() as interruption:
            print("ready", file=sys.stderr, flush=True)
            print("." * 1_000_000, flush=True)  # fills the pipe and waits for the reader
        print(interruption.signum)
    """)
    assert program.stderr.readline() == "ready\n"
    waiting = array.array("i", [0])
    while waiting[0] < fcntl.fcntl(program.stdout, fcntl.F_GETPIPE_SZ):
        assert program.poll() is None
        fcntl.ioctl(program.stdout, termios.FIONREAD, waiting)
    time.sleep(0.1)  # the pipe is full: now the program waits in its write
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=300)
    assert (program.returncode, err) == (0, "\nSIGTERM: saving after this step.\n")
    assert out == "." * 1_000_000 + "\n15\n"
