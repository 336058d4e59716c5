"""Model folders: what is saved comes back bit for bit, and what is damaged is refused."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

import vvt_jax
from vvt_jax import convert
from vvt_jax.models.shapes import variable_shapes
from vvt_jax.system import storage
from vvt_jax.weights import pretrained
from vvt_jax.weights.checks import WeightsError, check_arrays
from vvt_jax.weights.pretrained import load_pretrained, save_pretrained

_CARD = {
    "preprocessing": {
        "size": [32, 48],
        "crop_fraction": 0.9,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.25, 1.0],
    },
    "class_names": ["ein", "zwei", "drei ☃"],
}
_SMALL = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "num_classes": 3}


def _model(name="vvt_nano", **fields):
    return vvt_jax.create_model(name, **{**_SMALL, **fields})


@functools.cache
def _variables(model, seed=0):
    rng = np.random.default_rng(seed)
    return unflatten_dict(
        {
            name: rng.normal(scale=0.2, size=shape).astype(np.float32)
            for name, shape in variable_shapes(model).items()
        },
        sep="/",
    )


@functools.partial(
    jax.jit,
    static_argnums=0,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
def _logits(model, variables):
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    return model.apply(variables, images)


@pytest.fixture
def folder(tmp_path):
    """A sound model folder, for tests to damage."""
    save_pretrained(tmp_path / "model", _model(), _variables(_model()), _CARD)
    return tmp_path / "model"


def _edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_same_bit_for_bit(tmp_path, dtype):
    model = _model(dtype=dtype)
    variables = _variables(model)
    save_pretrained(tmp_path, model, variables, _CARD)
    loaded, loaded_variables, card = load_pretrained(tmp_path)
    assert loaded == model
    assert card == _CARD
    chex.assert_trees_all_equal(loaded_variables, variables)
    chex.assert_trees_all_equal_dtypes(loaded_variables, variables)
    logits = _logits(loaded, loaded_variables)
    chex.assert_shape(logits, (2, 3))
    assert np.ptp(logits) > 0
    np.testing.assert_array_equal(logits, _logits(model, variables))


_EVERY_FIELD = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 2, 1, 3),
    "num_heads": (1, 2, 1, 4),
    "mlp_ratios": (1, 2, 3, 4),
    "feature_reduction": (1, 2, 4, 2),
    "gate_reduction": 4,
    "locality": "product",
    "attention": "softmax",
    "clamp": False,
    "patch_strides": (2, 2, 1, 2),
    "drop_path_rate": 0.3,
    "num_classes": 0,
    "dtype": "bfloat16",
    "remat": True,
    "ffn_bands": 2,
    "unroll": False,
}


@pytest.mark.parametrize("name", vvt_jax.list_models())
def test_every_variant_comes_back(tmp_path, name):
    model = _model(name)
    variables = _variables(model)
    save_pretrained(tmp_path, model, variables, _CARD)
    loaded, loaded_variables, _ = load_pretrained(tmp_path)
    assert loaded == model
    chex.assert_trees_all_equal(loaded_variables, variables)


def test_every_field_comes_back(tmp_path):
    model = _model(**_EVERY_FIELD)
    variables = _variables(model)
    save_pretrained(tmp_path, model, variables, _CARD)
    loaded, loaded_variables, _ = load_pretrained(tmp_path)
    assert loaded == model
    for field, value in _EVERY_FIELD.items():
        assert getattr(loaded, field) == value
        assert type(getattr(loaded, field)) is type(value)
    chex.assert_trees_all_equal(loaded_variables, variables)


def test_no_field_is_left_out():
    from vvt_jax.models.vvt import model_fields

    assert set(_EVERY_FIELD) == set(model_fields(_model()))


def test_arrays_that_are_views_are_stored_as_they_read(tmp_path):
    model = _model()
    variables = _variables(model)
    views = jax.tree.map(lambda a: np.ascontiguousarray(a.T).T, variables)
    views["params"]["head"]["bias"] = np.repeat(variables["params"]["head"]["bias"], 2)[::2]
    assert not views["params"]["head"]["kernel"].flags.c_contiguous
    assert not views["params"]["head"]["bias"].flags.c_contiguous
    save_pretrained(tmp_path, model, views, _CARD)
    chex.assert_trees_all_equal(load_pretrained(tmp_path)[1], variables)


def test_converted_weights_come_back(tmp_path):
    model = _model(depths=(1, 2, 1, 1))
    published = convert.to_pytorch(_variables(model), model)
    views = {
        name: np.asfortranarray(array) if array.ndim > 1 else np.repeat(array, 3)[::3]
        for name, array in published.items()
    }
    assert not any(a.flags.c_contiguous for a in views.values() if min(a.shape) > 1)
    variables = convert.from_pytorch(views, model)
    chex.assert_trees_all_equal(variables, _variables(model))
    save_pretrained(tmp_path, model, variables, _CARD)
    _, loaded, _ = load_pretrained(tmp_path)
    chex.assert_trees_all_equal(loaded, variables)
    for name, array in convert.to_pytorch(loaded, model).items():
        np.testing.assert_array_equal(array, published[name])


def test_keys_are_paths_and_blocks_are_stacked(tmp_path):
    model = _model(depths=(2, 1, 1, 1))
    save_pretrained(tmp_path, model, _variables(model), _CARD)
    arrays = load_file(tmp_path / "model.safetensors")
    assert {name.split("/")[0] for name in arrays} == {"params"}
    assert arrays["params/stage1/blocks/feed_forward/fc1/kernel"].shape == (2, 8, 32)
    assert arrays["params/head/kernel"].shape == (8, 3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["class"] == "vvt_jax.models.VVT"
    assert config["fields"]["depths"] == [2, 1, 1, 1]


def test_a_second_save_replaces_the_first(folder):
    model = _model(depths=(1, 1, 1, 2), num_classes=2)
    card = {**_CARD, "class_names": ["a", "b"]}
    save_pretrained(folder, model, _variables(model, seed=1), card)
    loaded, variables, loaded_card = load_pretrained(folder)
    assert (loaded, loaded_card) == (model, card)
    chex.assert_trees_all_equal(variables, _variables(model, seed=1))
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }


def test_bfloat16_comes_back_as_the_same_values(tmp_path):
    model = _model()
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _variables(model))
    save_pretrained(tmp_path, model, variables, {})
    _, loaded, _ = load_pretrained(tmp_path)
    chex.assert_trees_all_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), variables))


def test_numbers_of_numpy_in_a_card_are_json(tmp_path):
    record = {**_CARD["preprocessing"], "size": [np.int64(32)] * 2, "mean": np.full(3, 0.5)}
    card = {"score": np.float32(0.5), "preprocessing": record}
    save_pretrained(tmp_path, _model(), _variables(_model()), card)
    loaded = load_pretrained(tmp_path)[2]
    assert loaded["score"] == 0.5
    assert loaded["preprocessing"]["size"] == [32, 32]
    assert loaded["preprocessing"]["mean"] == [0.5] * 3


@pytest.mark.parametrize("bad", ["a card", "nan", "inf", "1e300", "int8", "a head", "a lack"])
def test_what_can_not_be_written_leaves_the_folder_as_it_was(tmp_path, bad):
    model = _model()
    variables = _variables(model)
    save_pretrained(tmp_path, model, variables, {})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    card, wrong = {}, jax.tree.map(np.copy, _variables(model, 1))
    head = wrong["params"]["head"]
    if bad == "a card":
        card = {"note": object()}
    elif bad == "nan":
        card = {"note": float("nan")}
    elif bad == "a head":
        head["bias"] = np.zeros(7, np.float32)
    elif bad == "a lack":
        del wrong["params"]["head"]
    elif bad == "int8":
        head["bias"] = np.zeros(3, np.int8)
    else:
        head["bias"] = np.full(3, float(bad))
    with pytest.raises(WeightsError):
        save_pretrained(tmp_path, model, wrong, card)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_is_stopped_anywhere_leaves_the_old_model_or_the_new_one(tmp_path):
    """Also a second one, after the first was stopped; the first model is far larger than others."""
    models = [_model(embed_dims=(64,) * 4), _model(), _model()]
    variables = [_variables(model, seed) for seed, model in enumerate(models)]

    class StoppedError(Exception):
        pass

    def save(seed, left):
        def stopping(write):
            def stop_or_write(*arguments):
                nonlocal left
                if not left:
                    raise StoppedError
                left -= 1
                write(*arguments)

            return stop_or_write

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "replace", stopping(storage.replace))
            patch.setattr(pretrained, "_rename_weights", stopping(pretrained._rename_weights))
            with contextlib.suppress(StoppedError):
                save_pretrained(folder, models[seed], variables[seed], {"seed": seed})

    for first, second in itertools.product(range(6), range(6)):
        folder = tmp_path / f"{first}{second}"
        save_pretrained(folder, models[0], variables[0], {"seed": 0})
        held = 0
        for seed, writes in ((1, first), (2, second)):
            save(seed, writes)
            model, loaded, card = load_pretrained(folder)
            assert card["seed"] in (held, seed)
            held = card["seed"]
            assert model == models[held]
            chex.assert_trees_all_equal(loaded, variables[held])
    assert held == 2  # nothing stopped the last one


def test_fields_override_the_models_own(folder):
    model, variables, _ = load_pretrained(str(folder), dtype="bfloat16", unroll=False)
    assert model == _model(dtype="bfloat16", unroll=False)
    chex.assert_trees_all_equal(variables, _variables(_model()))


def test_an_unknown_field_is_refused_with_the_nearest(folder):
    with pytest.raises(ValueError, match="no field 'unrol'; did you mean 'unroll'"):
        load_pretrained(folder, unrol=False)


def _refusal(path, *words, **options):
    with pytest.raises(WeightsError) as refused:
        load_pretrained(path, **options)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for word in words:
        assert str(word) in sentence
    return sentence


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_refused(folder, place):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    _refusal(folder, path, "is damaged", "SHA-256")


@pytest.mark.parametrize("length", [0, 5, -4])
def test_truncated_weights_are_refused(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    _refusal(folder, path, "is damaged")


def test_a_file_of_another_kind_is_refused_though_its_sum_is_right(folder):
    content = b"not safetensors at all"
    (folder / "model.safetensors").write_bytes(content)
    _edit(folder, sha256=hashlib.sha256(content).hexdigest())
    _refusal(folder, "is not a safetensors file")


def test_missing_parts_are_named(folder, tmp_path):
    _refusal(tmp_path / "nowhere", tmp_path / "nowhere", "is not a model folder", "config.json")
    (folder / "model.safetensors").unlink()
    _refusal(folder, folder, "has no readable model.safetensors")
    (folder / "config.json").unlink()
    _refusal(folder, folder, "is not a model folder", "config.json")
    shutil.rmtree(folder)
    folder.write_text("a file")
    _refusal(folder, folder, "is neither a model folder nor a PyTorch file")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_config_that_is_not_json_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    _refusal(folder, folder / "config.json", "is not JSON")


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"seed": 0}'])
def test_json_of_another_kind_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    _refusal(folder, folder / "config.json", "is not a model folder's")


@pytest.mark.parametrize("field", ["format_version", "class", "fields", "card", "sha256"])
def test_a_lacking_field_is_named(folder, field):
    config = json.loads((folder / "config.json").read_text())
    del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    _refusal(folder, f"it lacks {field}.")


def test_another_format_version_is_refused(folder):
    _edit(folder, format_version=2)
    _refusal(folder, folder, "has format version 2, but this program reads version 1")


def test_another_class_is_refused(folder):
    _edit(folder, **{"class": "vvt_jax.models.Other"})
    _refusal(folder, folder, "holds a vvt_jax.models.Other, not a vvt_jax.models.VVT")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depht": [1, 1, 1, 1]}, "no field 'depht'; did you mean 'depths'"),
        ({"attention": "hard"}, "attention='hard' does not fit"),
        ({"depths": 3}, "four positive whole numbers"),
    ],
)
def test_fields_that_no_model_has_are_named(folder, changes, words):
    fields = json.loads((folder / "config.json").read_text())["fields"]
    _edit(folder, fields={**fields, **changes})
    _refusal(folder, folder / "config.json", "describes no model", words)
    _edit(folder, fields=7)
    _refusal(folder, folder / "config.json", "describes no model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dims": [8, 8, 8, 16]}, ["where the model has"]),
        ({"num_classes": 0}, ["have the surplus params/head/"]),
        ({"depths": [1, 2, 1, 1]}, ["params/stage2/blocks/", "[1, ", "[2, "]),
        ({"attention": "softmax"}, ["surplus", "and 17 more"]),
    ],
)
def test_weights_of_another_model_are_named(folder, change, words):
    fields = json.loads((folder / "config.json").read_text())["fields"]
    _edit(folder, fields={**fields, **change})
    _refusal(folder, "These weights are not the model's", *words)


def test_lacking_weights_are_named(folder):
    fields = json.loads((folder / "config.json").read_text())["fields"]
    path = folder / "model.safetensors"
    arrays = load_file(path)
    del arrays["params/head/bias"]
    save_file(arrays, path)
    _edit(folder, fields=fields, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    _refusal(folder, "they lack params/head/bias.")


def test_a_name_is_refused_where_the_folder_tells_it(folder):
    _refusal(folder, "says itself which model it holds", name="vvt_nano")


_PREPROCESSING = _CARD["preprocessing"]
_INFERENCE = {"short_side": 64, "window": [64, 64], "stride": 0, "scales": [1.0], "flip": False}


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ([], "the card is no object, but list"),
        ({"preprocessing": 7}, "the card's preprocessing is unfit"),
        ({"preprocessing": {"size": [32, 32]}}, "has the fields"),
        ({"preprocessing": {**_PREPROCESSING, "size": 32}}, "is unfit"),
        ({"preprocessing": {**_PREPROCESSING, "size": ["a", "b"]}}, "is unfit"),
        ({"preprocessing": {**_PREPROCESSING, "size": [10**9, 10**9]}}, "above 16384 pixels"),
        ({"preprocessing": {**_PREPROCESSING, "crop_fraction": None}}, "is unfit"),
        ({"preprocessing": {**_PREPROCESSING, "interpolation": ["x"]}}, "is unfit"),
        ({"preprocessing": {**_PREPROCESSING, "mean": "abc"}}, "is unfit"),
        ({"inference": {"stride": 0}}, "the card's inference is unfit: The settings are"),
        ({"inference": 7}, "the card's inference is unfit"),
        ({"inference": {**_INFERENCE, "short_side": float("nan")}}, "`short_side` must be a whole"),
        ({"inference": {**_INFERENCE, "short_side": 10**6}}, "`short_side` must be a whole"),
        ({"inference": {**_INFERENCE, "scales": [float("inf")]}}, "`scales` must be"),
        ({"inference": {**_INFERENCE, "scales": [1.0] * 1000}}, "`scales` must be"),
        ({"inference": {**_INFERENCE, "flip": "no"}}, "`flip` must be True or False"),
        ({"preprocessing": {**_PREPROCESSING, "mean": [123.675] * 3}}, "`mean` must be from 0 to"),
        ({"preprocessing": {**_PREPROCESSING, "std": [58.395] * 3}}, "`std` must be from"),
        ({"preprocessing": {**_PREPROCESSING, "std": [1e-320] * 3}}, "`std` must be from"),
        ({"preprocessing": {**_PREPROCESSING, "crop_fraction": 1e-320}}, "is too small for `size`"),
        ({"preprocessing": {**_PREPROCESSING, "size": [True, True]}}, "whole pixels"),
        ({"class_names": ["a", "\ud800"]}, "half of a character"),
        ({"class_names": "abc"}, "are not a list of texts"),
        ({"class_names": [1, 2, 3]}, "are not a list of texts"),
        ({"class_names": ["a", "b", "c", "d"]}, "has 4 class_names, the model 3 classes"),
    ],
)
def test_a_card_that_does_not_fit_is_neither_read_nor_written(folder, card, words):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightsError, match=words):
        save_pretrained(folder, _model(), _variables(_model()), card)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    _edit(folder, card=card)
    _refusal(folder, folder / "config.json", words)


@pytest.mark.parametrize("text", [None, "---\nnonsense: ["])
def test_the_readme_is_for_people_alone(folder, text):
    path = folder / "README.md"
    path.unlink() if text is None else path.write_text(text)
    chex.assert_trees_all_equal(load_pretrained(folder)[1], _variables(_model()))


def test_what_is_far_too_large_is_not_read(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # a hole: takes no space
    _refusal(folder, "has 1099511627776 bytes, but its model needs at most")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**40)
    _refusal(folder, folder, "no readable config.json (it has 1099511627776 bytes")


def test_nesting_and_numbers_beyond_measure_are_refused(folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text())["fields"]
    _edit(folder, fields={**fields, "embed_dims": [8 * 10**18] * 4})
    _refusal(folder, path)
    path.write_text("[" * 10**5)
    _refusal(folder, path, "is not JSON")


@pytest.fixture
def unprivileged():
    """As somebody who may not look into pytest's folders, where the tests are run by root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_no_permission_is_a_sentence(folder, unprivileged):
    if os.geteuid() != 65534:
        folder.chmod(0)
    _refusal(folder, folder, "Permission denied")
    _refusal(folder / "x.pth", folder / "x.pth", "can't be read: Permission denied")
    if os.geteuid() != 65534:
        folder.chmod(0o700)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_no_numbers_are_refused(folder, number):
    """1e300 is one in 64 bits, and infinite in the model."""
    path = folder / "model.safetensors"
    arrays = load_file(path)
    arrays["params/head/bias"] = arrays["params/head/bias"].astype(np.float64)
    arrays["params/head/bias"][1] = number
    save_file(arrays, path)
    _edit(folder, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    _refusal(folder, path, "params/head/bias has NaN or infinite numbers")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": True}, "has format version True"),
        ({"format_version": 1.0}, "has format version 1.0"),
        ({"class": []}, "holds a []"),
        ({"class": "a\nb"}, "holds a a\\nb"),
        ({"fields": {"remat": "x"}}, "remat='x' does not fit: it is True or False"),
        ({"fields": {"unroll": 1}}, "unroll=1 does not fit"),
        ({"fields": {"clamp": None}}, "clamp=None does not fit"),
        ({"fields": {"ffn_bands": 2**40}}, "ffn_bands=1099511627776 does not fit"),
        ({"fields": {"depths": [True, 1, 1, 1]}}, "it takes four positive whole numbers"),
        ({"fields": {"dtype": ["float32"]}}, "describes no model"),
        ({"fields": {"attention": {}}}, "describes no model"),
        ({"fields": {"locality": []}}, "describes no model"),
        ({"fields": {"num_classes": False}}, "num_classes=False does not fit"),
    ],
)
def test_fields_of_another_type_are_refused(folder, changes, words):
    config = json.loads((folder / "config.json").read_text())
    if "fields" in changes:
        changes = {"fields": {**config["fields"], **changes["fields"]}}
    _edit(folder, **changes)
    _refusal(folder, words)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_model_folder_is_not_waited_for(folder, part):
    (folder / part).unlink()
    os.mkfifo(folder / part)
    _refusal(folder, "it is a pipe and not a regular file")


def test_weights_that_are_no_floats_are_refused(folder):
    path = folder / "model.safetensors"
    arrays = load_file(path)
    arrays["params/head/bias"] = arrays["params/head/bias"].astype(np.int32)
    save_file(arrays, path)
    _edit(folder, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    _refusal(folder, "params/head/bias in int32, not a float")


def test_check_arrays_names_at_most_three():
    expected = {f"params/{letter}": (1,) for letter in "abcde"}
    with pytest.raises(WeightsError) as refused:
        check_arrays({"params/x": np.zeros(1)}, expected)
    lacking, _, surplus = str(refused.value).partition(" surplus ")
    assert "lack params/a, params/b, params/c and 2 more" in lacking
    assert surplus == "params/x."


def test_variable_shapes_are_those_of_the_model():
    model = _model()
    shapes = variable_shapes(model)
    made = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 64, 64, 3), np.float32))
    assert shapes == {k: v.shape for k, v in flatten_dict(made, sep="/").items()}


def _run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    code = """
import sys, vvt_jax
heavy = {"jax", "flax", "grain", "tensorflow_datasets", "numpy", "orbax", "optax", "PIL"}
print(*heavy & set(sys.modules))
"""
    assert _run(code) == []


def test_every_public_name_resolves():
    for name in vvt_jax.__all__:
        assert getattr(vvt_jax, name) is not None
        assert name in dir(vvt_jax)
    assert vvt_jax.load_pretrained is load_pretrained
    with pytest.raises(AttributeError, match="module 'vvt_jax' has no attribute 'nothing'"):
        _ = vvt_jax.nothing


def test_submodules_resolve_without_an_import_of_their_own():
    code = "import vvt_jax; print(vvt_jax.convert.__name__, vvt_jax.train.__name__)"
    assert _run(code) == ["vvt_jax.convert", "vvt_jax.train"]
