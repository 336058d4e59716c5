"""Memory pages of 2 MB instead of 4 kB, on Linux systems that provide them on request.

On a CPU, XLA allocates a program's temporary buffers from the C library at each call. Providing
hundreds of megabytes page by page took Linux a third of a training step of vvt_tiny
(experiments/costs). The C library requests larger pages if `GLIBC_TUNABLES` says so when a program
starts; it can't be changed later.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Restart this process once, with the environment variable set, if that has an effect.

    The process ID, arguments and open files remain the same. This does nothing if the variable
    already sets the tunable (`GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages), or if
    Linux provides huge pages always or never. It also does nothing once JAX is imported, because
    the command's module is then being run by a program that is already at work.
    """
    environment = with_huge_pages(os.environ, _mode())
    if environment is not None and "jax" not in sys.modules:
        os.execve(sys.executable, sys.orig_argv, environment)


def with_huge_pages(environment: Mapping[str, str], mode: str) -> dict[str, str] | None:
    """Return the environment that requests huge pages, or None if no change is needed.

    Args:
        environment: the environment variables by name.
        mode: the setting of transparent huge pages in the format of Linux, such as
            `"always [madvise] never"`.
    """
    tunables = environment.get(_VARIABLE, "")
    if "[madvise]" not in mode or _TUNABLE in tunables:
        return None
    return {**environment, _VARIABLE: ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))}


def _mode() -> str:
    try:
        return MODE.read_text()
    except OSError:  # another system, or a kernel without huge pages
        return ""
