"""Images in one folder, and a mask of the same name for each image in another.

A split is a folder with `images/` (see `image_files.FORMATS`) and `masks/`. Masks are PNG files
with one grey channel or a palette, like VOC's. The stored value of each pixel is the number of its
class, whatever the number of bits, and 255 is ignored. Both folders may have sub-folders of the
same names. `classes.txt`, in the source's folder, contains the name of each class on a line of its
own, starting with class 0, without blank lines.

A mask belongs to its image as it is displayed: cameras may store a photo on its side, together with
an EXIF orientation, but it is labelled upright. A mask that has an orientation of its own is turned
accordingly.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vvt_jax.data import preprocess
from vvt_jax.data.examples import BrokenImageError, Cut, DataError, Source
from vvt_jax.data.image_files import (
    FORMATS,
    MASK_FORMATS,
    MASK_SUFFIXES,
    SUFFIXES,
    LeftOut,
    check_sides,
    decode,
    grey_scale,
    list_files,
    open_image,
    why_broken,
)
from vvt_jax.data.pixel_labels import IGNORED
from vvt_jax.data.sources import folder
from vvt_jax.data.splits import split_name
from vvt_jax.system import storage
from vvt_jax.system.storage import SizeLimit

CLASSES, IMAGES, MASKS = "classes.txt", "images", "masks"


class _PairExamples:
    """Pairs of image and mask files that are decoded on access."""

    def __init__(self, pairs: list[tuple[str, str]], num_classes: int, upright: bool):
        self._paths = np.array(pairs).reshape(-1, 2)  # fast to pass to worker processes
        self._num_classes = num_classes
        self._upright = upright

    def __len__(self) -> int:
        return len(self._paths)

    def describe(self, index: int) -> str:
        """Return the path of the image's file."""
        return str(self._paths[index][0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, mask_path = (str(path) for path in self._paths[index])
        image = decode(image_path, image_path, upright=self._upright)
        mask = self.mask(index)
        if mask.shape != (image.height, image.width):
            raise BrokenImageError(
                f"{mask_path} has {mask.shape[1]}x{mask.shape[0]} pixels, but its image has "
                f"{image.width}x{image.height}{self._turned(image_path)}."
            )
        return {"image": image, "label": mask}

    def mask(self, index: int) -> np.ndarray:
        """Return only the mask of an example, uint8 `[height, width]`."""
        path = str(self._paths[index][1])
        return decode_mask(path, path, self._num_classes, upright=self._upright)

    def _turned(self, image_path: str) -> str:
        with (
            open_image(image_path, SizeLimit.IMAGE) as file,
            PIL.Image.open(file, formats=FORMATS) as image,
        ):
            if not self._upright or preprocess.orientation(image) == 1:
                return ""
        return " once it is turned as its EXIF orientation says, and masks belong to that"


def decode_mask(file: Any, told: str, num_classes: int, *, upright: bool = True) -> np.ndarray:
    """Decode the class numbers in a PNG file, uint8 `[height, width]`.

    Args:
        file: a path or an open file.
        told: what to call the mask in error messages.
        num_classes: the number of classes. All class numbers must be smaller, except `IGNORED`.
        upright: whether to turn the mask as its own EXIF orientation says, if it has one.

    Raises:
        BrokenImageError: if the mask can't be decoded, has several channels, or contains numbers
            that are not classes.
    """
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(file, str | os.PathLike):
                file = stack.enter_context(open_image(file, SizeLimit.MASK))
            image = stack.enter_context(PIL.Image.open(file, formats=MASK_FORMATS))
            check_sides(image, told)
            scale = grey_scale(image)
            mode, mask = image.mode, np.array(preprocess.turn_upright(image) if upright else image)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind
        reason = why_broken(error, MASK_FORMATS)
        raise BrokenImageError(f"{told} can't be decoded: {reason}.") from error
    if mode not in ("L", "P", "1"):
        raise BrokenImageError(
            f"{told} has pixels of mode {mode}: a mask has one channel of 8 bits, or a palette."
        )
    mask = mask.astype(np.uint8) // np.uint8(scale)
    if (wrong := mask[(mask >= num_classes) & (mask != IGNORED)]).size:
        raise BrokenImageError(
            f"{told} has the class number {wrong[0]}, but there are {num_classes} classes."
        )
    return mask


def open_folder_segmentation(
    split: str, data_dir: str | None, cut: Cut, *, upright: bool = True
) -> Source:
    """Open a split of a folder; see `sources.open_source`."""
    if not data_dir:
        raise DataError(
            "The source 'folder_segmentation' needs config.data.data_dir, the folder of "
            f"{IMAGES}/, {MASKS}/ and {CLASSES}."
        )
    if storage.is_remote(data_dir):
        raise DataError(f"{data_dir} can't be read: images with masks lie in a folder here.")
    root = Path(data_dir).expanduser()
    name = split_name(split)
    # Sub-folders are not classes here, so `train` can only be a split
    places = {"train": root} if (root / IMAGES).is_dir() else folder.named_splits(root)
    if name not in places:
        raise DataError(f"{root} has no split {name!r}: it has {', '.join(places)}.")
    try:
        text = storage.read_text(root / CLASSES, SizeLimit.LABELS)
        lines = text.removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{root / CLASSES} can't be read: it is not UTF-8 text.") from error
    except OSError as error:
        raise DataError(
            f"{root / CLASSES} can't be read ({error.strerror}): it has the name of each class on "
            "a line, from number 0 on."
        ) from error
    names = _class_names(lines, root / CLASSES)
    if not 0 < len(names) <= IGNORED:
        raise DataError(f"{root / CLASSES} has {len(names)} classes: there can be 1 to {IGNORED}.")
    left_out = LeftOut()
    pairs = _pairs(places[name], left_out)
    images = folder.names_in(root, [image for image, _ in pairs])
    chosen = cut(split, images, [0] * len(pairs)).tolist()  # an image has no class of its own
    return Source(
        _PairExamples([pairs[i] for i in chosen], len(names), upright),
        names,
        "folder_segmentation",
        split,
        pixels=True,
        left_out=tuple(left_out.sentences(str(places[name]))),
        names=[images[i] for i in chosen],
    )


def _class_names(lines: list[str], path: Path) -> tuple[str, ...]:
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise DataError(
            f"{path} has a blank line {names.index('') + 1}, which would be the name of class "
            f"{names.index('')}: write a name there, or remove the line."
        )
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"{path} has the class {twice[0]!r} twice: give each class its own name.")
    return tuple(names)


def _pairs(place: Path, left_out: LeftOut) -> list[tuple[str, str]]:
    listed: dict[str, dict[str, str]] = {}
    for part, suffixes in ((IMAGES, SUFFIXES), (MASKS, MASK_SUFFIXES)):
        found = listed[part] = {}
        try:
            for file in list_files(place / part, suffixes, left_out):
                stem, path = file.rpartition(".")[0], str(place / part / file)
                if stem in found:
                    raise DataError(
                        f"{found[stem]} and {path} have the same name but for the suffix, so that "
                        "one mask would be for both: rename or remove one of them."
                    )
                found[stem] = path
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
    if spare := len(masks) - len(images):
        left_out.others.append(f"Left out of {place / MASKS}: {spare} masks without an image.")
    return [(image, masks[stem]) for stem, image in images.items()]
