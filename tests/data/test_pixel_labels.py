"""Images and masks in training, and whole images in batches, against plain forms."""

import numpy as np
import PIL.Image
import pytest

from configs import common
from vvt_jax.data import pixel_labels
from vvt_jax.data.examples import BrokenImageError, Source
from vvt_jax.data.pixel_labels import IGNORED, train_example, whole_image_batches, whole_size

_RECORD = {
    "size": [32, 48],
    "crop_fraction": 1.0,
    "interpolation": "nearest",
    "mean": [0.5, 0.25, 1.0],
    "std": [0.5, 0.5, 0.5],
}


def _augment(**changes):
    settings = {**common.get_config().augment.to_dict(), "flip": False, "scale": (1.0, 1.0)}
    return {**settings, **changes}


def _example(height, width):
    """Each pixel's red value is its class."""
    mask = np.random.default_rng(height * width).integers(0, 9, (height, width), dtype=np.uint8)
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = mask
    return {"image": image, "label": mask}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(40, 70), (70, 40), (20, 24)])
def test_image_and_mask_are_changed_alike(size, flip):
    rng = np.random.default_rng(0)
    for _ in range(5):
        made = train_example(_example(*size), rng, _RECORD, _augment(flip=flip, scale=(0.5, 2.0)))
        image, mask = made["image"], made["segmentation"]
        assert image.shape == (32, 48, 3)
        assert mask.shape == (32, 48)
        filled = mask == IGNORED
        assert not filled.all()
        np.testing.assert_array_equal(image[..., 0][~filled], mask[~filled])
        np.testing.assert_array_equal(
            image[filled], np.broadcast_to([128, 64, 255], image[filled].shape)
        )


def test_mirrored_every_other_time():
    example = {"image": np.zeros((32, 48, 3), np.uint8), "label": np.zeros((32, 48), np.uint8)}
    example["label"][:, :24] = 1
    rng = np.random.default_rng(0)
    lefts = [
        train_example(example, rng, _RECORD, _augment(flip=True, class_share=1.0))["segmentation"][
            0, 0
        ]
        for _ in range(40)
    ]
    assert 10 < sum(lefts) < 30


def test_no_class_fills_more_than_its_share_of_a_crop():
    example = {"image": np.zeros((32, 480, 3), np.uint8), "label": np.zeros((32, 480), np.uint8)}
    example["label"][:, 240:] = 1
    example["label"][:16] = IGNORED  # does not count
    rng = np.random.default_rng(0)

    def shares(limit):
        for _ in range(20):
            mask = train_example(example, rng, _RECORD, _augment(class_share=limit))["segmentation"]
            counts = np.bincount(mask[mask != IGNORED], minlength=2)
            yield counts.max() / counts.sum()

    assert sum(share > 0.75 for share in shares(1.0)) > 12
    assert sum(share <= 0.75 for share in shares(0.75)) > 5  # ten tries at one in ten


def test_distortion_keeps_the_shape_and_leaves_some_images_alone():
    image = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    )
    changed = [
        np.asarray(pixel_labels.photometric_distortion(image, np.random.default_rng(seed)))
        for seed in range(64)
    ]
    same = sum((c == np.asarray(image)).all() for c in changed)
    assert 0 < same < 12  # all four are off in one of sixteen
    assert {c.shape for c in changed} == {(8, 8, 3)}
    means = [c.astype(float).mean() for c in changed]
    assert np.std(means) > 10


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (512, 672)), ((100, 75), (672, 512)), ((512, 512), (512, 512)),
     ((100, 5000), (32, 2048)), ((683, 512), (672, 512))],
)  # fmt: skip
def test_whole_size_is_a_multiple_of_32_near_the_proportions(size, expected):
    assert whole_size(*size, 512) == expected


def test_whole_images_come_once_with_their_own_masks():
    sizes = [(40, 60), (60, 40), (41, 61), (40, 60), (64, 64)]
    source = Source([_example(*size) for size in sizes], ("a",) * 9, "test", "all", pixels=True)
    inference = {"short_side": 32, "scales": [1.0, 2.0]}
    batches = list(
        whole_image_batches(
            source, record=_RECORD, inference=inference, batch_size=2, broken=[], threads=2
        )
    )
    found = []
    for batch in batches:
        assert batch["image_1"].shape[1] == 2 * batch["image"].shape[1]
        assert len(batch["image"]) == len(batch["mask"]) == 2
        for i in range(2):
            height, width = batch["own_size"][i]
            inside = np.zeros(batch["segmentation"].shape[1:], bool)
            inside[:height, :width] = batch["mask"][i]
            assert (batch["segmentation"][i][~inside] == IGNORED).all()
            if batch["mask"][i]:
                found.append(batch["segmentation"][i, :height, :width].tobytes())
    assert sorted(found) == sorted(e["label"].tobytes() for e in source.examples)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scale": (2.0, 0.5)}, "`scale` must be"),
        ({"class_share": 0.0}, "`class_share` must be"),
        ({"mixup": 0.2}, "`mixup` is for classification"),
        ({"randaugment": "rand-m9"}, "`randaugment` is for classification"),
    ],
)
def test_settings_that_cannot_be_meant(change, told):
    with pytest.raises(ValueError, match=told):
        pixel_labels.check_augment(_augment(**change))


class _OneBroken(list):
    def __getitem__(self, index):
        if index == 1:
            raise BrokenImageError("This one is broken.")
        return super().__getitem__(index)


def test_broken_images_are_left_out_and_numbered():
    examples = _OneBroken([_example(40, 50)] * 3)
    source = Source(examples, ("a",) * 9, "test", "all", pixels=True)
    broken = []
    (batch,) = whole_image_batches(
        source,
        record=_RECORD,
        inference={"short_side": 32, "scales": [1.0]},
        batch_size=4,
        broken=broken,
        threads=0,
    )
    assert broken == [1]
    assert batch["mask"].tolist() == [True, True, False, False]
