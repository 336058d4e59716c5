"""The README.md of a model folder: what it says, and that no name breaks out of it."""

import json

import pytest
import yaml

from vvt_jax import create_model
from vvt_jax.weights.model_card import model_card, variant_name

_CARD = {
    "preprocessing": {
        "size": [32, 48],
        "crop_fraction": 0.9,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.25, 1.0],
    },
    "class_names": ["ein", "drei ☃"],
}


def _front_matter(text):
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def test_it_says_what_the_model_is_and_what_it_wants():
    front, body = _front_matter(model_card(create_model("vvt_tiny", num_classes=2), _CARD, 1234567))
    assert front["library_name"] == "vvt_jax"
    assert front["pipeline_tag"] == "image-classification"
    assert "jax" in front["tags"]
    for words in ("# vvt_tiny", "1,234,567 parameters, with 2 classes", '0 "ein"', "drei ☃"):
        assert words in body
    for key, value in _CARD["preprocessing"].items():
        assert f"    {key}: {json.dumps(value)}\n" in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")


def test_features_many_classes_and_an_empty_card():
    front, body = _front_matter(model_card(create_model("vvt_nano", num_classes=0), {}, 1))
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert "without a classifier" in body
    assert "Not recorded." in body
    many = {"class_names": [str(n) for n in range(100)]}
    body = model_card(create_model("vvt_nano", num_classes=100), many, 1)
    assert "and 80 more" in body
    assert '"99"' not in body


@pytest.mark.parametrize(
    "name", ["a\n---\nlicense: x", "```\n# big", "a\r# b", "a\u2028# b", "<b>"]
)
def test_no_class_name_breaks_out(name):
    text = model_card(create_model("vvt_nano", num_classes=1), {"class_names": [name]}, 1)
    plain = model_card(create_model("vvt_nano", num_classes=1), {"class_names": ["x"]}, 1)
    assert len(text.splitlines()) == len(plain.splitlines())
    (line,) = set(text.splitlines()) - set(plain.splitlines())
    assert line.startswith("    0 ")


def test_variants_are_called_by_their_names():
    assert variant_name(create_model("vvt_large", num_classes=3, unroll=False)) == "vvt_large"
    assert variant_name(create_model("vvt_small", ffn_bands=4)) == "vvt_small"
    assert variant_name(create_model("vvt_large", locality="none")) is None
