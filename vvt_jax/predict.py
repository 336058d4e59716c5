"""Predict the classes of images or of their pixels, with a model folder or published weights.

    python -m vvt_jax.predict --model=runs/digits/model image.png more/ 'photos/*.jpg'
    find photos -name '*.jpg' | python -m vvt_jax.predict --model=FOLDER --format=csv -
    python -m vvt_jax.predict --model=SEGMENTER --masks=masks photos/

For a segmenter, the output is the classes that cover the largest shares of an image's pixels;
--masks=DIR writes the class of every pixel, as a coloured overlay and as a mask of class numbers.

Images are files (JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, AVIF, JPEG 2000), folders (searched
recursively), patterns, or - for a list on standard input with one path per line. An image that
can't be used is reported on standard error and the others are still processed; the exit status is
then 1.
"""

import argparse
import dataclasses
import glob
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # before jax is imported: the restart would import it twice
    from vvt_jax.system.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import numpy as np
import PIL.Image

from vvt_jax.data.examples import BrokenImageError
from vvt_jax.data.image_files import SUFFIXES, list_files
from vvt_jax.inference.answers import FORMATTERS, Areas, escaped
from vvt_jax.system import storage
from vvt_jax.system.errors import UserError
from vvt_jax.system.storage import SizeLimit

if TYPE_CHECKING:
    from vvt_jax.inference.predictor import Predictor


def read_labels(path: str | os.PathLike) -> list[str]:
    """Read class names from a text file, one per line in the order of the labels.

    Raises:
        UserError: the file can't be read, is empty, is not UTF-8 text, or has a line that is not a
            name.
    """
    try:
        text = storage.read_text(path, SizeLimit.LABELS)
        names = text.removeprefix("\ufeff").splitlines()
    except OSError as error:
        raise UserError(
            f"{path} is no file of class names: it can't be read ({error.strerror})."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no file of class names: it is not UTF-8 text.") from error
    if not names:
        raise UserError(f"{path} is no file of class names: it is empty.")
    for number, name in enumerate(names, 1):
        if not name.strip() or not name.isprintable():
            raise UserError(f"{path} is no file of class names: line {number} is no name.")
    return names


@dataclasses.dataclass(frozen=True)
class _Found:
    """An image file, and its path relative to the argument that led to it."""

    path: str
    name: str


def find_images(arguments: Iterable[str], complain: Callable[[str], None]) -> Iterator[_Found]:
    """Yield the image files that the arguments name, with a complaint for each that names none."""
    for argument in arguments:
        if argument == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            found: Iterator[_Found] = find_images((line for line in lines if line), complain)
            told = "The list on standard input names no images."
        elif os.path.isdir(argument):
            found = _below(argument, complain)
            kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
            told = f"{argument} has no images ({kinds})."
        elif os.path.lexists(argument) or not glob.has_magic(argument):
            if not os.path.exists(argument):
                complain(f"{argument} does not exist.")
            else:
                yield _Found(argument, os.path.basename(argument))
            continue
        else:
            matches = sorted(glob.glob(argument, recursive=True))
            found = find_images(matches, complain)
            told = f"{argument} matches nothing." if not matches else f"{argument} has no images."
        first = next(found, None)
        if first is None:
            complain(told)
            continue
        yield first
        yield from found


def _below(root: str, complain: Callable[[str], None]) -> Iterator[_Found]:
    def refuse(error: OSError) -> None:
        complain(f"{error.filename} can't be read: {error.strerror}.")

    for name in list_files(Path(root), on_error=refuse, workdirs=True):
        yield _Found(os.path.join(root, name), name)


class Pictures:
    """Output pictures in a folder, named after their images with one ending per kind of picture.

    Images from a folder keep their sub-folders; if two images have the same name, the second
    becomes `NAME-2.png`.

    Args:
        flag: the command-line flag that gave the folder, for error messages.
        root: the folder, which is created if it is missing.
        found: the images that get pictures.
        endings: the file name endings, one for each kind of picture that an image gets.
        force: replace files that exist.

    Raises:
        UserError: a file to be written exists and `force` is not set, or is one of the images to be
            read, or the folder can't be created.
    """

    def __init__(
        self, flag: str, root: Path, found: Sequence[_Found], endings: Sequence[str], *, force: bool
    ):
        self._flag = flag
        self._force = force
        self._written: set[Path] = set()
        taken: set[Path] = set()
        self._paths: dict[str, list[Path]] = {}
        inputs = {os.path.realpath(image.path) for image in found}
        for image in found:
            if image.path in self._paths:
                continue
            for number in itertools.count(1):
                stem = image.name if number == 1 else f"{image.name}-{number}"
                paths = [root / (stem + ending) for ending in endings]
                if taken.isdisjoint(paths):
                    break
            taken.update(paths)
            self._paths[image.path] = paths
            for path in paths:
                if os.path.realpath(path) in inputs:
                    raise UserError(f"{path} is an image to be read: give another {flag}.")
                self._check(path)
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK | os.X_OK):
                raise PermissionError(None, "Permission denied")
        except OSError as error:
            raise UserError(f"{flag}={root} can't be a folder: {error.strerror}.") from error

    def _check(self, path: Path) -> None:
        if os.path.lexists(path) and not self._force:
            raise UserError(f"{path} exists: give --force to replace it, or another {self._flag}.")

    def write(self, image: str, *pictures: PIL.Image.Image) -> None:
        """Write the pictures of one image, one per ending; each file is complete or absent."""
        for path, picture in zip(self._paths[image], pictures, strict=True):
            self._write(path, picture)

    def _write(self, path: Path, picture: PIL.Image.Image) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        content = io.BytesIO()
        picture.save(content, "PNG")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content.getvalue())
            if path not in self._written:  # the same image may be listed twice
                self._check(path)
            temporary.replace(path)
            self._written.add(path)
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}.") from error
        finally:
            temporary.unlink(missing_ok=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 999999")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vvt_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a model folder, or published weights")
    parser.add_argument("--name", help="of the model, for weights that don't say it: vvt_small")
    parser.add_argument("--top", type=_positive, default=5, help="classes an image; default 5")
    parser.add_argument(
        "--batch", type=_positive, default=16, help="images a call; default 16 (a segmenter: 1)"
    )
    parser.add_argument("--format", choices=FORMATTERS, default="table", help="default: table")
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--heatmap", metavar="DIR", type=Path, help="writes where each image's best class is seen"
    )
    pictures.add_argument(
        "--masks", metavar="DIR", type=Path, help="writes the class of every pixel, of a segmenter"
    )
    parser.add_argument(
        "--stage", type=int, choices=range(1, 5), help="of the heat maps; default: one that shows"
    )
    parser.add_argument("--force", action="store_true", help="replace pictures that are there")
    parser.add_argument("images", nargs="+", help="files, folders, patterns, or - for a list")
    return parser.parse_args(arguments)


def _predict(options: argparse.Namespace, complain: Callable[[str], None]) -> None:
    class_names = None if options.labels is None else read_labels(options.labels)
    found: Iterable[_Found] = find_images(options.images, complain)
    pictures = None
    wants_pictures = options.heatmap is not None or options.masks is not None
    if wants_pictures or "-" not in options.images:
        found = list(found)  # a list on standard input may have no end
        if not found:
            return
        # A power of two, to limit the number of programs in jax's compilation cache
        options.batch = min(options.batch, 1 << (len(found) - 1).bit_length())
        if options.heatmap is not None:
            pictures = Pictures("--heatmap", options.heatmap, found, [".png"], force=options.force)
        if options.masks is not None:
            endings = (".overlay.png", ".mask.png")
            pictures = Pictures("--masks", options.masks, found, endings, force=options.force)
    # These imports take seconds, so they come after the quick checks
    from vvt_jax.inference import explain
    from vvt_jax.inference.predictor import Predictor
    from vvt_jax.models import Segmenter

    if options.heatmap is not None:
        explain.check_matplotlib()
    try:
        predictor = Predictor(
            options.model, options.name, batch_size=options.batch, class_names=class_names
        )
    except UserError:
        raise
    except ValueError as error:  # a wrong model name or field
        raise UserError(str(error)) from error
    paths = (image.path for image in found)
    if not isinstance(predictor.model, Segmenter):
        if options.masks is not None:
            raise UserError(
                "The model classifies images, not pixels: --masks is for a segmenter, --heatmap "
                "shows where a classifier looks."
            )
        _classify(predictor, paths, pictures, options, complain)
        return
    if options.heatmap is not None or options.stage is not None:
        raise UserError(
            "The model labels pixels: in place of --heatmap and --stage, --masks=DIR shows them."
        )
    _segment(predictor, paths, pictures, options, complain)


def _classify(
    predictor: "Predictor",
    paths: Iterable[str],
    heat_maps: Pictures | None,
    options: argparse.Namespace,
    complain: Callable[[str], None],
) -> None:
    from vvt_jax.inference import explain
    from vvt_jax.inference.batches import batched
    from vvt_jax.inference.predictor import logits_of

    predictor.check_classifier()
    class_map = explain.class_map_of(options.stage or explain.default_stage(predictor))
    if options.format == "csv":
        print("image,rank,label,name,probability")
    for batch in batched(predictor.read(paths), predictor.batch_size):
        sound = []
        for path, pixels in batch:
            if isinstance(pixels, BrokenImageError):
                complain(str(pixels))
            else:
                sound.append((str(path), pixels))
        if not sound:
            continue
        pixels = np.stack([pixels for _, pixels in sound])
        if heat_maps is None:
            logits, maps = predictor.run(logits_of, pixels), None
        else:
            logits, maps = predictor.run(class_map, pixels)
        for i, (path, image) in enumerate(sound):
            prediction = predictor.describe(logits[i], options.top)
            print(FORMATTERS[options.format](path, prediction), flush=True)
            if heat_maps is not None and maps is not None:
                heat_maps.write(path, explain.overlay(image, maps[i]))


def _segment(
    predictor: "Predictor",
    paths: Iterable[str],
    masks: Pictures | None,
    options: argparse.Namespace,
    complain: Callable[[str], None],
) -> None:
    from vvt_jax.data import overlay
    from vvt_jax.inference.batches import read_upright
    from vvt_jax.inference.segment import segment_image

    if options.format == "csv":
        print("image,rank,label,name,share")
    count = predictor.model.num_classes
    for path in paths:
        try:
            image = read_upright(path)
            classes = segment_image(predictor.model, predictor.variables, predictor.card, image)
        except BrokenImageError as error:
            complain(str(error))
            continue
        print(FORMATTERS[options.format](path, _areas(classes, predictor, options.top)), flush=True)
        if masks is not None:
            tinted = overlay.draw_overlay(image, classes, count)
            masks.write(path, tinted, overlay.index_mask(classes, count))


def _areas(classes: np.ndarray, predictor: "Predictor", top: int) -> Areas:
    shares = np.bincount(classes.ravel(), minlength=predictor.model.num_classes) / classes.size
    order = [i for i in np.argsort(-shares, kind="stable")[:top].tolist() if shares[i]]
    return Areas(
        labels=tuple(order),
        names=tuple(predictor.class_names[i] for i in order),
        shares=tuple(float(shares[i]) for i in order),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the module docstring describes."""
    options = _parse(arguments)
    complaints = 0

    def complain(sentence: str) -> None:
        nonlocal complaints
        complaints += 1
        print(f"error: {escaped(sentence)}", file=sys.stderr, flush=True)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are printed byte for byte
    # Only the warning: Pillow raises an error at twice that size
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
    try:
        _predict(options, complain)
    except UserError as error:
        complain(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
