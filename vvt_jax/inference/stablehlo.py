"""Export of a model as a StableHLO program that runs without this package."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from vvt_jax.models import VVT, forms
from vvt_jax.models.vvt import SMALLEST_SIDE, unstack_blocks

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    model: VVT,
    variables: Mapping[str, Any],
    *,
    size: tuple[int, int] | None,
    batch: int | None = None,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
) -> jax.export.Exported:
    """Export the forward pass with its weights, lowered for several platforms at once.

    Args:
        model: a model with any fields.
        variables: the variables that `model.apply` takes.
        size: height and width of the images, in pixels; None: symbolic, any size from 32 up.
        batch: the number of images per call; None: symbolic, any number.
        platforms: platforms from `PLATFORMS`. The CPU uses different forms of some operations than
            the other platforms (see `forms`).

    Returns:
        The exported program: `serialize()` converts it to bytes and `call(images)` runs it.
    """
    symbols = f"{batch or 'batch'}, {'height, width' if size is None else f'{size[0]}, {size[1]}'}"
    shape = jax.export.symbolic_shape(
        f"{symbols}, 3",
        constraints=[f"{side} >= {SMALLEST_SIDE}" for side in ("height", "width") if size is None],
    )
    variables = unstack_blocks(variables)

    def on(platform: str):
        def forward(variables, images):
            with forms.compiling_for(platform):
                return model.apply(variables, images)

        return forward

    # The branch is chosen when the file is loaded; the file has the weights only once.
    others = [platform for platform in platforms if platform != "cpu"]
    branches = {"cpu": on("cpu")} if "cpu" in platforms else {}
    if others:  # they all use the same forms
        branches["default"] = on(others[0])

    def forward(images):
        return jax.lax.platform_dependent(variables, images, **branches)

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.export.export(jax.jit(forward), platforms=platforms)(images)


def write(
    path: Path, content: bytes, told: Mapping[str, Any], model: VVT, card: Mapping[str, Any]
) -> Path:
    """Write a program, and its description to FILE.json.

    Args:
        path: the file for the program.
        content: the program in bytes.
        told: the description of the program, to which more is added from the model and its card.
        model: the model that was exported.
        card: the card of the model.

    Returns:
        The path of FILE.json.
    """
    description = {
        **told,
        "jax_version": jax.__version__,
        "sha256": hashlib.sha256(content).hexdigest(),
        "num_classes": model.num_classes,
        **{key: card[key] for key in ("preprocessing", "class_names") if key in card},
    }
    beside = path.with_name(f"{path.name}.json")
    for place, what in ((path, content), (beside, json.dumps(description, indent=2).encode())):
        temporary = place.with_name(f"{place.name}.tmp")
        temporary.write_bytes(what)
        temporary.replace(place)
    return beside


def describe(exported: jax.export.Exported) -> dict[str, Any]:
    """Return the description of a StableHLO program that goes into FILE.json."""
    return {
        "input": {"images": str(exported.in_avals[0])},
        "output": str(exported.out_avals[0]),
        "platforms": list(exported.platforms),
    }
