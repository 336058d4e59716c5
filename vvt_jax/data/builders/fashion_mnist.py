"""Fashion-MNIST from its four original files, as a tfds builder that does not need TensorFlow.

tfds's own builder downloads the files from elsewhere and expects checksums that differ from those
of the packaged files.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from vvt_jax.data.examples import DataError
from vvt_jax.system import storage
from vvt_jax.system.storage import SizeLimit

_LARGEST = 2**26  # bytes of an unpacked file; the largest has 47,040,016
# The folder in which Debian's package dataset-fashion-mnist installs the files.
PACKAGED = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read the uint8 array of an idx file, `NAME.gz` or `NAME` in the folder.

    The format consists of two zero bytes, an 8 for uint8, the number of dimensions, each dimension
    as a 32-bit big-endian number, and the elements.

    Raises:
        DataError: if the file is missing, damaged, or not an idx file of uint8.
    """
    try:
        try:
            packed = storage.open_file(folder / f"{name}.gz", SizeLimit.ARRAYS)
            with packed, gzip.open(packed) as file:
                content = file.read(_LARGEST)  # even a short file may unpack to any length
        except FileNotFoundError:
            content = storage.read_bytes(folder / name, SizeLimit.ARRAYS)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} has neither {name}.gz nor {name}: install Debian's package "
            "dataset-fashion-mnist, or name the folder of the four files with --manual_dir."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{folder / name}.gz can't be read: {error}.") from error
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4") if len(content) >= start else np.zeros(0)
    if not dimensions or len(shape) != dimensions:
        raise DataError(f"{folder / name} is no idx file of bytes.")
    if len(content) - start != shape.prod(dtype=np.int64):
        raise DataError(
            f"{folder / name} has {len(content) - start} elements where its header says "
            f"{shape.prod(dtype=np.int64)}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape.astype(int))


with registered.skip_registration():  # tfds has its own builder of this name

    class FashionMnist(tfds.core.GeneratorBasedBuilder):
        """60,000 and 10,000 images of clothes, 28x28, in ten classes (arXiv 1708.07747)."""

        VERSION = tfds.core.Version("1.0.0")
        name = "fashion_mnist"

        def __init__(self, *, manual_dir: Path = PACKAGED, **options: Any):
            """Read the four files, compressed with gzip or not, from `manual_dir`."""
            self._folder = manual_dir
            super().__init__(**options)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=self.__doc__,
                homepage="https://github.com/zalandoresearch/fashion-mnist",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(28, 28, 1)),
                        "label": tfds.features.ClassLabel(names=CLASS_NAMES),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            del dl_manager
            return {split: self._generate_examples(split) for split in FILES}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            images, labels = (read_idx(self._folder, name) for name in FILES[split])
            if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
                raise DataError(
                    f"The {split} files in {self._folder} are not Fashion-MNIST's: images "
                    f"{list(images.shape)}, labels {list(labels.shape)}."
                )
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                file = io.BytesIO()  # encode it here, because tfds would need TensorFlow for it
                PIL.Image.fromarray(image).save(file, "PNG")
                file.seek(0)
                yield index, {"image": file, "label": int(label)}
