"""Another head on VVT's four maps: a detector's feature pyramid (FPN) with levels P2 to P6.

    python -m experiments.backbone

The contract: `model.features(images, train)` gives maps `[batch, h, w, channels]` at strides 4, 8,
16 and 32, finest first. Inside another module the backbone is a sub-module like any other.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

import vvt_jax
from vvt_jax.models import VVT


# example: begin
class DetectorPyramid(nn.Module):
    """Lateral 1×1 and smoothing 3×3 convolutions; P6 is every second pixel of P5."""

    backbone: VVT
    channels: int = 256

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Normalised `[batch, height, width, 3]` -> `{"p2": [batch, h, w, channels], ...}`."""
        maps = self.backbone.features(images, train)
        inner = [
            nn.Conv(self.channels, (1, 1), name=f"inner{i + 2}")(m) for i, m in enumerate(maps)
        ]
        for i in (2, 1, 0):
            inner[i] += jax.image.resize(inner[i + 1], inner[i].shape, "nearest")
        levels = {
            f"p{i + 2}": nn.Conv(self.channels, (3, 3), name=f"layer{i + 2}")(x)
            for i, x in enumerate(inner)
        }
        levels["p6"] = levels["p5"][:, ::2, ::2]
        return levels


def main() -> None:
    backbone = vvt_jax.create_model("vvt_tiny", num_classes=0)  # or load_pretrained(...)[0]
    model = DetectorPyramid(backbone)
    images = jnp.zeros((1, 256, 320, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    # variables["params"]["backbone"] is what load_pretrained gives as variables["params"]
    for name, level in jax.jit(model.apply)(variables, images).items():
        print(name, level.shape)


# example: end


if __name__ == "__main__":
    main()
