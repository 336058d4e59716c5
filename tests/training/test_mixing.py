"""Erasing and mixing against their definitions: by counting pixels, and over many keys."""

import os
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fork_server
from vvt_jax.training.mixing import (
    augmentation_key,
    check_mixing,
    mix,
    prepare_batch,
    random_erase,
)

_BOTH = {"mixup": 0.8, "cutmix": 1.0, "mix_probability": 1.0, "cutmix_probability": 0.5}


def _marked(batch, height, width):
    """Images and targets that say where they come from: image i is i everywhere, of class i."""
    images = np.broadcast_to(
        np.arange(batch, dtype=np.float32)[:, None, None, None], (batch, height, width, 3)
    )
    return jnp.asarray(images), jnp.eye(batch)


@pytest.mark.slow
@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 2**31), height=st.integers(1, 40), width=st.integers(1, 40))
def test_cutmix_label_weights_are_the_true_area(seed, height, width):
    images, targets = _marked(4, height, width)
    mixed, labels = mix(images, targets, jax.random.key(seed), mixup=0.0, cutmix=1.0)
    partner = np.asarray(mixed) == np.arange(4)[::-1, None, None, None]
    own = np.asarray(mixed) == np.arange(4)[:, None, None, None]
    assert (partner | own).all()
    share = own.mean((1, 2, 3))
    np.testing.assert_allclose(np.diag(labels), share, atol=1e-6)
    np.testing.assert_allclose(np.diag(labels[:, ::-1]), 1 - share, atol=1e-6)
    rows, columns = (partner[0, :, :, 0].any(axis) for axis in (1, 0))
    for line in (rows, columns):  # one rectangle
        assert (np.diff(np.flatnonzero(line)) == 1).all()
    assert partner[0, :, :, 0].sum() == rows.sum() * columns.sum()


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_mixup_blends_pairs_of_the_reversed_batch_by_one_share(batch):
    images, targets = _marked(batch, 3, 2)
    mixed, labels = mix(images, targets, jax.random.key(1), mixup=0.8, cutmix=0.0)
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    share = float(labels[0, 0]) if batch > 1 else 1.0
    numbers = np.arange(batch)
    expected = share * numbers + (1 - share) * numbers[::-1]
    np.testing.assert_allclose(mixed, np.broadcast_to(expected[:, None, None, None], mixed.shape),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def _shares(keys, **options):
    """Of each key, the image's own share by its label and whether it was cut."""
    images, targets = _marked(2, 32, 32)

    @jax.jit
    @jax.vmap
    def draw(key):
        mixed, labels = mix(images, targets, key, **options)
        pixels = mixed[1, :, :, 0]
        return labels[1, 1], ((pixels == 0) | (pixels == 1)).all()

    return (np.asarray(x) for x in draw(jax.random.split(jax.random.key(0), keys)))


def test_shares_and_the_switch_are_distributed_as_asked():
    share, cut = _shares(4000, **_BOTH)
    assert abs(cut.mean() - 0.5) < 0.03
    mixup = share[~cut]
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2·0.8 + 1))
    assert abs(mixup.mean() - 0.5) < 0.03
    assert abs(mixup.var() - 1 / (4 * 2.6)) < 0.01
    # Beta(1, 1) before the border cuts some of it off: less is the partner's
    assert 0.5 < share[cut].mean() < 0.75


@pytest.mark.parametrize(("probability", "which"), [(0.0, False), (1.0, True)])
def test_one_of_both_by_its_probability(probability, which):
    share, cut = _shares(200, **{**_BOTH, "cutmix_probability": probability})
    assert (cut[(share > 0.01) & (share < 0.99)] == which).all()


def test_some_steps_mix_nothing():
    share, _ = _shares(2000, **{**_BOTH, "mix_probability": 0.3})
    assert abs((share == 1).mean() - 0.7) < 0.05


def _erased(height, width, images=2000, probability=1.0):
    """Of many images, where noise is."""
    marker = jnp.full((images, height, width, 3), 100.0)
    noisy = jax.jit(lambda x: random_erase(x, jax.random.key(3), probability=probability))(marker)
    return np.asarray(noisy), np.asarray(noisy != 100.0).all(-1)


def test_erased_rectangles_are_of_the_sizes_asked_for():
    noisy, where = _erased(32, 40)
    assert where.any((1, 2)).all()
    heights, widths = (where.any(axis).sum(1) for axis in (2, 1))
    np.testing.assert_array_equal(where.sum((1, 2)), heights * widths)
    area = heights * widths / (32 * 40)
    assert area.min() > 0.01
    assert area.max() < 0.36  # a third, and rounding
    assert abs(area.mean() - 0.17) < 0.02  # somewhat fewer: those that don't fit are drawn again
    aspect = np.log(heights / widths)
    assert abs(aspect).max() < np.log(1 / 0.3) + 0.5
    assert abs(aspect.mean()) < 0.08
    values = noisy[np.broadcast_to(where[..., None], noisy.shape)]
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert (noisy[~where] == 100.0).all()
    top = where.any(2).argmax(1)
    left = where.any(1).argmax(1)
    assert (top.min(), left.min()) == (0, 0)
    assert (top + heights).max() == 32
    assert (left + widths).max() == 40


def test_erasing_by_its_probability():
    _, where = _erased(16, 16, probability=0.25)
    assert abs(where.any((1, 2)).mean() - 0.25) < 0.03


def test_nothing_is_erased_where_no_rectangle_fits():
    _, where = _erased(1, 8, images=20)
    assert not where.any()


def _batch(size=6):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(256, size=(size, 12, 10, 3), dtype=np.uint8),
        "label": rng.integers(4, size=size).astype(np.int32),
    }


_OPTIONS = {
    "preprocessing": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
    "label_smoothing": 0.1,
    "num_classes": 4,
}


def test_a_batch_without_augmentation_is_normalised_and_smoothed():
    off = {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0}
    batch = _batch()
    images, targets = prepare_batch(batch, jax.random.key(0), augment=off, **_OPTIONS)
    expected = (batch["image"] / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(targets, 0.9 * np.eye(4)[batch["label"]] + 0.1 / 4, rtol=1e-6)


def test_keys_differ_by_seed_and_step_and_from_drop_path():
    keys = [augmentation_key(seed, step) for seed in (0, 1) for step in (1, 2)]
    keys.append(jax.random.fold_in(jax.random.key(0), 1))
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 5


_SHARDED = """
    import functools, jax, numpy as np
    from tests.training.test_mixing import _BOTH, _OPTIONS, _batch
    from vvt_jax.distributed import sharding
    from vvt_jax.training.mixing import prepare_batch

    augment = {**_BOTH, "erase": 0.5, "mix_groups": 2}
    prepare = jax.jit(functools.partial(prepare_batch, augment=augment, **_OPTIONS))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "spatial": 2}, 8)
    (sharded,) = sharding.to_devices([_batch(8)], mesh)
    for seed in range(4):
        one = prepare(_batch(8), jax.random.key(seed))
        many = prepare(sharded, jax.random.key(seed))
        for a, b in zip(one, many):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    print("equal")
"""


def test_groups_are_mixed_by_themselves():
    augment = {**_BOTH, "erase": 0.0}
    batch, key = _batch(8), jax.random.key(3)

    def prepare(**changes):
        return prepare_batch(batch, key, augment={**augment, **changes}, **_OPTIONS)

    jax.tree.map(np.testing.assert_array_equal, prepare(), prepare(mix_groups=1))
    images, targets = prepare(mix_groups=4)
    plain, labels = prepare(mixup=0.0, cutmix=0.0)
    _, mix_key = jax.random.split(key)
    for group, group_key in enumerate(jax.random.split(mix_key, 4)):
        part = slice(2 * group, 2 * group + 2)
        expected = mix(plain[part], labels[part], group_key, **_BOTH)
        for x, y in zip((images[part], targets[part]), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    shares = {round(float(target.max()), 4) for target in targets}
    assert len(shares) > 2  # each group has one of its own


@pytest.mark.slow
def test_a_sharded_batch_is_prepared_alike():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = fork_server.run(["-c", textwrap.dedent(_SHARDED)], environment)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mixup", -0.1, "`mixup` must be 0 or more, not -0.1."),
        ("cutmix", -1.0, "`cutmix` must be 0 or more, not -1.0."),
        ("erase", 1.5, "`erase` is a probability from 0 to 1, not 1.5."),
        ("mix_probability", -0.5, "`mix_probability` is a probability from 0 to 1, not -0.5."),
        ("cutmix_probability", 2, "`cutmix_probability` is a probability from 0 to 1, not 2."),
    ],
)
def test_settings_out_of_range_are_named(field, value, words):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - compared whole
        check_mixing({**_BOTH, "erase": 0.25, field: value})
    assert str(refused.value) == words


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"The augmentation settings lack cutmix, erase\."):
        check_mixing({k: v for k, v in _BOTH.items() if k != "cutmix"})
