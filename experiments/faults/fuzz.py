"""Malformed files, by the thousand: each must end in a valid result or in one sentence.

    python -m experiments.faults.fuzz --cases 5000 --seed 0

A case is a number: with the seed it decides the kind of file, the damage, and so everything. A
worker process imports all that it needs, makes sound files, and then damages a copy for each case
and calls the reader that the commands call. A case passes where the reader gives its result, or
raises an error of one sentence, within 2 seconds of processor time and 512 MB of memory beyond what
it had. A crash, a hang or a traceback is a failure of that case alone: the supervisor starts
another worker.

Outcomes go to --record, a line each, so that the same command goes on where it stopped; at the end
the counts and the failures go to --out.
"""

import argparse
import collections
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_SECONDS = 2.0  # of processor time
MOST_MEMORY = 512  # MB
HANG_SECONDS = 30.0  # of the clock, which other work on the machine slows
PASSED = ("result", "sentence")
KINDS = (
    "pth bytes",
    "pth opcodes",
    "model folder",
    "image",
    "mask",
    "records",
    "descriptions",
    "config",
)


def kind_of(number: int) -> str:
    """The kind of file that a case damages."""
    return KINDS[number % len(KINDS)]


class Supervisor:
    """Gives cases to a worker process, and starts another one when it crashes or hangs.

    Args:
        command: the worker's. It reads the number of a case a line and answers with a line of JSON,
            the first of which says that it is ready.
        hang_seconds: that a case may take.
    """

    def __init__(self, command: Sequence[str], hang_seconds: float = HANG_SECONDS):
        self._command, self._hang_seconds = command, hang_seconds
        self._worker: subprocess.Popen | None = None

    def run(self, number: int) -> dict[str, Any]:
        """The outcome of a case."""
        if self._worker is None:
            self._worker = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            if self._read(300) is None:
                raise SystemExit("error: The worker does not start.")
        worker = self._worker
        worker.stdin.write(f"{number}\n".encode())  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
        line = self._read(self._hang_seconds)
        if line is not None:
            return json.loads(line)
        hung = worker.poll() is None
        self.close()
        if hung:
            return {"outcome": "hang", "text": f"no answer in {self._hang_seconds} s"}
        return {"outcome": "crash", "text": f"exit status {worker.returncode}"}

    def _read(self, seconds: float) -> bytes | None:
        """A line of the worker's; None where it ends or is silent."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._worker.stdout, selectors.EVENT_READ)  # type: ignore
            if not selector.select(seconds):
                return None
        line = self._worker.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self._worker.wait()  # type: ignore[union-attr]
        return line or None

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker.stdin.close()  # type: ignore[union-attr]
            self._worker.stdout.close()  # type: ignore[union-attr]
            self._worker = None


def supervise(supervisor: Supervisor, numbers: Iterable[int], record: Path) -> list[dict[str, Any]]:
    """The outcomes of cases, of which those in the record are not run again."""
    outcomes: dict[int, dict[str, Any]] = {}
    if record.exists():
        for line in record.read_text().splitlines():
            try:
                outcome = json.loads(line)
                outcomes[outcome["case"]] = outcome
            except (ValueError, KeyError, TypeError):  # a kill tore the last line
                continue
    wanted = list(numbers)
    with record.open("a") as file:
        file.write("\n")  # behind a line that was torn
        for number in wanted:
            if number not in outcomes:
                outcomes[number] = {
                    "case": number,
                    "kind": kind_of(number),
                    **supervisor.run(number),
                }
                file.write(json.dumps(outcomes[number]) + "\n")
                file.flush()
    return [outcomes[number] for number in wanted]


def summarise(outcomes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by kind of file, the slowest case, the largest one, and every failure."""
    outcomes = list(outcomes)
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in KINDS}
    for outcome in outcomes:
        counts[outcome["kind"]][outcome["outcome"]] += 1
    return {
        "cases": len(outcomes),
        "passed": sum(outcome["outcome"] in PASSED for outcome in outcomes),
        "counts": {kind: dict(sorted(count.items())) for kind, count in counts.items()},
        "slowest, seconds": max((o.get("seconds", 0) for o in outcomes), default=0),
        "most memory, MB": max((o.get("megabytes", 0) for o in outcomes), default=0),
        "failures": [o for o in outcomes if o["outcome"] not in PASSED],
    }


def judge(read: Callable[[], Any]) -> dict[str, Any]:
    """Calls a reader, measures it and says how it ended."""
    from vvt_jax.system.errors import UserError

    _reset_peak()
    before = _memory("VmRSS")
    begun = time.process_time()
    try:
        read()
        outcome, text = "result", ""
    except UserError as error:
        text = str(error)
        sound = text.endswith((".", "?")) and text.isprintable()
        outcome = "sentence" if sound else "no sentence"
    except MemoryError as error:
        outcome, text = "memory", str(error)
    except BaseException as error:
        outcome, text = "traceback", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begun
    megabytes = (_memory("VmHWM") - before) / 1000
    if outcome in PASSED and megabytes > MOST_MEMORY:
        outcome = "memory"
    if outcome in PASSED and seconds > MOST_SECONDS:
        outcome = "slow"
    return {
        "outcome": outcome,
        "text": ascii(text)[1:-1][:300],
        "seconds": round(seconds, 2),
        "megabytes": round(megabytes),
    }


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # the peak is then that of all cases so far
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """A line of the process's status, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def work(seed: int, folder: Path) -> None:
    """The worker: answers on what is standard output now, and lets nothing else write there."""
    import resource

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from experiments.faults import mutators

    files = mutators.SoundFiles(folder)
    most = _memory("VmSize") * 1000 + 8 * 2**30  # so that no case takes the machine's memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        read = mutators.prepare(files, kind_of(int(line)), seed, int(line))
        print(json.dumps(judge(read)), file=answers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.faults.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", type=int, help="one case, in this process: its own traceback")
    parser.add_argument(
        "--record", type=Path, help="default: fuzz-SEED.jsonl in the working folder"
    )
    parser.add_argument("--out", type=Path, default=HERE / "fuzz.json", help="default: %(default)s")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.seed, options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.only is not None:
            from experiments.faults import mutators

            files = mutators.SoundFiles(Path(folder))
            number = options.only
            print(mutators.prepare(files, kind_of(number), options.seed, number)())
            return
        command = [sys.executable, "-m", "experiments.faults.fuzz", f"--seed={options.seed}"]
        supervisor = Supervisor([*command, f"--worker={folder}"])
        record = options.record or Path(f"fuzz-{options.seed}.jsonl")
        try:
            outcomes = supervise(supervisor, range(options.cases), record)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            supervisor.close()
    summary = {"seed": options.seed, **summarise(outcomes)}
    options.out.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary["counts"], indent=2))
    print(f"{summary['passed']} of {summary['cases']} passed.")
    sys.exit(0 if summary["passed"] == summary["cases"] else 1)


if __name__ == "__main__":
    main()
