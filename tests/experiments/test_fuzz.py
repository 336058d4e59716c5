"""A small share of the fuzzing, and what its script does with cases that end badly."""

import json
import sys
import textwrap

import pytest

from experiments.faults import fuzz


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from experiments.faults import mutators

    return mutators.SoundFiles(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_end_in_a_result_or_a_sentence(files, kind):
    from experiments.faults import mutators

    first = fuzz.KINDS.index(kind)
    count = 4 if kind == "model folder" else 40  # each makes a model
    for number in range(first, first + count * len(fuzz.KINDS), len(fuzz.KINDS)):
        outcome = fuzz.judge(mutators.prepare(files, kind, 1, number))
        assert outcome["outcome"] in fuzz.PASSED, (number, outcome)


_WORKER = """
    import json, os, sys, time

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        number = int(line)
        if number == 2:
            os.abort()
        if number == 3:
            time.sleep(60)
        print(json.dumps({"outcome": "result", "seconds": number, "megabytes": 0}), flush=True)
"""


def test_a_crash_and_a_hang_fail_their_cases_only_and_a_run_goes_on(tmp_path):
    record = tmp_path / "record.jsonl"
    command = [sys.executable, "-S", "-c", textwrap.dedent(_WORKER)]
    supervisor = fuzz.Supervisor(command, hang_seconds=0.5)
    try:
        outcomes = fuzz.supervise(supervisor, range(4), record)
        with record.open("a") as file:
            file.write('{"case": 4, "outco')  # as a kill leaves it
        outcomes = fuzz.supervise(supervisor, range(6), record)
    finally:
        supervisor.close()
    assert [outcome["case"] for outcome in outcomes] == list(range(6))
    ends = [outcome["outcome"] for outcome in outcomes]
    assert ends == ["result", "result", "crash", "hang", "result", "result"]
    whole = [line for line in record.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["case"] for line in whole] == list(range(6))  # none ran twice
    summary = fuzz.summarise(outcomes)
    assert (summary["cases"], summary["passed"]) == (6, 4)
    assert [failure["case"] for failure in summary["failures"]] == [2, 3]


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (None, "result"),
        ("A sentence.", "sentence"),
        ("no end", "no sentence"),
        (ZeroDivisionError, "traceback"),
    ],
)
def test_what_counts_as_passed(end, outcome):
    from vvt_jax.system.errors import UserError

    def read():
        if isinstance(end, str):
            raise UserError(end)
        if end is not None:
            raise end

    assert fuzz.judge(read)["outcome"] == outcome


def test_what_takes_too_much_memory_fails():
    assert fuzz.judge(lambda: bytearray(b"x" * 2**25))["outcome"] == "result"
    assert fuzz.judge(lambda: bytearray(b"x" * (600 * 2**20)))["outcome"] == "memory"
