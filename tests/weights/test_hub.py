"""hf:// addresses against a real cache of huggingface_hub, without a network."""

import sys

import chex
import huggingface_hub
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from huggingface_hub import constants

from vvt_jax import create_model, load_pretrained, save_pretrained
from vvt_jax.models.shapes import variable_shapes
from vvt_jax.weights.checks import WeightsError

_FIELDS = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}
_COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """As huggingface_hub lays it out: blobs, and snapshots of a commit that link to them."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "models--someone--digits"
    for classes, (reference, commit) in enumerate(_COMMITS.items(), 2):
        model = create_model("vvt_nano", num_classes=classes, **_FIELDS)
        variables = {
            name: np.full(shape, classes, np.float32)
            for name, shape in variable_shapes(model).items()
        }
        snapshot = repository / "snapshots" / commit
        card = {"class_names": ["a", "b", "c"][:classes]}
        save_pretrained(snapshot, model, unflatten_dict(variables, sep="/"), card)
        (repository / "blobs").mkdir(exist_ok=True)
        for path in list(snapshot.iterdir()):
            blob = repository / "blobs" / f"{commit}{path.name}"
            path.rename(blob)
            path.symlink_to(f"../../blobs/{blob.name}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    return root


@pytest.fixture(autouse=True)
def offline(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_the_cache_is_one_that_huggingface_hub_knows(cache):
    (repository,) = huggingface_hub.scan_cache_dir(cache).repos
    assert repository.repo_id == "someone/digits"
    assert set(repository.refs) == set(_COMMITS)


@pytest.mark.parametrize(
    ("at", "classes"), [("", 2), ("@main", 2), ("@v2", 3), (f"@{'b' * 40}", 3)]
)
def test_a_model_is_loaded_by_its_address(cache, at, classes):
    model, variables, card = load_pretrained(f"hf://someone/digits{at}", dtype="bfloat16")
    assert (model.num_classes, model.dtype, len(card["class_names"])) == (
        classes,
        "bfloat16",
        classes,
    )
    commit = list(_COMMITS.values())[classes - 2]
    folder = cache / "models--someone--digits" / "snapshots" / commit
    chex.assert_trees_all_equal(variables, load_pretrained(folder)[1])


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("hf://someone/nothing", "can't be fetched"),
        ("hf://someone/digits@v3", "can't be fetched"),
        ("hf://digits", "no address"),
        ("hf://", "no address"),
        ("hf://someone/digits@", "no address"),
        ("hf://someone/../digits", "no address"),
        ("hf://some one/digits", "can't be fetched"),
    ],
)
def test_what_is_not_there_is_a_sentence(address, word):
    with pytest.raises(WeightsError) as refused:
        load_pretrained(address)
    assert str(refused.value).startswith(address)
    assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"pip install 'vvt-jax\[hub\]'"):
        load_pretrained("hf://someone/digits")
