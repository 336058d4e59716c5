"""Export a model with its weights as one StableHLO or ONNX file that runs without this package.

    python -m vvt_jax.export runs/digits/model --out=digits.jax
    python -m vvt_jax.export vvt_small_224.pth --out=small.jax --size=symbolic --batch=8
    python -m vvt_jax.export runs/digits/model --out=digits.onnx --batch=8

The program takes normalised images `[batch, height, width, 3]`, float32, and returns logits.
FILE.json, next to it, has the preprocessing and the class names. To run it, you only need jax:

    import jax.export
    run = jax.export.deserialize(open("digits.jax", "rb").read()).call
    logits = run(images)

jax guarantees to read such a file for six months after the version that wrote it. If the name ends
in .onnx, the file is for ONNX runtimes instead (needs the extra `onnx`) and takes a fixed number of
images per call.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before jax is imported: the restart would import it twice
    from vvt_jax.system.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from vvt_jax.inference import onnx_export
from vvt_jax.inference.stablehlo import DEFAULT_PLATFORMS, PLATFORMS, describe, export_model, write
from vvt_jax.models.vvt import SMALLEST_SIDE
from vvt_jax.system.command_line import check_output, ending_in_a_sentence, parse_fields
from vvt_jax.system.errors import UserError
from vvt_jax.weights.pretrained import load_pretrained

SYMBOLIC = "symbolic"
_MOST = 2**14  # upper limit of images per call, and of pixels per side


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with ending_in_a_sentence(options.out):
        onnx = options.out.suffix == onnx_export.SUFFIX
        if onnx and options.platforms is not None:
            raise UserError("An ONNX file is of no platform: --platforms is for StableHLO.")
        size, batch = _size(options.size), _batch(options.batch)
        platforms = _platforms(options.platforms)
        _check_out(options.out, options.force)
        fields = parse_fields(options.set)
        model, variables, card = load_pretrained(options.model, options.name, **fields)
        if options.size is None:
            height, width = card.get("preprocessing", {}).get("size", (224, 224))
            size = (height, width)
        if onnx:
            batch = 1 if options.batch is None else batch
            if size is None or batch is None:
                raise UserError(
                    "An ONNX file takes images of one size and number: give --size and --batch "
                    "in numbers."
                )
            content, told = onnx_export.export_onnx(model, variables, size=size, batch=batch)
        else:
            exported = export_model(model, variables, size=size, batch=batch, platforms=platforms)
            content, told = bytes(exported.serialize()), describe(exported)
        beside = write(options.out, content, told, model, card)
    megabytes = options.out.stat().st_size / 1e6
    print(
        f"{options.out} ({megabytes:.1f} MB) takes {told['input']['images']} on "
        f"{', '.join(told['platforms'])}; what it wants to be fed is in {beside}."
    )


def _check_out(out: Path, force: bool) -> None:
    for place in (out, out.with_name(f"{out.name}.json")):
        if place.is_dir():
            raise UserError(f"{place} is a folder, and a file is to go there.")
        check_output(place, force=force)
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} to write {out.name} into.")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out.parent} may not be written.")


def _size(text: str | None) -> tuple[int, int] | None:
    """Return the height and width, or None if they are symbolic or not given."""
    if text is None or text == SYMBOLIC:
        return None
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not SMALLEST_SIDE <= min(sides) <= max(sides) <= _MOST:
        raise UserError(
            f"--size={text} is no size: it takes pixels or HEIGHTxWIDTH, from {SMALLEST_SIDE} to "
            f"{_MOST}, or {SYMBOLIC}."
        )
    return sides


def _platforms(text: str | None) -> Sequence[str]:
    if text is None:
        return DEFAULT_PLATFORMS
    platforms = text.split(",")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(
                f"--platforms={text} has {platform!r}: it takes some of {','.join(PLATFORMS)}."
            )
    return platforms


def _batch(text: str | None) -> int | None:
    """Return the number of images per call, or None if it is symbolic or not given."""
    if text is None or text == SYMBOLIC:
        return None
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= _MOST:
        raise UserError(f"--batch={text} is no number from 1 to {_MOST}, nor {SYMBOLIC}.")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vvt_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a model folder, hf:// address or published .pth")
    parser.add_argument("--out", type=Path, required=True, help="FILE; FILE.json goes beside it")
    parser.add_argument(
        "--batch", help=f"images a call; default: {SYMBOLIC}, any number (in an ONNX file 1)"
    )
    parser.add_argument(
        "--size", help="pixels, HEIGHTxWIDTH or symbolic; default: that of the model's card"
    )
    parser.add_argument("--platforms", help=f"of StableHLO; default: {','.join(DEFAULT_PLATFORMS)}")
    parser.add_argument("--name", help="of the model, where a .pth doesn't tell")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the model"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
