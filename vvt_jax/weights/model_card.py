"""The README.md of a model folder, including the metadata that the Hugging Face Hub reads."""

import json
from collections.abc import Mapping
from typing import Any

from vvt_jax.models import VVT, Segmenter
from vvt_jax.models.vvt import VARIANTS, create_model, model_fields

FILE = "README.md"
_MOST_NAMES = 20  # number of class names to list


def variant_name(model: VVT) -> str | None:
    """Return the name with which `create_model` creates this model, or None if it has no name.

    The number of classes and fields that only affect training or computation are ignored.
    """
    free = {
        field: getattr(model, field)
        for field in ("num_classes", "drop_path_rate", "dtype", "remat", "unroll", "ffn_bands")
    }
    return next((name for name in VARIANTS if create_model(name, **free) == model), None)


def model_card(model: VVT, card: Mapping[str, Any], parameters: int) -> str:
    """Describe a model in Markdown: what it is, how to use it, and what input it takes.

    Args:
        model: the model, whose fields are listed.
        card: the card of the model, with `preprocessing` and `class_names` if they are known.
        parameters: the number of parameters.
    """
    name = variant_name(model)
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    if isinstance(model, Segmenter):
        task = "image-segmentation"
    lines = [
        "---",
        "library_name: vvt_jax",
        f"pipeline_tag: {task}",
        "tags: [jax, flax, vision, vicinity-vision-transformer]",
        "---",
        "",
        f"# {name or 'Vicinity Vision Transformer'}",
        "",
        f"A Vicinity Vision Transformer ([arXiv 2206.10552](https://arxiv.org/abs/2206.10552)) of "
        f"{parameters:,} parameters, "
        + (f"with {model.num_classes} classes." if model.num_classes else "without a classifier."),
        "",
        "```python",
        "import jax",
        "import PIL.Image",
        "import vvt_jax",
        "",
        'model, variables, card = vvt_jax.load_pretrained("FOLDER")',
    ]
    if "preprocessing" in card:
        lines += ['images = vvt_jax.preprocess(PIL.Image.open("image.jpg"), card)']
    else:
        lines += ["images = ...  # normalised, [batch, height, width, 3]"]
    result = "logits" if model.num_classes else "features"
    lines += [
        f"{result} = jax.jit(model.apply)(variables, images)",
        "```",
        "",
        "## Preprocessing",
        "",
    ]
    if record := card.get("preprocessing"):
        # indented, so that Markdown shows any content literally
        lines += [f"    {key}: {json.dumps(value)}" for key, value in record.items()]
    else:
        lines += ["Not recorded."]
    lines += ["", "## Classes", ""]
    if names := card.get("class_names"):
        lines += [f"    {i} {_literal(n)}" for i, n in enumerate(names[:_MOST_NAMES])]
        if len(names) > _MOST_NAMES:
            lines += ["", f"and {len(names) - _MOST_NAMES} more, in `config.json`."]
    else:
        lines += ["Their names are not recorded." if model.num_classes else "None."]
    lines += ["", "## Fields", ""]
    lines += [f"    {key}: {json.dumps(value)}" for key, value in model_fields(model).items()]
    return "\n".join(lines) + "\n"


def _literal(name: str) -> str:
    """Return a name in quotes on a single line, whatever characters it has."""
    return json.dumps(name, ensure_ascii=False).replace("\u2028", " ").replace("\u2029", " ")
