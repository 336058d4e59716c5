"""Memory in pages of 2 MB instead of 4 kB, where Linux gives them to who asks.

XLA takes the temporaries of a program anew for each call, on a CPU from the C library. Handing out
hundreds of megabytes page by page took Linux a third of a training step of vvt_tiny
(experiments/costs). The C library asks for larger pages if `GLIBC_TUNABLES` says so when a program
starts, and at no other time.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts this very process again, once, with the variable set, where that has an effect.

    Process number, arguments and open files stay. Does nothing where the variable names the tunable
    already (`GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages), or where Linux gives huge
    pages unasked or never, or after jax was imported: then a program that runs already has run the
    command's module as a part of its work.
    """
    environment = with_huge_pages(os.environ, _mode())
    if environment is not None and "jax" not in sys.modules:
        os.execve(sys.executable, sys.orig_argv, environment)


def with_huge_pages(environment: Mapping[str, str], mode: str) -> dict[str, str] | None:
    """The environment that asks for them, or None where nothing has to change.

    Args:
        environment: variables by name.
        mode: the choice of transparent huge pages as Linux writes it, `"always [madvise] never"`.
    """
    tunables = environment.get(_VARIABLE, "")
    if "[madvise]" not in mode or _TUNABLE in tunables:
        return None
    return {**environment, _VARIABLE: ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))}


def _mode() -> str:
    try:
        return MODE.read_text()
    except OSError:  # another system, or a kernel without them
        return ""
