"""The lock on a workdir, between objects and between processes."""

import subprocess
import sys
import textwrap

import pytest

from vvt_jax.system.lock import WorkdirInUseError, WorkdirLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")


def test_one_at_a_time(tmp_path):
    workdir = tmp_path / "new" / "run"
    with WorkdirLock(workdir):
        with pytest.raises(WorkdirInUseError, match=f"Another run is going on in {workdir}: "):
            WorkdirLock(workdir).__enter__()
        with WorkdirLock(tmp_path / "other"):
            pass
    with WorkdirLock(workdir):
        pass


def test_dies_with_its_process(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from vvt_jax.system.lock import WorkdirLock
        with WorkdirLock(Path(sys.argv[1])):
            print("locked", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(WorkdirInUseError):
        WorkdirLock(tmp_path).__enter__()
    process.kill()
    process.communicate()
    with WorkdirLock(tmp_path):
        pass
