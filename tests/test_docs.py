"""The README and the guides: their links lead somewhere, and their commands exist."""

import re
import shlex

import pytest

from configs import common
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def _commands(text: str) -> list[list[str]]:
    """The `python -m` commands of a page's blocks, as arguments without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command[command.index("-m") :] for command in commands if "-m" in command]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def _check(page: str, module: str, arguments: list[str]) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    if module == "vvt_jax.data.show":
        path = ROOT / "vvt_jax" / "show.py"
    source = path.read_text()
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if argument == "--":  # what follows is for another command
            return _check(page, "vvt_jax.main", arguments[i + 1 :])
        if flag == "--config":
            assert (ROOT / value.partition(":")[0]).exists(), (page, value)
        elif flag.startswith("--config."):
            field = common.get_config()
            for name in flag.split(".")[1:]:
                assert name in field, (page, flag)
                field = field[name]
        elif flag.startswith("--"):
            name = flag.removeprefix("--")
            assert re.search(rf"[\"'](--)?{name}[\"']", source), (page, module, flag)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page):
    for _, module, *arguments in _commands(page.read_text()):
        if module not in ("venv", "pytest"):
            _check(page.name, module, arguments)
