"""A contact sheet of what the model sees in training, after everything that augments it.

python -m vvt_jax.data.show --config=configs/digits.py --out=sheet.png [--step=1] [--images=64]
"""

import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vvt_jax.configuration import ConfigError, flagged_fields, parse_flags
from vvt_jax.data.overlay import draw_comparison
from vvt_jax.errors import UserError

_WIDTH = 1600  # pixels of the sheet, at most
_LEAST_TILE = 96  # pixels; smaller images are enlarged by a whole number
_MARGIN, _CAPTION = 6, 18  # pixels around a tile, and of the line below it
_FAINT = 0.02  # shares of a label below this are left out, such as those of smoothing


def draw_sheet(
    images: np.ndarray, targets: np.ndarray, class_names: Sequence[str]
) -> PIL.Image.Image:
    """Images in rows, each with its label, or with the shares of mixed ones.

    Args:
        images: uint8 `[count, height, width, 3]`.
        targets: `[count, classes]`, shares that sum to 1.
        class_names: in the order of the labels.
    """
    count, height, width = images.shape[:3]
    scale = max(1, -(-_LEAST_TILE // min(height, width)))
    cell_width = width * scale + _MARGIN
    cell_height = height * scale + _MARGIN + _CAPTION
    columns = max(1, min(count, (_WIDTH - _MARGIN) // cell_width))
    rows = -(-count // columns)
    sheet = PIL.Image.new(
        "RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white"
    )
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(12)
    for index, (pixels, target) in enumerate(zip(images, targets, strict=True)):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * cell_width, _MARGIN + row * cell_height
        tile = PIL.Image.fromarray(pixels).resize(
            (width * scale, height * scale), PIL.Image.Resampling.NEAREST
        )
        sheet.paste(tile, (left, top))
        caption = _caption(target, class_names)
        while draw.textlength(caption, font) > width * scale and len(caption) > 4:
            caption = caption[:-2].rstrip("…") + "…"
        draw.text((left, top + height * scale + 2), caption, "black", font)
    return sheet


def _caption(target: np.ndarray, class_names: Sequence[str]) -> str:
    smoothed = float(target.min())  # what label smoothing gives to every class
    shares = (target - smoothed) / max(1e-9, 1 - smoothed * len(target))
    order = [i for i in np.argsort(-shares) if shares[i] > _FAINT]
    if len(order) == 1:
        return class_names[order[0]]
    return " + ".join(f"{class_names[i]} {shares[i]:.2f}" for i in order)


def training_batch(
    config: ConfigDict, step: int, flagged: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """What the model sees at a step of training.

    Args:
        config: of the run.
        step: counted from 1.
        flagged: fields that were set on the command line.

    Returns:
        uint8 images `[batch, height, width, 3]`, targets `[batch, classes]` (of segmentation: uint8
        masks `[batch, height, width]`) and the classes' names.

    Raises:
        UserError: the config or its data is unsuitable.
    """
    from vvt_jax import train  # imports jax

    images, targets, record, names = train.see_batch(config, step, flagged=flagged)
    mean, std = (np.asarray(record[key], np.float32) for key in ("mean", "std"))
    pixels = np.clip((np.asarray(images) * std + mean) * 255, 0, 255).round().astype(np.uint8)
    return pixels, np.asarray(targets), names


def main(argv: list[str], arguments: Mapping[str, Any]) -> None:
    try:
        if argv[1:]:
            raise ConfigError(f"Not a flag: {argv[1]}; a field is given as --config.field=value.")
        step, count = arguments["step"].value, arguments["images"].value
        if step < 1 or count < 1:
            raise ConfigError("--step and --images count from 1.")
        flagged = flagged_fields(arguments["config"])
        images, targets, names = training_batch(arguments["config"].value, step, flagged)
        out = Path(arguments["out"].value)
        if targets.ndim == 3:
            pictures = [PIL.Image.fromarray(image) for image in images[:count]]
            sheet = draw_comparison(pictures, list(targets[:count]), None, names)
        else:
            sheet = draw_sheet(images[:count], targets[:count], names)
        try:
            sheet.save(out, "PNG")
        except OSError as error:
            raise ConfigError(f"--out={out} can't be written: {error.strerror}.") from error
        print(f"{min(count, len(images))} images of step {step} are in {out}.")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _FLAGS = {
        "config": config_flags.DEFINE_config_file("config", None, "As for vvt_jax.main."),
        "out": flags.DEFINE_string("out", "contact_sheet.png", "The picture, a PNG file."),
        "step": flags.DEFINE_integer("step", 1, "The step of training, counted from 1."),
        "images": flags.DEFINE_integer("images", 64, "How many of its batch, at most."),
    }
    flags.mark_flag_as_required("config")
    app.run(
        functools.partial(main, arguments=_FLAGS),
        flags_parser=functools.partial(parse_flags, config_flag=_FLAGS["config"]),
    )
