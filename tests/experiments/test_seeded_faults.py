"""The list of seeded faults fits the code: `experiments/seeded_faults`."""

import ast
from pathlib import Path

import pytest

from experiments.seeded_faults.faults import FAULTS
from experiments.seeded_faults.run import problem_of

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_unique():
    names = [fault.id for fault in FAULTS]
    assert len(set(names)) == len(names) >= 45


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault_fits_the_code(fault):
    assert problem_of(fault, ROOT) == ""
    sound = (ROOT / fault.file).read_text(encoding="utf-8")
    faulty = sound.replace(fault.old, fault.new)
    assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(sound))
