"""A run on a prepared tfds data set, with worker processes and without TensorFlow."""

import io
import os

import numpy as np
import PIL.Image
import pytest

from vvt_jax.data.sources import open_source

tfds = pytest.importorskip("tensorflow_datasets")


class PngDigits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's digits as PNG files, in the order and the splits of the source "digits"."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(names=list("0123456789")),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split):
        examples = open_source("digits", split).examples
        for index in range(len(examples)):
            file = io.BytesIO()
            PIL.Image.fromarray(np.asarray(examples[index]["image"])[..., 0]).save(file, "PNG")
            file.seek(0)
            yield index, {"image": file, "label": examples[index]["label"]}


@pytest.fixture
def without_tensorflow(tmp_path, monkeypatch):
    """Processes in which `import tensorflow` fails, and is told of."""
    package = tmp_path / "blocked" / "tensorflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("blocked by the test")\n')
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.slow
def test_trains_as_from_memory(run, tmp_path, without_tensorflow, read_metrics):
    PngDigits(data_dir=tmp_path / "data", file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    short = "--config.total_steps=12"
    done = run(
        tmp_path / "tfds",
        short,
        "--config.data.source=tfds:png_digits",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.data.workers=2",
        anew=True,  # a fork would have imported what is missing here
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert run(tmp_path / "memory", short).returncode == 0
    assert read_metrics(tmp_path / "tfds") == read_metrics(tmp_path / "memory")
    assert read_metrics(tmp_path / "tfds")[-1]["test/examples"] == 360
