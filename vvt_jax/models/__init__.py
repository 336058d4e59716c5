"""The models: linen modules that are independent of training and files."""

import importlib
from typing import TYPE_CHECKING

# Imported on first use, because modules of this package import `vvt_jax.attention`, which in turn
# imports one of them
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

if TYPE_CHECKING:  # the names that `__getattr__` looks up
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
