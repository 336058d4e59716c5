"""The list of seeded faults fits the code: `experiments/seeded_faults`."""

import ast
from pathlib import Path

from experiments.seeded_faults.faults import FAULTS
from experiments.seeded_faults.run import problem_of

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_unique():
    names = [fault.id for fault in FAULTS]
    assert len(set(names)) == len(names) >= 45


def test_every_fault_fits_the_code():
    problems = {fault.id: problem_of(fault, ROOT) for fault in FAULTS}
    assert {name: problem for name, problem in problems.items() if problem} == {}


def test_faulty_modules_are_python():
    modules = {fault.file: (ROOT / fault.file).read_text(encoding="utf-8") for fault in FAULTS}
    for fault in FAULTS:  # all faults of a module at once, since parsing is what takes time
        sound = modules[fault.file]
        modules[fault.file] = sound.replace(fault.old, fault.new)
        assert modules[fault.file] != sound, fault.id
    for file, faulty in modules.items():
        ast.parse(faulty, filename=file)
