"""Predictor: files as they come, the same figures as evaluation, a fixed number of compilations."""

import contextlib
import io

import chex
import jax
import numpy as np
import PIL.Image
import pytest

import vvt_jax
from vvt_jax.data.examples import BrokenImageError
from vvt_jax.data.loader import eval_batches
from vvt_jax.data.sources import open_source
from vvt_jax.inference.predictor import Predictor, logits_of
from vvt_jax.system.errors import UserError
from vvt_jax.training.eval_step import make_eval_step

_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", "test")


@pytest.fixture(scope="module")
def loaded(digits_folder):
    """Model, variables and card."""
    return vvt_jax.load_pretrained(digits_folder)


def _photo(height=40, width=56, mode="RGB"):
    rng = np.random.default_rng(0)
    small = rng.integers(256, size=(5, 7, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.BICUBIC).convert(mode)


def test_agrees_with_evaluation_on_the_same_images(predictor, digits, loaded):
    count = 40
    batches = eval_batches(
        digits, record=predictor.card["preprocessing"], batch_size=count, threads=0
    )
    with contextlib.closing(batches):
        batch = next(batches)
    logits = predictor.logits([digits.examples[i]["image"] for i in range(count)])
    chex.assert_shape(logits, (count, 10))
    model, variables, card = loaded
    step = jax.jit(make_eval_step(model, card["preprocessing"]), compiler_options=_QUICKLY)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for i in range(count):  # an example at a time, so that its loss is told alone
        sums = step(variables, {**batch, "mask": np.arange(count) == i})
        assert -np.log(shares[i, batch["label"][i]]) == pytest.approx(float(sums["loss"]), abs=1e-5)
        assert (logits[i].argmax() == batch["label"][i]) == sums["top1"]


def test_predictions_are_the_softmax_in_order(predictor, digits):
    images = [digits.examples[i]["image"] for i in range(3)]
    logits = predictor.logits(images)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for prediction, row in zip(predictor(images, top=3), shares, strict=True):
        assert prediction.labels == tuple(np.argsort(-row)[:3])
        assert prediction.names == tuple(str(label) for label in prediction.labels)
        np.testing.assert_allclose(prediction.probabilities, np.sort(row)[::-1][:3], rtol=1e-4)
    (everything,) = predictor(images[0], top=99)
    assert sorted(everything.labels) == list(range(10))
    assert sum(everything.probabilities) == pytest.approx(1)


def test_a_fixed_number_of_compilations(predictor, digits, monkeypatch):
    images = [digits.examples[i]["image"] for i in range(2 * predictor.batch_size + 1)]
    everything = predictor.logits(images)
    compiled = []
    compile_it = Predictor._compile
    monkeypatch.setattr(
        Predictor, "_compile", lambda *given: compiled.append(given) or compile_it(*given)
    )
    for count in (1, 3, predictor.batch_size, len(images)):
        few = predictor.logits(images[:count])
        np.testing.assert_array_equal(few, everything[:count])  # padding changes no bit
    predictor.logits(_photo(300, 200))
    assert not compiled


def test_every_kind_of_file_is_read(predictor, tmp_path):
    picture = _photo()
    picture.save(tmp_path / "rgb.png")
    picture.save(tmp_path / "rgb.webp", lossless=True)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    picture.save(tmp_path / "rgb.jpg", quality=100, subsampling=0)
    transparent = picture.copy()
    transparent.putalpha(128)
    transparent.save(tmp_path / "alpha.png")
    transposed = picture.transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 270 degrees to see it upright
    transposed.save(tmp_path / "turned.png", exif=exif)
    grey = picture.convert("L")
    grey.save(tmp_path / "grey.png")
    deep = np.asarray(grey).astype(np.uint16) * 256 + 77
    PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
    with PIL.Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I;16")

    seen = {path.name: predictor.pixels(path)[0].astype(int) for path in tmp_path.iterdir()}
    assert len(seen) == 8
    whitened = 255 + 128 / 255 * (seen["rgb.png"] - 255)  # half seen through, on white
    assert np.abs(seen["alpha.png"] - whitened).max() <= 2
    for name in ("rgb.webp", "turned.png"):
        np.testing.assert_array_equal(seen[name], seen["rgb.png"], err_msg=name)
    for name in ("rgb.jpg", "cmyk.jpg"):
        assert np.abs(seen[name] - seen["rgb.png"]).mean() < 4, name
    np.testing.assert_array_equal(seen["deep.png"], seen["grey.png"])
    with PIL.Image.open(tmp_path / "turned.png") as opened:
        np.testing.assert_array_equal(predictor.pixels(opened)[0], seen["rgb.png"])
    np.testing.assert_array_equal(predictor.pixels(str(tmp_path / "rgb.png"))[0], seen["rgb.png"])
    np.testing.assert_array_equal(predictor.pixels(np.asarray(picture))[0], seen["rgb.png"])


@pytest.mark.slow
def test_features_are_those_of_the_model_at_any_size(predictor, loaded):
    picture = _photo(50, 100)
    size = (32, 48)
    maps = predictor.features([picture, picture], size=size)
    assert [m.shape for m in maps] == [
        (2, 8, 12, 32), (2, 4, 6, 48), (2, 2, 3, 64), (2, 1, 2, 64),
    ]  # fmt: skip
    model, variables, card = loaded
    record = {**card["preprocessing"], "size": list(size)}
    images = vvt_jax.preprocess(picture, {"preprocessing": record})
    expected = jax.jit(
        lambda v, x: model.apply(v, x, method="features"), compiler_options=_QUICKLY
    )(variables, images)
    for ours, theirs in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours[1], theirs[0], atol=1e-5)
    # what the classifier sees, at the card's size
    head = jax.device_get(predictor.variables["params"]["head"])
    expected = predictor.pooled(picture) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(expected, predictor.logits(picture), atol=1e-5)
    with pytest.raises(UserError, match="16x48 pixels are too small: the model takes 32"):
        predictor.pooled(picture, size=(16, 48))


def test_results_are_in_order_and_further_arrays_go_along(predictor, optimized):
    def marked(model, variables, images, marks):
        return images.mean((1, 2, 3)), marks * 2

    levels = np.arange(0, 250, 6, dtype=np.uint8)  # several batches
    images = (np.full((32, 32, 3), level, np.uint8) for level in levels)
    means, marks = predictor.apply(marked, images, np.arange(len(levels)))
    np.testing.assert_allclose(means, levels / 255 * 2 - 1, atol=1e-5)
    np.testing.assert_array_equal(marks, 2 * np.arange(len(levels)))


def test_what_is_broken_is_told_in_its_place(predictor, tmp_path):
    _photo().save(tmp_path / "sound.png")
    content = (tmp_path / "sound.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    PIL.Image.new("RGB", (200_000, 1)).save(tmp_path / "line.png")
    order = ["sound.png", "cut.png", "line.png", "sound.png"]
    read = list(predictor.read([tmp_path / name for name in order]))
    assert [path.name for path, _ in read] == order
    assert [isinstance(pixels, BrokenImageError) for _, pixels in read] == [
        False,
        True,
        True,
        False,
    ]
    assert "cut.png can't be decoded: " in str(read[1][1])
    assert "line.png can't be used: An image of 200000 x 1 pixels is too long" in str(read[2][1])
    with pytest.raises(BrokenImageError, match=r"cut\.png can't be decoded"):
        predictor([tmp_path / "sound.png", tmp_path / "cut.png"])


def test_other_formats_are_not_even_tried(predictor, tmp_path):
    # Pillow would run Ghostscript for this one
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")
    words = "can't be decoded: it is not an image of the format"
    with pytest.raises(BrokenImageError, match=words):
        predictor(path)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({}, "card without preprocessing"),
        ({"preprocessing": {"size": [32, 32]}}, "can't be used: A preprocessing record has"),
        ({"size": 7}, "can't be used"),
        ({"size": [10**6, 10**6]}, "is above 16384 pixels"),
        ({"size": ["a", 32]}, "can't be used"),
        ({"mean": [0, 0, "x"]}, "can't be used"),
        ({"std": [0, 1, 1]}, "`std` must be from"),
        ({"interpolation": "magic"}, "Unknown interpolation 'magic'"),
        ({"class_names": "0123456789"}, "are no list"),
        ({"class_names": [1, 2]}, "do not fit"),
        ({"class_names": ["x"] * 11}, "The 11 class names in the model's card do not fit"),
    ],
)
def test_a_card_that_can_not_be_meant_is_refused(loaded, card, words):
    model, variables, good = loaded
    if card and "preprocessing" not in card and "class_names" not in card:
        card = {"preprocessing": {**good["preprocessing"], **card}}
    if "class_names" in card:
        card = {**good, **card}
    with pytest.raises(UserError, match=words) as refused:
        Predictor((model, variables, card))
    assert "\n" not in str(refused.value)


def test_names_of_classes(loaded):
    model, variables, card = loaded
    named = Predictor((model, variables, {**card, "class_names": ["zero"]}))
    assert named.class_names[:3] == ("zero", "class 1", "class 2")
    given = Predictor((model, variables, card), class_names=list("abcdefghij"))
    assert given.class_names == tuple("abcdefghij")
    with pytest.raises(UserError, match="2 class names do not fit the model's 10 classes"):
        Predictor((model, variables, card), class_names=["a", "b"])
    with pytest.raises(ValueError, match="batch_size"):
        Predictor((model, variables, card), batch_size=0)
    with pytest.raises(ValueError, match="leave them out"):
        Predictor((model, variables, card), dtype="bfloat16")


def test_a_model_without_a_classifier_gives_features_only(loaded):
    model, variables, card = loaded
    params = {name: part for name, part in variables["params"].items() if name != "head"}
    predictor = Predictor(
        (model.clone(num_classes=0), {"params": params}, {**card, "class_names": []})
    )
    assert predictor.class_names == ()
    with pytest.raises(UserError, match="The model has no classifier"):
        predictor(_photo())


def test_blobs_are_no_images(predictor):
    with pytest.raises(ValueError, match="must be a PIL image or a numpy array"):
        predictor([io.BytesIO()])
    with pytest.raises(ValueError, match="There are no images"):
        predictor([])
    with pytest.raises(ValueError, match="must be uint8"):
        predictor.run(logits_of, np.zeros((1, 32, 32, 3), np.float32))


def test_a_card_cannot_ask_for_gigabytes(predictor):
    record = {**predictor.card["preprocessing"], "size": [8192, 8192]}
    card = {**predictor.card, "preprocessing": record}
    given = Predictor((predictor.model, predictor.variables, card), batch_size=1)
    with pytest.raises(UserError, match="asks for images of 8192x8192 pixels"):
        given.logits(np.zeros((32, 32, 3), np.uint8))
    assert given.pixels(np.zeros((32, 32, 3), np.uint8), size=(32, 32)).shape == (1, 32, 32, 3)
