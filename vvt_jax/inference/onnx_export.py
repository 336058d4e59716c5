"""Export of a model, program and weights, as an ONNX file for runtimes without JAX."""

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
    """Convert the forward pass with its weights to ONNX: input "images", output "logits".

    The converter supports neither a symbolic size nor a symbolic batch.

    Args:
        model: a model with any fields that computes in float32.
        variables: the variables that `model.apply` takes.
        size: height and width of the images, in pixels.
        batch: the number of images per call.

    Returns:
        The content of the file, and the description that goes into FILE.json.

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
    # ONNX runtimes have a kernel for grouped convolutions, but none for a sum of nine shifts.
    with forms.use(depthwise="grouped", attention="concatenated", gelu="kept"):
        traced = jax.make_jaxpr(lambda images: model.apply(own, images))(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )

    def forward(images):  # only operations: the converter does not support linen modules like VVT
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
