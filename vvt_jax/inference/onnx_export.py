"""A model as an ONNX file: program and weights, for runtimes that know nothing of JAX."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vvt_jax.models import VVT, forms
from vvt_jax.models.vvt import unstack_blocks
from vvt_jax.system.errors import UserError

SUFFIX = ".onnx"


def export_onnx(
    model: VVT,
    variables: Mapping[str, Any],
    *,
    size: tuple[int, int],
    batch: int,
) -> tuple[bytes, dict[str, Any]]:
    """The forward pass with its weights: input "images", output "logits".

    Args:
        model: of any fields, float32.
        variables: what `model.apply` takes.
        size: height and width of the images.
        batch: images a call; the converter can leave neither open.

    Returns:
        The file's content, and what is to be told of it.

    Raises:
        UserError: the converter is not installed, or the model computes in another dtype.
    """
    if model.dtype != "float32":
        raise UserError(
            f"An ONNX file is for float32, and this model computes in {model.dtype}: give "
            "--set dtype=float32."
        )
    try:
        import jax2onnx
    except ModuleNotFoundError as error:
        raise UserError(
            f"ONNX needs the converter jax2onnx ({error.name} is not installed): "
            "pip install 'vvt-jax[onnx]'."
        ) from error

    own = unstack_blocks(variables)
    shape = (batch, *size, 3)
    # A runtime has a kernel for grouped convolutions, and none for nine shifts.
    with forms.use(depthwise="grouped", attention="concatenated", gelu="kept"):
        traced = jax.make_jaxpr(lambda images: model.apply(own, images))(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )

    def forward(images):  # operations alone: the converter knows no linen module as old as VVT's
        return jax.core.eval_jaxpr(traced.jaxpr, traced.consts, images)[0]

    proto = jax2onnx.to_onnx(
        forward,
        inputs=[shape],
        model_name="vvt",
        input_names=["images"],
        output_names=["logits"],
    )
    (output,) = traced.out_avals
    told = {
        "input": {"images": f"float32[{','.join(map(str, shape))}]"},
        "output": str(output),
        "platforms": ["onnx"],
    }
    return proto.SerializeToString(), told
