"""Images in a folder and, in another one, a mask of the same name for each.

A split is a folder with `images/` (JPEG, PNG, WebP) and `masks/` (PNG with one channel or a
palette, as VOC's: each pixel is the number of its class, 255 is ignored). `classes.txt`, in the
source's folder, has the name of each class on a line, from number 0 on.
"""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vvt_jax import storage
from vvt_jax.data import folder, sources
from vvt_jax.data.segmentation import IGNORED
from vvt_jax.data.sources import BrokenImageError, DataError
from vvt_jax.data.splits import split_name

CLASSES, IMAGES, MASKS = "classes.txt", "images", "masks"


class _PairExamples:
    """Pairs of files, decoded when they are asked for."""

    def __init__(self, pairs: list[tuple[str, str]], num_classes: int):
        self._paths = np.array(pairs).reshape(-1, 2)  # quick to hand to worker processes
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, mask_path = (str(path) for path in self._paths[index])
        image = sources.decode(image_path, image_path, upright=True)
        mask = decode_mask(mask_path, mask_path, self._num_classes)
        if mask.shape != (image.height, image.width):
            raise BrokenImageError(
                f"{mask_path} has {mask.shape[1]}x{mask.shape[0]} pixels, but its image has "
                f"{image.width}x{image.height}."
            )
        return {"image": image, "label": mask}


def decode_mask(file: Any, told: str, num_classes: int) -> np.ndarray:
    """The class numbers in a PNG file, uint8 `[height, width]`.

    Args:
        file: a path or an open file.
        told: how to name it.
        num_classes: numbers from there on are refused, but for `IGNORED`.

    Raises:
        BrokenImageError: it can't be decoded, has several channels or numbers that are no class.
    """
    try:
        with PIL.Image.open(file) as image:
            mode, mask = image.mode, np.array(image)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise BrokenImageError(f"{told} can't be decoded: {reason}.") from error
    if mode not in ("L", "P", "1"):
        raise BrokenImageError(
            f"{told} has pixels of mode {mode}: a mask has one channel of 8 bits, or a palette."
        )
    mask = mask.astype(np.uint8)
    if (wrong := mask[(mask >= num_classes) & (mask != IGNORED)]).size:
        raise BrokenImageError(
            f"{told} has the class number {wrong[0]}, but there are {num_classes} classes."
        )
    return mask


def open_folder_segmentation(split: str, data_dir: str | None, cut: sources.Cut) -> sources.Source:
    """A split of a folder; see `sources.open_source`."""
    if not data_dir:
        raise DataError(
            "The source 'folder_segmentation' needs config.data.data_dir, the folder of "
            f"{IMAGES}/, {MASKS}/ and {CLASSES}."
        )
    if storage.is_remote(data_dir):
        raise DataError(f"{data_dir} can't be read: images with masks lie in a folder here.")
    root = Path(data_dir).expanduser()
    name = split_name(split)
    places = folder.split_folders(root)
    if name not in places:
        raise DataError(f"{root} has no split {name!r}: it has {', '.join(places)}.")
    try:
        lines = (root / CLASSES).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(
            f"{root / CLASSES} can't be read ({error.strerror}): it has the name of each class on "
            "a line, from number 0 on."
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not 0 < len(names) <= IGNORED:
        raise DataError(f"{root / CLASSES} has {len(names)} classes: there can be 1 to {IGNORED}.")
    pairs = _pairs(places[name])
    images = folder.names_in(root, [image for image, _ in pairs])
    chosen = cut(split, images, [0] * len(pairs)).tolist()  # an image has no class of its own
    return sources.Source(
        _PairExamples([pairs[i] for i in chosen], len(names)),
        names,
        "folder_segmentation",
        split,
        pixels=True,
        names=[images[i] for i in chosen],
    )


def _pairs(place: Path) -> list[tuple[str, str]]:
    listed = {}
    for part, suffixes in ((IMAGES, folder.SUFFIXES), (MASKS, (".png",))):
        try:
            listed[part] = {
                path.stem: str(path)
                for path in sorted((place / part).iterdir())
                if path.suffix.lower() in suffixes and not path.name.startswith(".")
            }
        except OSError as error:
            raise DataError(f"{place / part} can't be read: {error.strerror}.") from error
    images, masks = listed[IMAGES], listed[MASKS]
    if not images:
        raise DataError(f"{place / IMAGES} has no images.")
    if missing := [stem for stem in images if stem not in masks]:
        raise DataError(
            f"{place / MASKS} has no {missing[0]}.png: {len(missing)} of {len(images)} images "
            "lack their mask."
        )
    return [(image, masks[stem]) for stem, image in images.items()]
