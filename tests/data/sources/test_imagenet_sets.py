"""ImageNet's other sets, in miniature: tfds's own builders write them, numpy measures."""

import csv
import io
import json
import pickle

import jax
import numpy as np
import PIL.Image
import pytest

import vvt_jax
from vvt_jax.data.examples import DataError
from vvt_jax.data.imagenet import class_names, classes_of
from vvt_jax.data.loader import eval_batches
from vvt_jax.data.sources import imagenet_sets
from vvt_jax.train import train_and_evaluate
from vvt_jax.training.configuration import ConfigError

ArrayRecordReader = pytest.importorskip("array_record.python.array_record_module").ArrayRecordReader
tfds = pytest.importorskip("tensorflow_datasets")
from tensorflow_datasets.core import registered  # noqa: E402

NAMES = list(class_names().values())
A, R = (np.array([name in classes_of(letter) for name in NAMES]) for letter in "ar")
_SIZE = 32


def _image(seed, size=(40, 36)):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(256, size=(*size, 3)) * rng.uniform(0, 1, 3)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def _prepare(name, split, examples, folder, config=None):
    """By tfds's own builder of that name, with these examples in place of its downloads."""
    real = tfds.builder_cls(name)

    with registered.skip_registration():

        class Miniature(real):
            pkg_dir_path = real.pkg_dir_path

            def _split_generators(self, dl_manager):
                del dl_manager
                return {split: self._generate_examples()}

            def _generate_examples(self):
                for number, (image, labels) in enumerate(examples):
                    file = io.BytesIO()
                    image.save(file, "PNG")
                    file.seek(0)
                    yield number, {"image": file, "file_name": f"{number}.JPEG", **labels}

    Miniature.name = name
    Miniature(data_dir=folder, file_format="array_record", config=config).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _labelled(seeds, labels, key="label", **image):
    extra = {"original_label": 0} if key == "real_label" else {}
    return [
        (_image(seed, **image), {key: label, **extra})
        for seed, label in zip(seeds, labels, strict=True)
    ]


def _to_tfrecord(folder, write_tfrecord):
    """The data set in that folder, prepared as array_record, becomes one in TFRecord."""
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in list(folder.glob("*.array_record*")):
        reader = ArrayRecordReader(str(file))
        write_tfrecord(
            file.with_name(file.name.replace("array_record", "tfrecord")), reader.read_all()
        )
        reader.close()
        file.unlink()


def _open(*names, data_dir, known=NAMES, outputs=1000):
    return imagenet_sets.open_sets(names, known, outputs, data_dir=str(data_dir))


def _all(source):
    """{red of the first pixel: label} of all examples: tfds shuffles them."""
    found = [source.examples[i] for i in range(len(source.examples))]
    return {np.asarray(e["image"])[0, 0].tobytes(): e["label"] for e in found}


def _key(seed, **image):
    return np.asarray(_image(seed, **image))[0, 0].tobytes()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    _prepare("imagenet_a", "test", _labelled(range(3), [6, 988, 11]), folder)
    _prepare("imagenet_r", "test", _labelled(range(2), [1, 988]), folder)
    _prepare("imagenet_v2", "test", _labelled(range(2), [0, 999]), folder, "matched-frequency")
    _prepare("imagenet_v2", "test", _labelled(range(3), [0, 5, 6]), folder, "topimages")
    real = _labelled(range(3), [[3, 7], [], [999]], "real_label")
    _prepare("imagenet2012_real", "validation", real, folder)
    return folder


def test_there_are_200_classes_of_each():
    assert (len(classes_of("a")), len(classes_of("r")), (A & R).sum()) == (200, 200, 86)
    # The first and last of each, as in their authors' evaluations
    assert (np.flatnonzero(A)[[0, 1, -1]].tolist(), np.flatnonzero(R)[[0, 1, -1]].tolist()) == (
        [6, 11, 988],
        [1, 2, 988],
    )


@pytest.mark.parametrize("tfrecord", [False, True])
@pytest.mark.parametrize(("name", "allowed"), [("imagenet_a", A), ("imagenet_r", R)])
def test_subsets_have_their_classes_alone(
    opened, tmp_path, write_tfrecord, name, allowed, tfrecord
):
    if tfrecord:
        labels = [6, 988, 11] if name == "imagenet_a" else [1, 988]
        _prepare(name, "test", _labelled(range(len(labels)), labels), tmp_path)
        (folder,) = (tmp_path / name).iterdir()
        _to_tfrecord(folder, write_tfrecord)
    (found,) = _open(name, data_dir=tmp_path if tfrecord else opened)
    assert (found.name, found.cropped) == (name, False)
    labels = _all(pickle.loads(pickle.dumps(found.source)))
    expected = [6, 988, 11] if name == "imagenet_a" else [1, 988]
    assert len(labels) == len(expected)
    for seed, right in enumerate(expected):
        label = labels[_key(seed)]
        assert label.dtype == np.int8
        np.testing.assert_array_equal(label, np.where(allowed, 0, -1) + (np.arange(1000) == right))


def test_v2_has_all_classes_and_a_default(opened):
    default, other = _open("imagenet_v2", "imagenet_v2/topimages", data_dir=opened)
    assert (len(default.source.examples), len(other.source.examples)) == (2, 3)
    np.testing.assert_array_equal(_all(default.source)[_key(1)], np.arange(1000) == 999)
    assert other.name == "imagenet_v2/topimages"


def test_real_has_several_right_classes_or_none(opened, tmp_path, write_tfrecord):
    real = _labelled(range(3), [[3, 7], [], [999]], "real_label")
    _prepare("imagenet2012_real", "validation", real, tmp_path)
    _to_tfrecord(tmp_path / "imagenet2012_real" / "1.0.0", write_tfrecord)
    for folder in (opened, tmp_path):
        (found,) = _open("imagenet2012_real", data_dir=folder)
        labels = _all(found.source)
        for seed, right in enumerate([[3, 7], [], [999]]):
            np.testing.assert_array_equal(labels[_key(seed)], np.isin(np.arange(1000), right))


def test_classes_are_found_by_name(opened):
    """In a model with another order, WordNet numbers for names, and outputs to spare."""
    order = np.random.default_rng(0).permutation(1000)
    numbers = list(class_names())
    known = [numbers[i] for i in order]
    (found,) = _open("imagenet_a", data_dir=opened, known=known, outputs=1003)
    label = _all(found.source)[_key(1)]
    assert label.shape == (1003,)
    assert [NAMES[order[i]] for i in np.flatnonzero(label > 0)] == [NAMES[988]]
    assert {NAMES[order[i]] for i in np.flatnonzero(label >= 0)} == classes_of("a")


def test_batches_carry_what_is_right(opened):
    (found,) = _open("imagenet_a", data_dir=opened)
    record = {"size": [8, 8], "crop_fraction": 1.0, "interpolation": "bicubic"}
    record |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    first, last = eval_batches(found.source, record=record, batch_size=2)
    assert (last["label"].shape, last["label"].dtype) == ((2, 1000), np.int8)
    assert last["mask"].tolist() == [True, False]
    labels = np.concatenate([first["label"], last["label"]])
    assert sorted(labels[:3].argmax(1).tolist()) == [6, 11, 988]
    assert not labels[3].any()


@pytest.mark.parametrize(
    ("name", "known", "words"),
    [
        ("imagenet_a", NAMES[:900], ["'imagenet_a'", "doesn't know", "of its 200 classes"]),
        ("imagenet_v2", list("0123456789"), ["doesn't know 1000 of its 1000 classes"]),
        ("imagenet_sketch", NAMES, ["tfds:imagenet_sketch", "not found", "vvt_jax.prepare"]),
        ("imagenet2012_corrupted", NAMES, ["imagenet2012_corrupted/gaussian_noise_1"]),
    ],
)
def test_refusals(opened, name, known, words):
    with pytest.raises(DataError) as refused:
        _open(name, data_dir=opened, known=known)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_class_that_a_has_not_is_refused(tmp_path):
    _prepare("imagenet_a", "test", _labelled([0], [0]), tmp_path)
    (found,) = _open("imagenet_a", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"Image 0 of 'tfds:imagenet_a', split 'test' is of a"):
        found.source.examples[0]


def test_corruption_errors_are_relative_to_alexnets():
    rng = np.random.default_rng(0)
    errors = {kind: rng.uniform(size=5).tolist() for kind in imagenet_sets.ALEXNET_ERRORS}
    relative, mce = imagenet_sets.corruption_errors(errors)
    alexnet = np.array(list(imagenet_sets.ALEXNET_ERRORS.values()))
    expected = np.array(list(errors.values())).sum(1) / (5 * alexnet)
    np.testing.assert_allclose(list(relative.values()), expected)
    assert mce == pytest.approx(expected.mean())
    itself = {kind: [value] * 5 for kind, value in imagenet_sets.ALEXNET_ERRORS.items()}
    assert imagenet_sets.corruption_errors(itself)[1] == pytest.approx(1)


def test_the_corruptions_are_those_of_tfds():
    configs = list(tfds.builder_cls("imagenet2012_corrupted").builder_configs)
    names = [f"{k}_{s}" for k in imagenet_sets.ALEXNET_ERRORS for s in imagenet_sets.SEVERITIES]
    assert configs[:75] == names


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small model of ImageNet's classes with weights by chance, and what it says of images."""
    model = vvt_jax.create_model("vvt_nano", num_classes=1000)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, _SIZE, _SIZE, 3)))
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    card = {
        "preprocessing": {
            "size": [_SIZE, _SIZE],
            "crop_fraction": 0.875,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "class_names": NAMES,
    }
    folder = tmp_path_factory.mktemp("model")
    vvt_jax.save_pretrained(folder, model, variables, card)
    apply = jax.jit(model.apply)

    def logits(images, **record):
        asked = {"preprocessing": {**card["preprocessing"], **record}}
        rows = [apply(variables, vvt_jax.preprocess(image, asked))[0] for image in images]
        return np.asarray(rows, np.float64)

    return folder, logits


def _expected(logits, right, allowed):
    """The definition: `right` `[examples, classes]`, `allowed` `[classes]`, both bool."""
    logits, right = logits[right.any(1)], right[right.any(1)]
    chosen = np.flatnonzero(allowed)
    logits, right = logits[:, chosen], right[:, chosen]
    order = np.argsort(-logits, axis=1)
    hits = np.take_along_axis(right, order, axis=1)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return {
        "loss": -np.log((p * right).sum(1)).mean(),
        "top1": hits[:, 0].mean(),
        "top5": hits[:, :5].any(1).mean(),
        "examples": len(logits),
    }


def _choose(logits, allowed, ranks):
    """For each row the class of that rank among the allowed ones."""
    masked = np.where(allowed, logits, -np.inf)
    order = np.argsort(-masked, axis=1)
    return order[np.arange(len(logits)), ranks].tolist()


@pytest.mark.slow
def test_eval_measures_each_set_as_numpy_does(model_folder, tmp_path, compilation_cache, capsys):
    """Sets that the model gets partly right, of 7 images in batches of 4: padding doesn't count."""
    from configs import common

    folder, logits_of = model_folder
    data = tmp_path / "data"
    every, ranks = np.ones(1000, bool), [0, 3, 0, 7, 0, 1, 900]
    seeds = np.arange(7)
    logits = logits_of([_image(seed) for seed in seeds])
    expected = {}
    for name, allowed, rank in [
        ("imagenet_v2", every, ranks),
        ("imagenet_a", A, np.minimum(ranks, 150)),
        ("imagenet_r", R, np.minimum(ranks, 150)[::-1]),
    ]:
        labels = _choose(logits, allowed, rank)
        config = "matched-frequency" if name == "imagenet_v2" else None
        _prepare(name, "test", _labelled(seeds, labels), data, config)
        expected[name] = _expected(logits, np.eye(1000, dtype=bool)[labels], allowed)
    assert expected["imagenet_a"]["top1"] == pytest.approx(3 / 7)

    several = [_choose(logits, every, [i] * 7) for i in (0, 2, 9)]
    real = [[several[0][0], several[2][0]], [], [several[1][2], several[2][2]]]
    real += [[several[2][3]], [], [several[0][5]], [several[1][6]]]
    _prepare("imagenet2012_real", "validation", _labelled(seeds, real, "real_label"), data)
    right = np.array([np.isin(np.arange(1000), labels) for labels in real])
    expected["imagenet2012_real"] = _expected(logits, right, every)
    assert expected["imagenet2012_real"]["examples"] == 5

    errors = {}
    corrupted = [_image(100 + seed, size=(224, 224)) for seed in range(3)]
    whole = logits_of(corrupted, crop_fraction=1.0)
    rng = np.random.default_rng(0)
    for kind in imagenet_sets.ALEXNET_ERRORS:
        errors[kind] = []
        for severity in imagenet_sets.SEVERITIES:
            labels = _choose(whole, every, rng.integers(2, size=3) * 5)
            examples = [(i, {"label": label}) for i, label in zip(corrupted, labels, strict=True)]
            name = f"{kind}_{severity}"
            _prepare("imagenet2012_corrupted", "validation", examples, data, name)
            errors[kind].append(np.mean(whole.argmax(1) != labels))

    numbered = _labelled(range(4), [0, 1, 2, 999])
    _prepare("imagenet_sketch", "test", numbered, data)  # stands for the training data
    config = common.get_config()
    config.mode, config.init_from, config.batch_size = "eval", str(folder), 4
    config.total_steps, config.compilation_cache = 1, str(compilation_cache)
    config.model.name, config.data.size = "vvt_nano", (_SIZE, _SIZE)
    config.data.source, config.data.data_dir = "tfds:imagenet_sketch", str(data)
    config.data.train_split = "test"
    config.data.validation_split = config.data.test_split = ""
    config.data.eval_also = (*expected, "imagenet2012_corrupted")
    measured = train_and_evaluate(config, tmp_path / "run")

    for name, values in expected.items():
        for key, value in values.items():
            np.testing.assert_allclose(
                measured[f"{name}/{key}"], value, rtol=1e-4, err_msg=f"{name}/{key}"
            )
    alexnet = np.array(list(imagenet_sets.ALEXNET_ERRORS.values()))
    means = np.mean(list(errors.values()), axis=1)
    corruptions = "imagenet2012_corrupted"
    assert measured[f"{corruptions}/mce"] == pytest.approx((means / alexnet).mean())
    assert measured[f"{corruptions}/ce_fog"] == pytest.approx(
        np.mean(errors["fog"]) / imagenet_sets.ALEXNET_ERRORS["fog"]
    )
    assert measured[f"{corruptions}/top1"] == pytest.approx(1 - means.mean())
    assert measured[f"{corruptions}/examples"] == 225
    assert not any(f"{corruptions}/fog_" in name for name in measured)

    results = tmp_path / "run" / "evaluation"
    assert json.loads((results / "metrics.json").read_text()) == {"step": 0, **measured}
    with (results / "imagenet2012_corrupted.csv").open(newline="") as file:
        rows = {row["corruption"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(imagenet_sets.ALEXNET_ERRORS)
    got = [float(rows["snow"][f"error_{severity}"]) for severity in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose(got, errors["snow"], atol=1e-4)
    said = capsys.readouterr().out
    assert "step 0: imagenet_a top-1 42.86 %" in said
    assert f"{corruptions} mean corruption error {measured[f'{corruptions}/mce']:.2%}" in said


def test_what_is_no_name_is_refused(small_config, tmp_path):
    small_config.mode = "eval"
    small_config.data.eval_also = (1,)
    with pytest.raises(ConfigError, match=r"config.data.eval_also=\(1,\) can't be run"):
        train_and_evaluate(small_config, tmp_path)
