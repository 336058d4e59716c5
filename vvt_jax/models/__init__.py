"""The models: linen modules that know nothing of training or of files."""

import importlib
from typing import TYPE_CHECKING

# On first use, since `vvt_jax.attention` is imported by the modules of this package and imports one
_HOMES = {
    "Segmenter": "segmenter",
    "create": "segmenter",
    "create_segmenter": "segmenter",
    "VARIANTS": "vvt",
    "VVT": "vvt",
    "create_model": "vvt",
    "list_models": "vvt",
    "unstack_blocks": "vvt",
}

if TYPE_CHECKING:  # what the lookup below resolves to
    from vvt_jax.models.segmenter import Segmenter, create, create_segmenter
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


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"vvt_jax.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vvt_jax.models' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
