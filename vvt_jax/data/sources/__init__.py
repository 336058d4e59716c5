"""Sources of examples: data sets with random access, opened by name.

To add another kind of source, write a function that returns a `Source`, which is all that the
loader needs, and call it in `open_source`.
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
    """Open a data set that has already been prepared.

    Nothing is downloaded, and the network is used only for `gs://` and `s3://` addresses.

    Args:
        name: one of
            `"digits"`: scikit-learn's 8x8 digits with the splits `train` (1293 examples),
            `validation` (144) and `test` (360);
            `"tfds:NAME[/CONFIG][:VERSION]"`: a TensorFlow Datasets data set prepared as
            array_record or TFRecord, which is read without TensorFlow and the builder's code;
            `"folder"`: image files in a sub-folder for each class, see
            `vvt_jax.data.sources.folder` and `vvt_jax.data.image_files`;
            `"folder_segmentation"`: images and masks of the same name, see
            `vvt_jax.data.sources.folder_segmentation`;
            `"huggingface:NAME[/CONFIG]"`: a data set of the package `datasets` with one feature of
            type Image and one of type ClassLabel, whatever their names.
        split: the name of the split or, except for the digits, a part of it in the notation of tfds
            (`"train[:90%]"`). A folder has the split `train`, made of its sub-folders; or, if it
            has a sub-folder `train`, that one as well as `val` or `validation`, and `test`.
        data_dir: for tfds, the folder of the prepared data; None means `$TFDS_DATA_DIR`, or
            `~/tensorflow_datasets`. For `"folder"` and `"folder_segmentation"`, the folder itself.
            The folders of tfds and `"folder"` may be in an object store. For Hugging Face, the
            folder where `save_to_disk` wrote `NAME[/CONFIG]`; None means the package's cache.
        cache_dir: a folder that caches the positions of the records in TFRecord files; None means
            that the files are indexed again each time.
        upright: whether to turn images as their EXIF orientation says, instead of leaving them as
            they are stored. Masks belong to the image as it is displayed, unless they have an
            orientation of their own.
        cut: how to choose a part of a folder's split; None means `splits.ByHash`. The other sources
            cut their parts themselves, in the order of their examples.

    Raises:
        DataError: if the name or split is unknown, or the data is missing, damaged, in another
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
