"""Makes timm.npz: what timm's own transforms make of pictures that a formula gives.

    pip install timm torchvision pillow
    python tests/data/make_timm_fixtures.py

It needs neither JAX nor this project; the tests need neither timm nor PyTorch. In the file:

- `meta`, a JSON (as uint8): `versions` of what made it; `evaluation`, a list of [height, width]
  of the picture, size of the model's input, crop fraction; `operations`, a list of [name,
  magnitude], where a magnitude below 0 stands for timm's random sign; `refused`, those of them
  that raised an error; `sweep`, the names in the rows of `arguments`; `fill`, the colour of what
  moves in.
- `evaluation_sha256` `[cases, 32]`, of the bytes of timm's evaluation image (bicubic), and
  `evaluation_sample` `[cases, 96]`, evenly spaced bytes of it, to see how far a difference goes.
- `operations_sha256` and `operations_sample`: the same of each RandAugment operation on
  `picture(48, 64)`, with the colour and the interpolation that timm's training transform hands on
  in the published recipe; zeros where it was refused.
- `magnitudes` `[n]` and `arguments` `[names, n]`: what timm hands an operation at each magnitude.
"""

import hashlib
import json
import pathlib
import sys
import types
from unittest import mock

import numpy as np

SPECIFICATIONS = ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc0")
_EVALUATION = [
    [picture, size, fraction]
    for size, fraction in (([224, 224], 0.875), ([384, 384], 0.875), ([192, 256], 0.875))
    for picture in ([375, 500], [500, 333], [256, 256], [97, 201])
] + [[[300, 451], [224, 224], 0.9], [[61, 32], [32, 32], 1.0]]
_MAGNITUDES = (0, 3, 5, 9, 10)
_SAMPLE = 96


def picture(height: int, width: int) -> np.ndarray:
    """uint8 `[height, width, 3]`: gradients, edges and noise, by whole numbers alone."""
    y, x, channel = np.ogrid[:height, :width, :3]
    right, down = 85 * x // width, 85 * y // height  # up to 84 from one side to the other
    gradient = np.choose(channel, [2 * right, 2 * down, right + 85 - down])
    edges = 40 * ((x // 11 + y // 7 + channel) % 2)
    noise = ((x * 73856093) ^ (y * 19349663) ^ (channel * 83492791)) // 32 % 37
    return (gradient + edges + noise + 5).astype(np.uint8)


def fingerprint(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The SHA-256 sum and a sample of the bytes, both uint8."""
    values = np.ascontiguousarray(pixels).ravel()
    sum_ = np.frombuffer(hashlib.sha256(values.tobytes()).digest(), np.uint8)
    return sum_, values[np.linspace(0, values.size - 1, _SAMPLE).astype(int)]


def _evaluate(create_transform, image, size, fraction):
    transform = create_transform(
        tuple(size), interpolation="bicubic", crop_pct=fraction, normalize=False
    )
    return transform(image).numpy().transpose(1, 2, 0)


def _operations(create_transform):
    """timm's operations as the published recipe sets them up, without their randomness."""
    found = {}
    for specification in SPECIFICATIONS:
        transform = create_transform(
            224, is_training=True, auto_augment=specification, interpolation="bicubic"
        )
        policy = next(part for part in transform.transforms if hasattr(part, "ops"))
        for operation in policy.ops:
            operation.prob, operation.magnitude_std = 1.0, 0.0
            found[operation.name] = operation
    return found


def main() -> None:
    # torchvision describes its compiled operators to torch at import; where torch is of another
    # build they are missing, and none is used here.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("not needed")
    import PIL.Image
    import timm
    import torch
    import torchvision
    from timm.data import auto_augment, create_transform

    def negated(magnitude):
        # timm negates where a random number is above a half.
        chance = types.SimpleNamespace(random=lambda: 0.0 if magnitude >= 0 else 1.0)
        return mock.patch.object(auto_augment, "random", chance)

    evaluation = [
        fingerprint(_evaluate(create_transform, PIL.Image.fromarray(picture(*shape)), *rest))
        for shape, *rest in _EVALUATION
    ]
    operations = _operations(create_transform)
    cases, refused, results = [], [], []
    small = PIL.Image.fromarray(picture(48, 64))
    magnitudes = np.linspace(-10, 10, 201)
    sweep, arguments = [], []
    for name, operation in operations.items():
        to_arguments = operation.level_fn
        signed = False
        if to_arguments:
            values = []
            for magnitude in magnitudes:
                with negated(magnitude):
                    values += to_arguments(abs(magnitude), operation.hparams)
            signed = values[0] != values[-1]
            sweep.append(name)
            arguments.append(values)
        for magnitude in _MAGNITUDES if to_arguments else (0,):
            for sign in (1, -1) if signed and magnitude else (1,):
                operation.magnitude = magnitude
                cases.append([name, sign * magnitude])
                with negated(sign * magnitude):
                    try:
                        results.append(fingerprint(np.asarray(operation(small))))
                    except ValueError:
                        refused.append(cases[-1])
                        results.append((np.zeros(32, np.uint8), np.zeros(_SAMPLE, np.uint8)))
    (fill,) = {operation.kwargs["fillcolor"] for operation in operations.values()}
    meta = {
        "versions": {
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "timm": timm.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "evaluation": _EVALUATION,
        "operations": cases,
        "refused": refused,
        "sweep": sweep,
        "fill": fill,
    }
    np.savez_compressed(
        pathlib.Path(__file__).with_name("timm.npz"),
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
        evaluation_sha256=np.stack([sum_ for sum_, _ in evaluation]),
        evaluation_sample=np.stack([sample for _, sample in evaluation]),
        operations_sha256=np.stack([sum_ for sum_, _ in results]),
        operations_sample=np.stack([sample for _, sample in results]),
        magnitudes=magnitudes,
        arguments=np.array(arguments, np.float64),
    )


if __name__ == "__main__":
    main()
