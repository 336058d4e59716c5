"""The models: linen modules that know nothing of training or of files."""

from vvt_jax.models.segmentation import Segmenter, create, create_segmenter
from vvt_jax.models.vvt import VARIANTS, VVT, create_model, list_models, unstack_blocks

__all__ = [
    "VARIANTS",
    "VVT",
    "Segmenter",
    "create",
    "create_model",
    "create_segmenter",
    "list_models",
    "unstack_blocks",
]
