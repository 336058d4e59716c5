"""ADE20K's 150 classes for scene parsing (ADEChallengeData2016), as a tfds builder.

tfds's own `scene_parse150` has other annotations (instances). In the archive's masks, classes are
numbered from 1, and 0 means none of them. Here they are numbered from 0, and 255, which is ignored,
means none of them. The builder does not need TensorFlow.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from vvt_jax.data.examples import DataError
from vvt_jax.data.image_files import MASK_FORMATS, check_sides, grey_scale
from vvt_jax.data.pixel_labels import IGNORED
from vvt_jax.system import storage
from vvt_jax.system.storage import SizeLimit

NAME = "ade20k"
URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
_ROOT = "ADEChallengeData2016"
# The errors that zipfile and zlib raise for a damaged file
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error)
_NAMES = "objectInfo150.txt"  # a header, then tab-separated index, ratio, train, val, name


class Files:
    """The files of the archive, or of the folder extracted from it, by their names inside it.

    Raises:
        DataError: if neither exists, or the archive can't be read.
    """

    def __init__(self, place: Path):
        self._archive = None
        self._folder = place / _ROOT if (place / _ROOT).is_dir() else place
        archive = place if place.is_file() else place / f"{_ROOT}.zip"
        if not (self._folder / _NAMES).exists():
            if not archive.exists():
                raise DataError(
                    f"{place} has neither {_ROOT}.zip nor its folder: download {URL}, and name "
                    "where it lies with --manual_dir."
                )
            try:
                storage.open_file(archive, None).close()  # zipfile would wait forever for a pipe
                self._archive = zipfile.ZipFile(archive)
            except OSError as error:
                raise DataError(f"{archive} can't be read: {error.strerror}.") from error
            except _ZIP_ERRORS as error:
                raise DataError(f"{archive} can't be read: {error}.") from error
        self.told = str(archive if self._archive else self._folder)

    def read(self, name: str) -> bytes:
        """Read the content of a file, such as `images/training/ADE_train_00000001.jpg`."""
        try:
            if self._archive:
                entry = self._archive.getinfo(f"{_ROOT}/{name}")
                with self._archive.open(entry) as file:
                    content = file.read(SizeLimit.IMAGE + 1)  # its stated size may be wrong
                if len(content) > SizeLimit.IMAGE:
                    raise DataError(f"{name} in {self.told} is far too large.")
                return content
            return storage.read_bytes(self._folder / name, SizeLimit.IMAGE)
        except (KeyError, OSError, *_ZIP_ERRORS) as error:
            raise DataError(f"{self.told} has no readable {name}.") from error

    def stems(self, folder: str, suffix: str) -> list[str]:
        """Return the sorted names, without suffix, of the files that have that suffix."""
        if self._archive:
            paths = [PurePosixPath(name) for name in self._archive.namelist()]
            found = [p for p in paths if p.parent == PurePosixPath(_ROOT) / folder]
        else:
            found = [PurePosixPath(p) for p in (self._folder / folder).glob("*")]
        return sorted(p.stem for p in found if p.suffix == suffix)


def class_names(files: Files) -> list[str]:
    """Return the first word for each of the classes, in the order of their numbers.

    If two classes share their first word, the second one's name includes its other words too.
    """
    try:
        lines = files.read(_NAMES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{_NAMES} in {files.told} is not UTF-8 text.") from error
    rows = [line.split("\t") for line in lines[1:] if line]
    if [row[0] for row in rows] != [str(i + 1) for i in range(len(rows))] or not rows:
        raise DataError(f"{_NAMES} in {files.told} does not number its classes from 1 on.")
    names: list[str] = []
    for row in rows:
        words = row[-1].strip()
        first = words.partition(",")[0]
        names.append(words.replace(",", "") if first in names else first)
    return names


class Ade20k(tfds.core.GeneratorBasedBuilder):
    """20,210 training and 2,000 validation images, each pixel one of 150 classes, or 255."""

    VERSION = tfds.core.Version("1.0.0")
    name = NAME

    def __init__(self, *, manual_dir: Path, **options: Any):
        """Read from `manual_dir`: ADEChallengeData2016.zip, its folder, or a folder of either."""
        self._files = Files(manual_dir)
        self._names = class_names(self._files)
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage="http://sceneparsing.csail.mit.edu",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "segmentation": tfds.features.LabeledImage(
                        labels=self._names, shape=(None, None, 1), encoding_format="png"
                    ),
                    "file_name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {
            "train": self._generate_examples("training"),
            "validation": self._generate_examples("validation"),
        }

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        stems = self._files.stems(f"images/{split}", ".jpg")
        if not stems:
            raise DataError(f"{self._files.told} has no images/{split}.")
        for index, stem in enumerate(stems):
            mask = self._reduced(f"annotations/{split}/{stem}.png")
            image = io.BytesIO(self._files.read(f"images/{split}/{stem}.jpg"))
            yield index, {"image": image, "segmentation": mask, "file_name": f"{stem}.jpg"}

    def _reduced(self, name: str) -> io.BytesIO:
        """Return a mask in which classes are numbered from 0 and `IGNORED` means none of them."""
        told = f"{name} in {self._files.told}"
        try:
            with PIL.Image.open(io.BytesIO(self._files.read(name)), formats=MASK_FORMATS) as image:
                check_sides(image, told)
                scale = grey_scale(image)
                mask = np.array(image) // scale
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise errors of any kind
            raise DataError(f"{told} can't be decoded as a PNG file.") from error
        if mask.ndim != 2 or mask.max(initial=0) > len(self._names):
            raise DataError(f"{told} is not a mask of these classes.")
        reduced = np.where(mask == 0, IGNORED, mask - 1).astype(np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(reduced).save(file, "PNG")
        file.seek(0)
        return file
