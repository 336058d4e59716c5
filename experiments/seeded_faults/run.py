"""Puts the seeded faults into the code, one at a time, and records which test catches each.

    python -m experiments.seeded_faults.run --results experiments/seeded_faults/before.json
    python -m experiments.seeded_faults.run --results AFTER.json --first BEFORE.json
    python -m experiments.seeded_faults.run --summary BEFORE.json AFTER.json

The faults go into a temporary clone of the last commit, never into this checkout. Results are
written after each fault, so the same command goes on where it was stopped; all results of one file
are of the commit that it names. The first fault of every module comes first.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.seeded_faults.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
_LIST_TEST = "tests/experiments/test_seeded_faults.py"  # it compares the list with sound code
_LIMIT = 600.0  # seconds for each fault
_NOTHING_RUN = 5  # pytest's exit code where no test was selected
_NOT_FOUND = 4  # and where a test that was named does not exist


@dataclasses.dataclass
class _Phase:
    """What one run of pytest showed."""

    failed: str | None = None  # the first test that failed
    why: str = ""  # the start of its message
    running: str | None = None  # the test that had begun and not ended
    running_seconds: float = 0.0
    exit_code: int | None = None  # None: it was killed at the limit


def result_of(
    fault: Fault, copy: Path, work: Path, limit: float, first: str | None = None
) -> dict[str, Any]:
    """Applies a fault in the copy, runs tests until one fails, and takes the fault out again.

    Args:
        fault: the one to apply.
        copy: a clone of the repository.
        work: a folder for temporary files.
        limit: seconds for all tests together.
        first: a test to try before all others.

    Returns:
        `status`, one of "caught", "not caught", "timed out", "hung" (a single test took more than
        half of the limit), "crashed" (pytest ended without a test that failed) and "stale" (the
        fault does not fit the code); `test`, the one that failed, hung or crashed; `phase`, `why`
        and `seconds`.
    """
    if problem := problem_of(fault, copy):
        return {"status": "stale", "why": problem}
    path = copy / fault.file
    sound = path.read_bytes()
    start = time.monotonic()
    try:
        faulty = sound.decode().replace(fault.old, fault.new)
        path.write_text(faulty, encoding="utf-8")
        _forget_bytecode(path)
        result = _search(fault, copy, work, start + limit, limit, first)
    finally:
        path.write_bytes(sound)
        _forget_bytecode(path)
        _clean(copy)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def problem_of(fault: Fault, root: Path) -> str:
    """Why a fault does not fit the code in a folder, or nothing where it does."""
    try:
        found = (root / fault.file).read_text(encoding="utf-8").count(fault.old)
    except OSError:
        return f"{fault.file} does not exist."
    if found != 1:
        return f"The old text occurs {found} times in {fault.file}, and not once."
    if not (root / fault.test).exists():
        return f"The test file {fault.test} does not exist."
    return ""


def _search(
    fault: Fault, copy: Path, work: Path, end: float, limit: float, first: str | None
) -> dict[str, Any]:
    rest = ["tests", f"--ignore={fault.test}", f"--ignore={_LIST_TEST}"]
    phases = [
        ("own file", [fault.test], "not slow"),
        ("own file, slow tests", [fault.test], "slow"),
        ("all others", rest, "not slow"),
    ]
    if first:
        phases.insert(0, ("first", [first], "slow or not slow"))
    crashed: dict[str, Any] | None = None
    for name, arguments, marks in phases:
        phase = _run_tests(arguments, marks, copy, work, end)
        if phase.failed:
            return {"status": "caught", "test": phase.failed, "phase": name, "why": phase.why}
        if phase.exit_code is None:
            hung = phase.running is not None and phase.running_seconds > limit / 2
            status = "hung" if hung else "timed out"
            return {"status": status, "test": phase.running, "phase": name}
        if name == "first" and phase.exit_code == _NOT_FOUND:
            continue
        if phase.exit_code not in (0, _NOTHING_RUN):
            why = f"pytest ended with exit code {phase.exit_code}."
            crashed = {"status": "crashed", "test": phase.running, "phase": name, "why": why}
    return crashed or {"status": "not caught"}


def _run_tests(arguments: Sequence[str], marks: str, copy: Path, work: Path, end: float) -> _Phase:
    events = work / "events.jsonl"
    events.write_bytes(b"")
    scratch = work / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = [sys.executable, "-m", "pytest", *arguments, "-x", "-q", "-m", marks]
    command += ["-p", "no:cacheprovider", "-p", "watch", f"--basetemp={scratch / 'pytest'}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "0"]  # one process, where -x is exact
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "PYTHONPATH": os.pathsep.join([str(copy), str(work / "plugin")]),
        "SEEDED_FAULTS_WATCH": str(events),
        "TMPDIR": str(scratch),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
    with (work / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _ended(process):
            in_time = _wait(process.pid, end)
    phase = _Phase(exit_code=process.returncode if in_time else None)
    begun = 0.0
    for line in events.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a kill tore the last line
            event = json.loads(line)
            if event["event"] == "begun":
                phase.running, begun = event["test"], event["time"]
            elif event["event"] == "ended":
                phase.running = None
            elif phase.failed is None:
                phase.failed, phase.why = event["test"], event["why"]
    if phase.running:
        phase.running_seconds = time.monotonic() - begun
    return phase


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """Kills a process, its group and all that it started, at the end of the block."""
    try:
        yield
    finally:
        # Before it is waited for: until then its number is not another process's
        children = _descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _wait(pid: int, end: float) -> bool:
    """Whether the process ended in time; it stays to be waited for."""
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _descendants(pid: int) -> list[int]:
    """The processes below one, as Linux lists them, also those with a group of their own."""
    children = collections.defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        waiting += (below := children[waiting.pop()])
        found += below
    return found


def _forget_bytecode(path: Path) -> None:
    """Removes a module's bytecode: Python compares whole seconds and sizes alone."""
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def _clean(copy: Path) -> None:
    """Takes back what tests of faulty code may have left in the copy."""
    _git("-C", str(copy), "checkout", "--quiet", "--force", "HEAD", "--", ".")
    _git("-C", str(copy), "clean", "-qfdx", "-e", "__pycache__")


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"error: git {' '.join(arguments)} failed: {run.stderr.strip()}")
    return run.stdout.strip()


def _make_copy(work: Path, commit: str) -> Path:
    copy = work / "copy"
    _git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(copy))
    _git("-C", str(copy), "checkout", "--quiet", "--detach", commit)
    (work / "plugin").mkdir()
    shutil.copy(Path(__file__).with_name("watch.py"), work / "plugin")
    # An installed package must not come before the copy, which nobody would notice
    found = subprocess.run(
        [sys.executable, "-c", "import vvt_jax; print(vvt_jax.__file__)"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if not Path(found).is_relative_to(copy):
        sys.exit(f"error: tests would import vvt_jax from {found or 'nowhere'}, not from {copy}.")
    return copy


def _by_module(faults: Sequence[Fault]) -> list[Fault]:
    """The first fault of each module, then the second of each, and so on."""
    seen: collections.Counter[str] = collections.Counter()
    ranked = []
    for fault in faults:
        ranked.append((seen[fault.file], fault))
        seen[fault.file] += 1
    return [fault for _, fault in sorted(ranked, key=lambda pair: pair[0])]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path} can't be read: {error}.")


def _write(path: Path, results: Mapping[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def outcome(fault: Fault, result: Mapping[str, Any] | None) -> str:
    """A result in a few words: who caught the fault, or what else came of it."""
    if result is None:
        return "not run"
    if result["status"] != "caught":
        return result["status"]
    own = result["test"].partition("::")[0] == fault.test
    return "caught by its own file" if own else "caught by another file"


def counts(results: Mapping[str, Any]) -> dict[str, int]:
    """How many faults had each outcome."""
    found = results["faults"]
    return dict(collections.Counter(outcome(fault, found.get(fault.id)) for fault in FAULTS))


def table(results: Mapping[str, Any]) -> str:
    """The results as text, a line for each fault, and the number of each outcome."""
    lines = []
    for fault in FAULTS:
        if (result := results["faults"].get(fault.id)) is not None:
            seconds = f"{result['seconds']:6.0f} s" if "seconds" in result else " " * 8
            told = (seconds, f"{outcome(fault, result):22}", f"{fault.id:33}")
            lines.append("  ".join([*told, result.get("test") or result.get("why", "")]).rstrip())
    return "\n".join([*lines, "", *(f"{n:4}  {name}" for name, n in counts(results).items())])


def summary(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Two results side by side, in Markdown."""
    totals = counts(before), counts(after)
    lines = ["| outcome | before | after |", "| --- | --- | --- |"]
    for name in dict.fromkeys([*totals[0], *totals[1]]):
        lines.append(f"| {name} | {totals[0].get(name, 0)} | {totals[1].get(name, 0)} |")
    lines += ["", "| fault | module | kind | before | after |", "| --- | --- | --- | --- | --- |"]
    for fault in FAULTS:
        found = [results["faults"].get(fault.id) for results in (before, after)]
        cells = []
        for result in found:
            test = (result or {}).get("test")
            name = test.removeprefix("tests/").replace("|", "\\|") if test else ""
            cells.append(outcome(fault, result) + (f": `{name}`" if name else ""))
        lines.append(f"| {fault.id} | `{fault.file}` | {fault.kind} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.seeded_faults.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="where results are kept")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults; default: all")
    parser.add_argument(
        "--limit", type=float, default=_LIMIT, help="seconds for each fault; default: %(default)g"
    )
    parser.add_argument(
        "--first", type=Path, metavar="FILE", help="earlier results, whose tests are tried first"
    )
    parser.add_argument(
        "--summary", nargs=2, type=Path, metavar="FILE", help="print two results side by side"
    )
    options = parser.parse_args(arguments)
    if not (options.results or options.summary):
        parser.error("give --results, or --summary")
    if unknown := set(options.only or ()) - {fault.id for fault in FAULTS}:
        parser.error(f"there is no fault {sorted(unknown)[0]!r}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    options = _parse(arguments)
    if options.summary:
        print(summary(*map(_read, options.summary)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    earlier = _read(options.first)["faults"] if options.first else {}
    results: dict[str, Any] = {"commit": _git("-C", str(ROOT), "rev-parse", "HEAD"), "faults": {}}
    if options.results.exists():
        results = _read(options.results)
    done = results["faults"]
    faults = [f for f in FAULTS if options.only is None or f.id in options.only]
    waiting = [fault for fault in _by_module(faults) if fault.id not in done]
    with tempfile.TemporaryDirectory(prefix="seeded_faults_", ignore_cleanup_errors=True) as name:
        work = Path(name)
        copy = _make_copy(work, results["commit"]) if waiting else work
        for number, fault in enumerate(waiting, 1):
            known = earlier.get(fault.id, {})
            first = known.get("test") if known.get("status") == "caught" else None
            result = result_of(fault, copy, work, options.limit, first)
            done[fault.id] = {**result, "limit": options.limit}
            _write(options.results, results)
            told = result.get("test") or result.get("why", "")
            place = f"{number} of {len(waiting)}, {result.get('seconds', 0):.0f} s"
            print(f"{fault.id}: {outcome(fault, result)} ({place}) {told}", flush=True)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
