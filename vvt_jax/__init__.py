"""Vicinity Vision Transformer in JAX: a vision backbone with linear attention, local in 2D.

All public names are attributes of this package. They are imported on first use, so that
`import vvt_jax` costs nothing and `python -m vvt_jax.convert` runs that module only once.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Predictor": "vvt_jax.inference.predictor",
    "create_model": "vvt_jax.models",
    "create_segmenter": "vvt_jax.models",
    "list_models": "vvt_jax.models",
    "load_pretrained": "vvt_jax.weights.pretrained",
    "save_pretrained": "vvt_jax.weights.pretrained",
    "preprocess": "vvt_jax.data.preprocess",
    "train_and_evaluate": "vvt_jax.train",
}
_SUBMODULES = {
    "attention": "vvt_jax.attention",
    "convert": "vvt_jax.convert",
    "data": "vvt_jax.data",
    "explain": "vvt_jax.inference.explain",
    "models": "vvt_jax.models",
    "pretrained": "vvt_jax.weights.pretrained",
    "segment": "vvt_jax.inference.segment",
    "train": "vvt_jax.train",
}

if TYPE_CHECKING:  # the names that the lazy lookup below resolves
    from vvt_jax import attention, convert, data, models, train
    from vvt_jax.data.preprocess import preprocess
    from vvt_jax.inference import explain, segment
    from vvt_jax.inference.predictor import Predictor
    from vvt_jax.models import create_model, create_segmenter, list_models
    from vvt_jax.train import train_and_evaluate
    from vvt_jax.weights import pretrained
    from vvt_jax.weights.pretrained import load_pretrained, save_pretrained

__all__ = [
    "Predictor",
    "attention",
    "convert",
    "create_model",
    "create_segmenter",
    "data",
    "explain",
    "list_models",
    "load_pretrained",
    "models",
    "preprocess",
    "pretrained",
    "save_pretrained",
    "segment",
    "train",
    "train_and_evaluate",
]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(_SUBMODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vvt_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
