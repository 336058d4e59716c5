"""Huge pages: asked for where that has an effect, once, by commands only."""

import os
import subprocess
import sys

import pytest

from vvt_jax.system.huge_pages import MODE, with_huge_pages

ON_ASKING = "always [madvise] never\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": ""}, "glibc.malloc.hugetlb=1"),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
            "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
        ),
    ],
)
def test_the_environment_asks_and_keeps_what_it_says(given, expected):
    environment = with_huge_pages({"HOME": "/root", **given}, ON_ASKING)
    assert environment == {"HOME": "/root", "GLIBC_TUNABLES": expected}


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]", ""])
def test_nothing_is_asked_where_it_has_no_effect(mode):
    assert with_huge_pages({}, mode) is None


@pytest.mark.parametrize("value", ["0", "1", "2"])
def test_what_the_environment_says_of_them_stands(value):
    assert with_huge_pages({"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={value}"}, ON_ASKING) is None


_EACH_START = """
import os, sys
with open(os.environ["STARTS"], "a") as file:
    print(os.getpid(), sys.orig_argv[1:], os.environ.get("GLIBC_TUNABLES"), sep="\\t", file=file)
"""


def _starts(tmp_path, *arguments: str) -> list[list[str]]:
    """Process, arguments and tunables of each start of Python that the arguments lead to."""
    (tmp_path / "sitecustomize.py").write_text(_EACH_START)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"STARTS": str(tmp_path / "starts"), "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, *arguments], env=environment)
    assert process.wait(timeout=300) == 0
    starts = [line.split("\t") for line in (tmp_path / "starts").read_text().splitlines()]
    assert {number for number, *_ in starts} == {str(process.pid)}
    assert {told for _, told, _ in starts} == {str(list(arguments))}
    return starts


@pytest.mark.parametrize("arguments", [("-c", "import vvt_jax"), ("-m", "vvt_jax.system.errors")])
def test_what_is_no_command_restarts_nothing(tmp_path, arguments):
    assert [tunables for *_, tunables in _starts(tmp_path, *arguments)] == ["None"]


def test_a_command_starts_again_as_the_same_process(tmp_path):
    expected = ["None"]
    if MODE.exists() and "[madvise]" in MODE.read_text():
        expected.append("glibc.malloc.hugetlb=1")
    starts = _starts(tmp_path, "-m", "vvt_jax.predict", "--help")
    assert [tunables for *_, tunables in starts] == expected
