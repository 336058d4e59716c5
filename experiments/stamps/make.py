"""Scenes of cut-outs on photographs, with the class of each pixel: a small real segmentation set.

    apt install tuxpaint-stamps-default && pip install scikit-image
    python -m experiments.stamps.make --out=FOLDER

The cut-outs are Tux Paint's stamps (their folder is the class, their alpha channel the mask), the
photographs those that scikit-image brings along. Neither is part of this repository: the stamps are
under the GPL. A stamp and a photograph belong to one split alone, so that nothing that is measured
was seen in training. The same command makes the same files.
"""

import argparse
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import PIL.Image

from vvt_jax.data.overlay import index_mask
from vvt_jax.data.sources.folder_segmentation import CLASSES, IMAGES, MASKS
from vvt_jax.system.errors import UserError

STAMPS = Path("/usr/share/tuxpaint/stamps")
SIDE = 96  # pixels of a scene
SCENES = {"train": 3000, "validation": 200, "test": 400}
STAMP_SHARES = (0.6, 0.8)  # of the stamps of a class: up to here train, up to here validation
# A class is one or more folders, with all below them.
FOLDERS = {
    "bird": ("animals/birds",),
    "fish": ("animals/fish",),
    "insect": ("animals/insects",),
    "mammal": ("animals/mammals",),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "house": ("town/houses",),
    "sign": ("town/roadsigns",),
    "vehicle": ("vehicles",),
    "coin": ("symbols/money",),
}
PHOTOGRAPHS = {
    "train": ("astronaut", "brick", "coffee", "grass", "hubble_deep_field", "moon", "rocket"),
    "validation": ("clock_motion", "gravel"),
    "test": ("camera", "motorcycle_left", "motorcycle_right"),  # the two show the same scene
}
_MOST_STAMPS = 4
_HEIGHT = (0.3, 0.75)  # of a stamp, of the scene's side
_OPAQUE = 128  # alpha from which on a pixel is the stamp's


def stamps_by_split(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """(class number, file) of each stamp, by split; background is class 0."""
    splits: dict[str, list[tuple[int, Path]]] = {name: [] for name in SCENES}
    for number, places in enumerate(FOLDERS.values(), 1):
        files = sorted(p for place in places for p in (folder / place).rglob("*.png"))
        files = [p for p in files if _has_cutout(p)]
        if len(files) < 5:
            raise UserError(
                f"{folder} has too few stamps in {', '.join(places)}: install Debian's package "
                "tuxpaint-stamps-default, or name the folder with --stamps."
            )
        order = np.random.default_rng(number).permutation(len(files))
        edges = [round(share * len(files)) for share in STAMP_SHARES]
        for split, part in zip(splits, np.split(order, edges), strict=True):
            splits[split] += [(number, files[i]) for i in sorted(part)]
    return splits


def _has_cutout(path: Path) -> bool:
    with PIL.Image.open(path) as image:
        if not image.has_transparency_data:
            return False
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return 0.02 < (alpha >= _OPAQUE).mean() < 0.98


@functools.cache
def _cutout(path: Path) -> PIL.Image.Image:
    """A stamp without its transparent border."""
    with PIL.Image.open(path) as file:
        stamp = file.convert("RGBA")
    return stamp.crop(stamp.getchannel("A").getbbox())


def compose(
    rng: np.random.Generator, photograph: PIL.Image.Image, stamps: list[tuple[int, Path]]
) -> tuple[PIL.Image.Image, np.ndarray]:
    """A scene and the class of each of its pixels: a random part of the photograph, and one to four
    stamps, each over those before it."""
    side = int(rng.integers(SIDE, min(photograph.size) + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
    scene = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    classes = sorted({number for number, _ in stamps})
    for _ in range(int(rng.integers(1, _MOST_STAMPS + 1))):
        kind = classes[int(rng.integers(len(classes)))]  # each class alike, whatever its stamps
        files = [path for number, path in stamps if number == kind]
        stamp = _cutout(files[int(rng.integers(len(files)))])
        ratio = SIDE * rng.uniform(*_HEIGHT) / max(stamp.size)
        size = (max(4, round(stamp.width * ratio)), max(4, round(stamp.height * ratio)))
        stamp = stamp.resize(size)
        x, y = (int(rng.integers(SIDE - length + 1)) for length in stamp.size)
        scene.paste(stamp, (x, y), stamp)
        opaque = np.asarray(stamp)[..., 3] >= _OPAQUE
        mask[y : y + stamp.height, x : x + stamp.width][opaque] = kind
    return scene, mask


def make(out: Path, stamps: Path, photographs: Path) -> None:
    """Writes the splits as `folder_segmentation` reads them."""
    for number, (split, cutouts) in enumerate(stamps_by_split(stamps).items()):
        places = []
        for name in PHOTOGRAPHS[split]:
            found = sorted(photographs.glob(f"{name}.*"))
            if not found:
                raise UserError(
                    f"{photographs} has no {name}: pip install scikit-image, or name the folder of "
                    "its photographs with --photographs."
                )
            with PIL.Image.open(found[0]) as file:
                places.append(file.convert("RGB"))
        for part in (IMAGES, MASKS):
            (out / split / part).mkdir(parents=True, exist_ok=True)
        for i in range(SCENES[split]):
            rng = np.random.default_rng((number, i))
            scene, mask = compose(rng, places[int(rng.integers(len(places)))], cutouts)
            scene.save(out / split / IMAGES / f"{i:04}.png")
            index_mask(mask, len(FOLDERS) + 1).save(out / split / MASKS / f"{i:04}.png")
        print(f"{split}: {SCENES[split]} scenes of {len(cutouts)} stamps.")
    (out / CLASSES).write_text("\n".join(["background", *FOLDERS]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.stamps.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stamps", type=Path, default=STAMPS)
    parser.add_argument("--photographs", type=Path, help="default: scikit-image's own")
    options = parser.parse_args()
    try:
        photographs = options.photographs
        if photographs is None:
            found = importlib.util.find_spec("skimage")
            if found is None or found.origin is None:
                raise UserError("scikit-image is not installed: pip install scikit-image.")
            photographs = Path(found.origin).parent / "data"
        make(options.out, options.stamps, photographs)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
