"""The choice of the form in which each operation runs best on a platform.

The forms of an operation compute the same function but differ in speed, memory use and sharding.
The choice is read while a function is traced, so an override must enclose the tracing:

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
        depthwise: `"shift"`, nine shifted multiply-adds with a custom gradient, or `"grouped"`, a
            grouped convolution.
        attention: `"concatenated"`, with features of 4 times the head width, as published, or
            `"separable"`, with sums by row and column instead of such features.
        gelu: whether the output of GELU is `"kept"` for the backward pass or `"recomputed"` from
            the input, which is kept in any case.
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
    """Return the forms that were fastest, or accessed the least memory, in experiments/costs.

    Args:
        platform: JAX's name of the platform, e.g. `"cpu"`.
        spatial: the number of devices that share the rows of an image. With several, a grouped
            convolution exchanges one halo row with its neighbours, where shifts would move whole
            maps, and the concatenated sums are reduced as one small matrix.
    """
    if platform == "cpu" and spatial == 1:
        return Forms(depthwise="shift", attention="separable", gelu="kept")
    return Forms(depthwise="grouped", attention="concatenated", gelu="recomputed")


def current() -> Forms:
    """Return the forms currently in force.

    They are those of an enclosing `compiling_for`, or else of the default platform, with the
    overrides of any enclosing `use`.
    """
    chosen = _place.get() or choose(jax.default_backend())
    return dataclasses.replace(chosen, **(_override.get() or {}))


def spatial_devices() -> int:
    """Return how many devices share the rows of an image, according to `compiling_for`."""
    return _spatial.get()


def row_layout() -> NamedSharding | None:
    """Return how the examples and rows of a map are laid out over the devices.

    An enclosing `compiling_for` specifies the layout. It is None if images are not split, or if no
    layout is specified.
    """
    return _rows.get()


@contextlib.contextmanager
def compiling_for(
    platform: str, *, spatial: int = 1, rows: NamedSharding | None = None
) -> Iterator[Forms]:
    """Apply the forms that `choose` returns to everything traced inside; `use` overrides them.

    Args:
        platform: JAX's name of the platform, as for `choose`.
        spatial: the number of devices that share the rows of an image, as for `choose`.
        rows: the layout of maps `[batch, rows, ...]`, if `spatial` is more than one. The gradients
            of convolutions are correct without it too, but need more communication.
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
    """Override the platform's forms for everything traced inside.

    For example, `use(attention="separable")` selects the separable form of attention.

    Raises:
        ValueError: if a form does not exist.
    """
    dataclasses.replace(current(), **forms)  # raises for unknown forms before anything is changed
    token = _override.set({**(_override.get() or {}), **forms})
    try:
        yield current()
    finally:
        _override.reset(token)


# XLA's options for the outermost jit on a CPU, by use. Initialisation runs only once, and its
# random draws take three times as long to compile with optimisation as without. The library fusions
# (YNN) speed up the train step by a third but slow down a forward pass of 8 images by a quarter.
_CPU_OPTIONS: dict[str, dict[str, Any]] = {
    "init": {"xla_backend_optimization_level": 0},
    "forward": {
        "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_cpu_prefer_vector_width": 512,
    },
    "train": {},
}


def compiler_options(use: str, platform: str | None = None) -> dict[str, Any]:
    """Return the `compiler_options` of `jax.jit` for the use `"init"`, `"forward"` or `"train"`.

    `platform` defaults to JAX's default platform.
    """
    return _CPU_OPTIONS[use] if (platform or jax.default_backend()) == "cpu" else {}
