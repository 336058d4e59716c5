"""Errors that users see: one line, whatever the files put into them."""

import pickle

import pytest

from vvt_jax.data.examples import BrokenImageError
from vvt_jax.system.errors import UserError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("ünï ☃ is fine.", "ünï ☃ is fine."),
        ("two\nlines\x1b[2J\x00.", r"two\nlines\x1b[2J\x00."),
        ("half of a character \ud800.", r"half of a character \ud800."),
    ],
)
def test_a_message_is_one_line_that_does_not_act_on_a_terminal(given, shown):
    assert str(UserError(given)) == shown
    assert str(pickle.loads(pickle.dumps(BrokenImageError(given)))) == shown


def test_a_long_message_keeps_its_start_and_its_end():
    message = str(UserError("start " + "x" * 10**6 + " end."))
    assert len(message) < 8001
    assert message.startswith("start ")
    assert message.endswith(" end.")
