"""Image formats, reading image files, and listing the files of a folder.

Every source, command and application takes its formats from here, so they all read the same files.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO

# Import the plugins here: asked for a format that it does not know yet, Pillow would load all of
# its plugins
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
    features,
)

from vvt_jax.data import preprocess
from vvt_jax.data.examples import BrokenImageError, DataError
from vvt_jax.system import storage
from vvt_jax.system.storage import AnyPath, SizeLimit

# Formats that store pixels and that Pillow decodes without other programs. It also supports EPS,
# which runs a program, and formats that are drawings, containers or rarely used. Next to each
# format is the feature that it needs, if Pillow may have been built without that feature.
_KNOWN: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "JPEG": ("jpg", (".jpg", ".jpeg", ".jpe", ".jfif")),
    "PNG": ("zlib", (".png", ".apng")),
    "WEBP": ("webp", (".webp",)),
    "BMP": (None, (".bmp",)),
    "TIFF": (None, (".tif", ".tiff")),
    "GIF": (None, (".gif",)),
    "PPM": (None, (".ppm", ".pgm", ".pbm", ".pnm")),
    "AVIF": ("avif", (".avif",)),
    "JPEG2000": ("jpg_2000", (".jp2", ".j2k")),
}
# Pillow scales the values of grey PNG files with 2 and 4 bits to 0..255 by these factors
_GREY_SCALES = {"L;2": 85, "L;4": 17}
FORMATS: tuple[str, ...] = tuple(
    name
    for name, (feature, _) in _KNOWN.items()
    if name in Image.OPEN and (feature is None or features.check(feature))
)
SUFFIXES: tuple[str, ...] = tuple(suffix for name in FORMATS for suffix in _KNOWN[name][1])
MASK_FORMATS: tuple[str, ...] = ("PNG",)  # lossless, with a known number of bits per pixel
MASK_SUFFIXES: tuple[str, ...] = (".png",)

# Folders and files that operating systems, file servers and archives add to a user's own
_JUNK_FOLDERS = {
    "__macosx",
    "lost+found",
    "@eadir",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "__pycache__",
}
_JUNK_FILES = {"thumbs.db", "desktop.ini"}
_LONGEST_SIDE = 2**16 - 1  # pixels; the limit of JPEG
_MOST_NAMED = 5  # folders or kinds of file listed in a sentence


def is_junk(name: str) -> bool:
    """Return whether a file or folder of that name is hidden or was not created by a user."""
    return name.startswith(".") or name.lower() in _JUNK_FOLDERS | _JUNK_FILES


@dataclasses.dataclass
class LeftOut:
    """The contents of a folder that are not used.

    Attributes:
        suffixes: the number of files with each suffix that is not used for images.
        folders: the reason for which each folder is left out, by its path.
        hidden: the number of hidden files with the suffix of an image.
        others: complete sentences about anything else.
    """

    suffixes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    folders: dict[str, str] = dataclasses.field(default_factory=dict)
    hidden: int = 0
    others: list[str] = dataclasses.field(default_factory=list)

    def sentences(self, root: str) -> list[str]:
        """Return a sentence for the user about each reason; none if everything is used."""
        told = []
        if self.suffixes:
            kinds = [f"{count} {suffix}" for suffix, count in self.suffixes.most_common()]
            told.append(
                f"Left out of {root}: {self.suffixes.total()} files without the suffix of an image "
                f"({_some(kinds)})."
            )
        if self.hidden:
            told.append(f"Left out of {root}: {self.hidden} hidden files.")
        by_reason: dict[str, list[str]] = {}
        for folder, reason in sorted(self.folders.items()):
            by_reason.setdefault(reason, []).append(folder)
        for reason, folders in by_reason.items():
            noun = "folder" if len(folders) == 1 else "folders"
            told.append(f"Left out: the {noun} {_some(folders)} ({reason}).")
        return told + self.others


def _some(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NAMED
    return ", ".join(texts[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def list_files(
    root: AnyPath,
    suffixes: Sequence[str] = SUFFIXES,
    left_out: LeftOut | None = None,
    on_error: Callable[[OSError], None] | None = None,
    *,
    workdirs: bool = False,
) -> Iterator[str]:
    """List the files below a folder as paths relative to it, separated by `/`.

    The files of each folder come first, in the order of their names, followed by those of its
    sub-folders. Symbolic links are followed. A folder that is reached a second time, or that
    contains `root`, is not entered, so circular links do no harm.

    Args:
        root: the folder, which may be in an object store.
        suffixes: the suffixes of the files to list, in lower case.
        left_out: a record to which everything else is added.
        on_error: a function to call with the error if a folder can't be listed; None raises it.
        workdirs: whether to list the contents of the workdirs of runs too.
    """
    left_out = LeftOut() if left_out is None else left_out
    entered: set[tuple[int, int]] = set()
    if not storage.is_remote(root):
        place = os.path.realpath(root)
        while place != (parent := os.path.dirname(place)):
            place = parent
            entered.add(_identity(place))
    waiting = [""]
    while waiting:
        below = waiting.pop()
        folder = root / below if below else root
        try:
            if not storage.is_remote(folder):
                if (identity := _identity(os.fspath(folder))) in entered:
                    left_out.folders[str(folder)] = "a link to a folder that is used already"
                    continue
                entered.add(identity)
            folders, files = storage.list_folder(folder)
        except OSError as error:
            if on_error is None:
                raise
            on_error(error if error.filename else OSError(error.errno, error.strerror, str(folder)))
            continue
        if below and not workdirs and is_workdir(folders, files):
            left_out.folders[str(folder)] = "the workdir of a run"
            continue
        for name in files:
            if not name.lower().endswith(tuple(suffixes)):
                if not is_junk(name):
                    left_out.suffixes[PurePosixPath(name).suffix.lower() or "without any"] += 1
            elif is_junk(name):
                left_out.hidden += 1
            else:
                yield f"{below}/{name}" if below else name
        deeper = []
        for name in folders:
            if is_junk(name):
                note_junk(left_out, folder / name)
            else:
                deeper.append(f"{below}/{name}" if below else name)
        waiting += reversed(deeper)


def note_junk(left_out: LeftOut, folder: AnyPath) -> None:
    """Add a folder for which `is_junk` is true to the record of what is left out."""
    left_out.folders[str(folder)] = "hidden, or made by a system and not by a user"


def is_workdir(folders: Sequence[str], files: Sequence[str]) -> bool:
    """Return whether these are the contents of a run's folder, whose images are not data."""
    run = "config.json" in files and ("checkpoints" in folders or "metrics.jsonl" in files)
    return run or "metrics.json" in files  # an evaluation writes this file next to its images


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def decode(file: str | os.PathLike | BinaryIO, told: str, *, upright: bool = True) -> Image.Image:
    """Decode an image file in one of `image_files.FORMATS` to RGB, with transparent parts on white.

    Args:
        file: a path or an open file.
        told: what to call the file in error messages.
        upright: whether to turn the image as its EXIF orientation says.

    Raises:
        BrokenImageError: if the image can't be decoded.
    """
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(file, str | os.PathLike):
                file = stack.enter_context(open_image(file, SizeLimit.IMAGE))
            image = stack.enter_context(Image.open(file, formats=FORMATS))
            check_sides(image, told)
            image.load()
            return preprocess.to_rgb(image, upright=upright)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise BrokenImageError(f"{told} can't be decoded: {why_broken(error, FORMATS)}.") from error


def why_broken(error: Exception, formats: Sequence[str]) -> str:
    """Return what Pillow's error says about an image, without the memory address of an object."""
    if isinstance(error, UnidentifiedImageError):
        *others, last = formats
        listed = f"{', '.join(others)} or {last}" if others else last
        return f"it is not an image of the format {listed}"
    reason = str(error).partition("\n")[0].rstrip(".")
    return ascii(reason)[1:-1][:200] if reason else type(error).__name__


def open_image(path: str | os.PathLike, limit: SizeLimit) -> BinaryIO:
    """Open the file of an image or a mask.

    Raises:
        BrokenImageError: if the file can't be read.
        DataError: if the file is in an object store and can't be read, which may be temporary.
    """
    try:
        return storage.open_file(path, limit)
    except OSError as error:
        kind = DataError if storage.is_remote(path) else BrokenImageError
        raise kind(f"{os.fspath(path)} can't be read: {error.strerror}.") from error


def grey_scale(image: Image.Image) -> int:
    """Return the factor by which Pillow will multiply the values of a grey PNG file.

    Call it before the image is loaded.
    """
    tiles = getattr(image, "tile", None)
    return _GREY_SCALES.get(str(tiles[0].args), 1) if tiles else 1


def check_sides(image: Image.Image, told: str) -> None:
    """Check, before an image is decoded, that neither side is longer than any camera would make it.

    Every row of an image takes memory, however narrow the image is.

    Raises:
        BrokenImageError: if a side is too long.
    """
    if max(image.size) > _LONGEST_SIDE:
        raise BrokenImageError(
            f"{told} can't be used: An image of {image.width} x {image.height} pixels is too long "
            f"and narrow, since no side may have more than {_LONGEST_SIDE}."
        )
