"""Where examples come from: data sets with random access, opened by name.

A further kind of source is one function that `open_source` calls; the loader needs nothing but
`Source`.
"""

import os

from vvt_jax.data import splits
from vvt_jax.data.examples import Cut, DataError, Source
from vvt_jax.system import storage


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    upright: bool = True,
    cut: Cut | None = None,
) -> Source:
    """Opens a data set that was prepared; never downloads, and uses the network for `gs://` and
    `s3://` addresses only.

    Args:
        name: one of
            `"digits"`: scikit-learn's 8x8 digits with the splits `train` (1293 examples),
            `validation` (144) and `test` (360);
            `"tfds:NAME[/CONFIG][:VERSION]"`: a TensorFlow Datasets data set prepared as
            array_record or TFRecord, read without TensorFlow and without the builder's code;
            `"folder"`: image files in a sub-folder for each class, see `vvt_jax.data.image_files`;
            `"folder_segmentation"`: images and masks of the same name, see the module's text;
            `"huggingface:NAME[/CONFIG]"`: a data set of the package `datasets`, with one feature of
            type Image and one of type ClassLabel, whatever their names.
        split: the split's name. For all but the digits also parts of it as tfds writes them
            (`"train[:90%]"`). A folder has `train`, of its sub-folders; or, where it has the
            sub-folder `train`, that one and `val` or `validation`, and `test`.
        data_dir: of tfds, where prepared data lies; None: `$TFDS_DATA_DIR`, or
            `~/tensorflow_datasets`. Of `"folder"`, the folder. Either may be in an object store.
            Of Hugging Face, where `save_to_disk` wrote `NAME[/CONFIG]`; None: the package's cache.
        cache_dir: keeps where the records of TFRecord files begin; None: found anew each time.
        upright: turn images as their EXIF orientation says; False: leave them as they are stored.
            Masks belong to the image as it is displayed, unless they have an orientation too.
        cut: how a part of a folder's split is chosen; None: `splits.ByHash`. The other sources cut
            parts themselves, in the order of their examples.

    Raises:
        DataError: the name or split is unknown, or the data is missing, damaged, of another
            format, or without labelled images.
    """
    kind = name.partition(":")[0]
    if kind == "tfds":
        from vvt_jax.data.sources.prepared import open_prepared

        return open_prepared(
            name,
            split,
            data_dir,
            None if cache_dir is None else storage.locate(cache_dir),
            upright=upright,
        )
    if kind == "huggingface":
        from vvt_jax.data.sources.hugging_face import open_hugging_face

        return open_hugging_face(name, split, data_dir, upright=upright)
    if name == "folder":
        from vvt_jax.data.sources.folder import open_folder

        return open_folder(split, data_dir, cut or splits.ByHash([split]), upright=upright)
    if name == "folder_segmentation":
        from vvt_jax.data.sources.folder_segmentation import open_folder_segmentation

        by = cut or splits.ByHash([split])
        return open_folder_segmentation(split, data_dir, by, upright=upright)
    if name == "digits":
        from vvt_jax.data.sources.digits import open_digits

        return open_digits(name, split)
    raise DataError(
        f"Unknown data source {name!r}: it must be 'digits', 'tfds:NAME', 'folder', "
        "'folder_segmentation' or 'huggingface:NAME'."
    )
