"""RandAugment: each operation equals timm's, and what is drawn follows the specification."""

import collections
import json
import pathlib
import runpy

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageEnhance, ImageOps

from vvt_jax.data import preprocess, randaugment

_FOLDER = pathlib.Path(__file__).parent
_MAKER = runpy.run_path(str(_FOLDER / "make_timm_fixtures.py"))
_FIXTURES = dict(np.load(_FOLDER / "timm.npz"))
_META = json.loads(bytes(_FIXTURES["meta"]))
_FILL = tuple(_META["fill"])
_RECIPE = "rand-m9-mstd0.5-inc1"


def _picture(height=48, width=64):
    return PIL.Image.fromarray(_MAKER["picture"](height, width))


def _apply(name, image, magnitude, interpolation="bicubic"):
    return randaugment.apply_operation(name, image, magnitude, _FILL, interpolation)


def test_fixtures_hold_every_operation_at_every_magnitude():
    cases = collections.defaultdict(set)
    for name, magnitude in _META["operations"]:
        cases[name].add(magnitude)
    assert set(cases) == set(randaugment.OPERATIONS)
    for name, operation in randaugment.OPERATIONS.items():
        expected = {0, 3, 5, 9, 10} if operation.argument else {0}
        if operation.signed:
            expected |= {-magnitude for magnitude in expected}
        assert cases[name] == expected
    assert _FILL == (124, 116, 104)


@pytest.mark.parametrize(
    "case",
    [i for i, case in enumerate(_META["operations"]) if case not in _META["refused"]],
    ids=lambda case: "{}({})".format(*_META["operations"][case]),
)
def test_operation_equals_timm(case):
    name, magnitude = _META["operations"][case]
    image = _picture()
    result = _apply(name, image, magnitude)
    expected = _FIXTURES["operations_sha256"][case], _FIXTURES["operations_sample"][case]
    digest, sample = _MAKER["fingerprint"](np.asarray(result))
    versions = f"made with Pillow {_META['versions']['pillow']}, tested with {PIL.__version__}"
    np.testing.assert_array_equal(sample, expected[1], err_msg=versions)
    np.testing.assert_array_equal(digest, expected[0], err_msg=versions)
    assert (result.mode, result.size) == ("RGB", image.size)


def test_keeping_no_bits_is_black():
    """timm and Pillow 13 raise an error there, which some training images would meet."""
    assert sorted(_META["refused"]) == [["Posterize", 0], ["PosterizeIncreasing", 10]]
    for name, magnitude in _META["refused"]:
        result = _apply(name, _picture(), magnitude)
        assert result == PIL.Image.new("RGB", (64, 48))


@pytest.mark.parametrize("row", range(len(_META["sweep"])), ids=_META["sweep"])
def test_arguments_equal_timm(row):
    operation = randaugment.OPERATIONS[_META["sweep"][row]]
    magnitudes = _FIXTURES["magnitudes"]
    arguments = [operation.argument(m if operation.signed else abs(m)) for m in magnitudes]
    np.testing.assert_array_equal(arguments, _FIXTURES["arguments"][row])


def test_every_argument_is_in_the_sweep():
    with_argument = {name for name, op in randaugment.OPERATIONS.items() if op.argument}
    assert set(_META["sweep"]) == with_argument


def test_operations_against_pillow():
    image = _picture()
    resample = PIL.Image.Resampling.BILINEAR

    def moved(*matrix):
        return image.transform((64, 48), PIL.Image.Transform.AFFINE, matrix, resample, 1, _FILL)

    half = image.point([min(255, v + 55) if v < 128 else v for v in range(256)] * 3)
    for name, magnitude, expected in (
        ("AutoContrast", 0, ImageOps.autocontrast(image)),
        ("Equalize", 0, ImageOps.equalize(image)),
        ("Invert", 0, ImageOps.invert(image)),
        ("Rotate", -5, image.rotate(-15, resample, fillcolor=_FILL)),
        ("PosterizeIncreasing", 5, ImageOps.posterize(image, 2)),
        ("SolarizeIncreasing", 5, ImageOps.solarize(image, 128)),
        ("SolarizeAdd", 5, half),
        ("ColorIncreasing", 5, ImageEnhance.Color(image).enhance(1.45)),
        ("ContrastIncreasing", -5, ImageEnhance.Contrast(image).enhance(0.55)),
        ("BrightnessIncreasing", 10, ImageEnhance.Brightness(image).enhance(1.9)),
        ("SharpnessIncreasing", -10, ImageEnhance.Sharpness(image).enhance(0.1)),
        ("ShearX", 10, moved(1, 0.3, 0, 0, 1, 0)),
        ("ShearY", -10, moved(1, 0, 0, -0.3, 1, 0)),
        ("TranslateXRel", 10, moved(1, 0, 0.45 * 64, 0, 1, 0)),
        ("TranslateYRel", -10, moved(1, 0, 0, 0, 1, -0.45 * 48)),
    ):
        assert _apply(name, image, magnitude, "bilinear") == expected, name


@pytest.mark.parametrize("name", sorted(preprocess.INTERPOLATIONS))
def test_geometric_operations_take_any_interpolation(name):
    image = _picture()
    rotated = _apply("Rotate", image, 9, name)
    own = {"nearest": 0, "bilinear": 2}.get(name, 3)
    assert rotated == image.rotate(27, own, fillcolor=_FILL)


def test_what_moves_in_is_filled():
    black = PIL.Image.new("RGB", (40, 30))
    for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
        pixels = np.asarray(_apply(name, black, 10)).reshape(-1, 3)
        assert (pixels == _FILL).all(axis=1).any()
        assert not pixels.all(axis=1).all()


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(randaugment.OPERATIONS)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    magnitude=st.floats(0, 10),
    negative=st.booleans(),
)
def test_any_size_is_kept_and_the_image_stays(name, size, magnitude, negative):
    image = _picture(*size)
    before = image.copy()
    if negative and randaugment.OPERATIONS[name].signed:
        magnitude = -magnitude
    result = _apply(name, image, magnitude)
    assert (result.mode, result.size) == ("RGB", image.size)
    assert image == before
    assert result == _apply(name, image, magnitude)


@settings(deadline=None, max_examples=50)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 5),
    increasing=st.sampled_from([0, 1]),
)
def test_policy_depends_on_the_generator_alone(size, seed, count, increasing):
    policy = randaugment.parse(f"rand-m9-mstd2-n{count}-p0.9-inc{increasing}")
    image = _picture(*size)
    before = image.copy()
    first, again = (
        randaugment.randaugment(image, np.random.default_rng(seed), policy, _FILL, "bicubic")
        for _ in range(2)
    )
    assert first == again
    assert first.size == image.size
    assert image == before


def test_policy_applies_what_is_drawn_in_order():
    policy = randaugment.parse("rand-n3-p1-inc1-m9-mstd0.5")
    image = _picture()
    expected = image
    for name, magnitude in randaugment.draw(policy, np.random.default_rng(7)):
        expected = _apply(name, expected, magnitude)
    result = randaugment.randaugment(image, np.random.default_rng(7), policy, _FILL, "bicubic")
    assert result == expected != image


def test_nothing_is_drawn_at_probability_zero():
    policy = randaugment.parse("rand-p0")
    image = _picture()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert randaugment.randaugment(image, rng, policy, _FILL, "bicubic") is image


def test_draws_of_the_published_recipe():
    policy = randaugment.parse(_RECIPE)
    rng = np.random.default_rng(0)
    images = [randaugment.draw(policy, rng) for _ in range(15000)]

    # Each of two slots is filled half of the time, on its own.
    numbers = np.bincount([len(drawn) for drawn in images], minlength=3) / len(images)
    np.testing.assert_allclose(numbers, [0.25, 0.5, 0.25], atol=0.015)

    # About 1000 of each operation, with replacement.
    draws = [pair for drawn in images for pair in drawn]
    names = collections.Counter(name for name, _ in draws)
    assert set(names) == set(randaugment.INCREASING)
    assert len(names) == 15
    assert 850 < min(names.values()) < max(names.values()) < 1150
    twice = sum(len(drawn) == 2 and drawn[0][0] == drawn[1][0] for drawn in images)
    assert 180 < twice < 320  # Of 3750 pairs, a fifteenth is expected: 250.

    # Magnitudes are those of N(9, 0.5), of which 2.3 % lie above 10; signs are even.
    magnitudes = np.array([m for name, m in draws if randaugment.OPERATIONS[name].argument])
    sizes = np.abs(magnitudes)
    assert sizes.max() == 10
    assert (sizes == 10).mean() == pytest.approx(0.0228, abs=0.005)
    quartiles = np.quantile(sizes, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [8.663, 9, 9.337], atol=0.02)
    for name, operation in randaugment.OPERATIONS.items():
        signs = [m < 0 for drawn, m in draws if drawn == name]
        if signs:
            assert np.mean(signs) == pytest.approx(0.5 if operation.signed else 0, abs=0.07)


def test_magnitudes_are_clipped_below():
    policy = randaugment.parse("rand-m0-mstd1-n50-p1")
    drawn = randaugment.draw(policy, np.random.default_rng(0))
    sizes = [abs(m) for name, m in drawn if randaugment.OPERATIONS[name].argument]
    assert min(sizes) == 0 < max(sizes)


def test_probability_and_deviation_may_be_given():
    policy = randaugment.parse("rand-m4-n40-p0.25")
    rng = np.random.default_rng(0)
    drawn = [pair for _ in range(100) for pair in randaugment.draw(policy, rng)]
    assert 850 < len(drawn) < 1150
    assert {abs(m) for name, m in drawn if randaugment.OPERATIONS[name].argument} == {4}
    assert {name for name, _ in drawn} == set(randaugment.NOT_INCREASING)


@pytest.mark.parametrize(
    ("specification", "changes"),
    [
        (
            _RECIPE,
            {"names": randaugment.INCREASING, "magnitude": 9.0, "magnitude_std": 0.5},
        ),
        ("rand", {}),
        ("rand-inc0", {}),
        ("rand-n3-p0.7-m10-mstd1", {"count": 3, "probability": 0.7, "magnitude_std": 1.0}),
        ("rand-p1-m0-n12", {"count": 12, "probability": 1.0, "magnitude": 0.0}),
    ],
)
def test_specification(specification, changes):
    expected = {
        "names": randaugment.NOT_INCREASING,
        "count": 2,
        "probability": 0.5,
        "magnitude": 10.0,
        "magnitude_std": 0.0,
    }
    policy = randaugment.parse(specification)
    assert policy == randaugment.Policy(**(expected | changes))
    assert randaugment.parse(specification) is policy


@pytest.mark.parametrize(
    ("specification", "named"),
    [
        ("original", "'original'"),
        ("", "''"),
        ("rand9", "'rand9'"),
        ("rand-", "''"),
        ("rand-m", "'m'"),
        ("rand-m11", "'m11'"),
        ("rand-m-1", "'m'"),
        ("rand-m9-m9", "'m9'"),
        ("rand-m9.", "'m9.'"),
        ("rand-m9-mmax20", "'mmax20'"),
        ("rand-mstd101", "'mstd101'"),
        ("rand-mstdinf", "'mstdinf'"),
        ("rand-n0", "'n0'"),
        ("rand-n2.5", "'n2.5'"),
        ("rand-p1.5", "'p1.5'"),
        ("rand-inc2", "'inc2'"),
        ("rand-t3a", "'t3a'"),
        ("rand-m٩", "'m٩'"),
    ],
)
def test_bad_specification_is_named(specification, named):
    with pytest.raises(ValueError, match=r"RandAugment") as refused:
        randaugment.parse(specification)
    message = str(refused.value)
    assert named in message
    assert repr(specification) in message
    assert message.endswith("each once.")
    assert "\n" not in message
