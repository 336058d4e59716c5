"""Which form of an operation runs best where: the one place where that is chosen.

Forms compute the same function; they differ in speed, memory and in how they shard. The choice is
read while a function is traced, so an override has to surround the trace:

    with forms.use(depthwise="grouped"):
        logits = jax.jit(model.apply)(variables, images)
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

DEPTHWISE = ("shift", "grouped")
ATTENTION = ("concatenated", "separable")
GELU = ("kept", "recomputed")


@dataclasses.dataclass(frozen=True)
class Forms:
    """The form of each operation that has more than one.

    Attributes:
        depthwise: `"shift"`, nine shifted multiply-adds with a gradient of their own, or
            `"grouped"`, a grouped convolution.
        attention: `"concatenated"`, features of 4 times the head width as published, or
            `"separable"`, sums by row and column that never make them.
        gelu: whether its output is `"kept"` for the backward pass, or `"recomputed"` from its
            input, which is kept in any case.
    """

    depthwise: str
    attention: str
    gelu: str

    def __post_init__(self):
        fields = ((self.depthwise, DEPTHWISE), (self.attention, ATTENTION), (self.gelu, GELU))
        for value, known in fields:
            if value not in known:
                raise ValueError(f"Unknown form '{value}': it is one of {', '.join(known)}.")


_override: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "vvt_jax_forms_override", default=None
)
_place: contextvars.ContextVar[Forms | None] = contextvars.ContextVar(
    "vvt_jax_forms_place", default=None
)
_spatial: contextvars.ContextVar[int] = contextvars.ContextVar("vvt_jax_forms_spatial", default=1)
_rows: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar(
    "vvt_jax_forms_rows", default=None
)


def choose(platform: str, *, spatial: int = 1) -> Forms:
    """What was fastest, or touched the fewest bytes, on a platform (experiments/costs).

    Args:
        platform: as jax names it, e.g. `"cpu"`.
        spatial: devices that share the rows of an image. There, a grouped convolution trades one
            halo row with its neighbours, where shifts would move whole maps, and concatenated sums
            are reduced as one small matrix.
    """
    if platform == "cpu" and spatial == 1:
        return Forms(depthwise="shift", attention="separable", gelu="kept")
    return Forms(depthwise="grouped", attention="concatenated", gelu="recomputed")


def current() -> Forms:
    """The forms in force here: those of the platform, or of a surrounding `compiling_for`, with the
    overrides of a surrounding `use`."""
    chosen = _place.get() or choose(jax.default_backend())
    return dataclasses.replace(chosen, **(_override.get() or {}))


def spatial_devices() -> int:
    """Devices that share the rows of an image, as a surrounding `compiling_for` says."""
    return _spatial.get()


def row_layout() -> NamedSharding | None:
    """How a map's examples and rows lie over the devices, as a surrounding `compiling_for` says;
    None where images are not split, or where it does not say."""
    return _rows.get()


@contextlib.contextmanager
def compiling_for(
    platform: str, *, spatial: int = 1, rows: NamedSharding | None = None
) -> Iterator[Forms]:
    """Takes the forms that `choose` gives, for what is traced inside; `use` overrides them.

    Args:
        platform: as for `choose`.
        spatial: as for `choose`.
        rows: the layout of maps `[batch, rows, ...]` where `spatial` is more than one. Without it,
            gradients of convolutions are right as well, but cost more communication.
    """
    place = _place.set(choose(platform, spatial=spatial))
    devices = _spatial.set(spatial)
    layout = _rows.set(rows if spatial > 1 else None)
    try:
        yield current()
    finally:
        _rows.reset(layout)
        _spatial.reset(devices)
        _place.reset(place)


@contextlib.contextmanager
def use(**forms: str) -> Iterator[Forms]:
    """Overrides the platform's choice for what is traced inside, e.g. `use(attention="separable")`.

    Raises:
        ValueError: a form that does not exist.
    """
    dataclasses.replace(current(), **forms)  # refuse what does not exist before entering
    token = _override.set({**(_override.get() or {}), **forms})
    try:
        yield current()
    finally:
        _override.reset(token)


# XLA's options for the outermost jit on a CPU, by use. Initialisation runs once, and drawing its
# random numbers takes three times as long to compile with optimisation as without. The library
# fusions (YNN) speed the train step up by a third and slow a forward pass of 8 images by a quarter.
_CPU_OPTIONS: dict[str, dict[str, Any]] = {
    "init": {"xla_backend_optimization_level": 0},
    "forward": {
        "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_cpu_prefer_vector_width": 512,
    },
    "train": {},
}


def compiler_options(use: str, platform: str | None = None) -> dict[str, Any]:
    """What to give `jax.jit(compiler_options=...)` for `"init"`, `"forward"` or `"train"`.

    `platform` is jax's default one if it is not given.
    """
    return _CPU_OPTIONS[use] if (platform or jax.default_backend()) == "cpu" else {}
