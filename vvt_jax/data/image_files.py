"""Which files are images, how they are read, and which files of a folder are listed.

Every source, command and application takes its formats from here, so that what one of them reads
the others read too.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO

# Pillow loads a plugin when a format that it doesn't know is asked for, and then loads all of them
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

# Formats that hold pixels and that Pillow decodes by itself. It knows others, of which one runs a
# program (EPS), and others are drawings, containers or seldom used. A feature that Pillow may have
# been built without is named beside its format.
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
FORMATS: tuple[str, ...] = tuple(
    name
    for name, (feature, _) in _KNOWN.items()
    if name in Image.OPEN and (feature is None or features.check(feature))
)
SUFFIXES: tuple[str, ...] = tuple(suffix for name in FORMATS for suffix in _KNOWN[name][1])
MASK_FORMATS: tuple[str, ...] = ("PNG",)  # it loses nothing, and knows how many bits a pixel has
MASK_SUFFIXES: tuple[str, ...] = (".png",)

# What operating systems, file servers and archives leave beside a user's files
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
_LONGEST_SIDE = 2**16 - 1  # pixels; JPEG has no longer one
_MOST_NAMED = 5  # folders or kinds of file in a sentence


def is_junk(name: str) -> bool:
    """Whether a file or folder of that name is hidden or was not put there by a user."""
    return name.startswith(".") or name.lower() in _JUNK_FOLDERS | _JUNK_FILES


@dataclasses.dataclass
class LeftOut:
    """What was found in a folder and is not used.

    Attributes:
        suffixes: how many files there are with each suffix that no image has.
        folders: why folders are left out, by their paths.
        hidden: the number of hidden files with an image's suffix.
        others: whole sentences about anything else.
    """

    suffixes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    folders: dict[str, str] = dataclasses.field(default_factory=dict)
    hidden: int = 0
    others: list[str] = dataclasses.field(default_factory=list)

    def sentences(self, root: str) -> list[str]:
        """What to tell the user, in one sentence for each reason; none where all is used."""
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
    """Paths of the files below a folder, relative to it and parted by `/`.

    The files of a folder come first, in the order of their names, and then those of its
    sub-folders. Symbolic links are followed; a folder that is reached a second time, or that
    contains `root`, is not entered, so that links in a circle do no harm.

    Args:
        root: the folder, also in an object store.
        suffixes: in lower case, of the files that are wanted.
        left_out: takes a note of everything else.
        on_error: called for a folder that can't be listed; None: the error is raised.
        workdirs: also list what is in the workdirs of runs.
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
    """Takes a note of a folder for which `is_junk` is true."""
    left_out.folders[str(folder)] = "hidden, or made by a system and not by a user"


def is_workdir(folders: Sequence[str], files: Sequence[str]) -> bool:
    """Whether these are the contents of a run's folder, whose pictures are not data."""
    return "config.json" in files and ("checkpoints" in folders or "metrics.jsonl" in files)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def decode(file: str | os.PathLike | BinaryIO, told: str, *, upright: bool = True) -> Image.Image:
    """The RGB image in a file of one of `image_files.FORMATS`, transparent parts on white.

    Args:
        file: a path or an open file.
        told: how to name it.
        upright: turn it as its EXIF orientation says.

    Raises:
        BrokenImageError: it can't be decoded.
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
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise BrokenImageError(f"{told} can't be decoded: {why_broken(error, FORMATS)}.") from error


def why_broken(error: Exception, formats: Sequence[str]) -> str:
    """What Pillow's error says of an image, without the address of an object."""
    if isinstance(error, UnidentifiedImageError):
        *others, last = formats
        listed = f"{', '.join(others)} or {last}" if others else last
        return f"it is not an image of the format {listed}"
    reason = str(error).partition("\n")[0].rstrip(".")
    return ascii(reason)[1:-1][:200] if reason else type(error).__name__


def open_image(path: str | os.PathLike, limit: SizeLimit) -> BinaryIO:
    """The file of an image or a mask.

    Raises:
        BrokenImageError: it can't be read.
        DataError: nor can an object store's, which may well answer later.
    """
    try:
        return storage.open_file(path, limit)
    except OSError as error:
        kind = DataError if storage.is_remote(path) else BrokenImageError
        raise kind(f"{os.fspath(path)} can't be read: {error.strerror}.") from error


def check_sides(image: Image.Image, told: str) -> None:
    """Refuses an image before it is decoded, if it is a line of a length that no camera makes: each
    row of it takes memory, whatever its width.

    Raises:
        BrokenImageError: it is one.
    """
    if max(image.size) > _LONGEST_SIDE:
        raise BrokenImageError(
            f"{told} can't be used: An image of {image.width} x {image.height} pixels is too long "
            f"and narrow, since no side may have more than {_LONGEST_SIDE}."
        )
