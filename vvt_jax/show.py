"""Draw a contact sheet of the images that the model sees in training, after all augmentation.

python -m vvt_jax.data.show --config=configs/digits.py --out=sheet.png [--step=1] [--images=64]
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax is imported: the restart would import it twice
    from vvt_jax.system.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import numpy as np
import PIL.Image
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vvt_jax.data.contact_sheet import draw_sheet
from vvt_jax.data.overlay import draw_comparison
from vvt_jax.system.command_line import ending_in_a_sentence
from vvt_jax.training.config_flags import flagged_fields, parse_flags
from vvt_jax.training.configuration import ConfigError


def training_batch(
    config: ConfigDict, step: int, flagged: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """Return the batch that the model sees at one step of training.

    Args:
        config: the config of a new run.
        step: the step, counted from 1.
        flagged: the fields that were set on the command line.

    Returns:
        uint8 images `[batch, height, width, 3]`, targets `[batch, classes]` (for segmentation,
        uint8 masks `[batch, height, width]`) and the names of the classes.

    Raises:
        UserError: the config or its data is unsuitable.
    """
    import jax  # imported late, to keep --help fast

    from vvt_jax.training import configuration, mixing
    from vvt_jax.training.plan import make_plan, open_sources, see_batch
    from vvt_jax.training.provenance import Provenance

    config = configuration.replaced(config, {"mode": "train"})
    configuration.check_values(config)
    made = Provenance(config, None, flagged)
    sources = made.match(open_sources(made.config, cuts=made.cuts))
    plan = make_plan(made.config, sources)
    key = mixing.augmentation_key(plan.config.seed, step)
    batch = jax.jit(plan.task.prepare)(see_batch(plan, step), key)
    images, targets = jax.device_get(batch)
    mean, std = (np.asarray(plan.preprocessing[key], np.float32) for key in ("mean", "std"))
    pixels = np.clip((np.asarray(images) * std + mean) * 255, 0, 255).round().astype(np.uint8)
    return pixels, targets, plan.main_source.class_names


def main(argv: list[str], arguments: Mapping[str, Any]) -> None:
    with ending_in_a_sentence():
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
