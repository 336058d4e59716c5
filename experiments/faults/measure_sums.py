"""What the sums of a checkpoint cost, beside writing it.

    python -m experiments.faults.measure_sums --model=vvt_tiny

The state is that of a training run: parameters, two moments of AdamW. Prints the bytes of a
checkpoint's files, the processor time of their sums, and the processor time of the whole save.
"""

import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from vvt_jax import create_model
from vvt_jax.training.checkpoint import Best, Checkpoints
from vvt_jax.training.checksums import SUMS, verify_sums

_MODEL = flags.DEFINE_string("model", "vvt_tiny", "A name of vvt_jax.list_models().")


def main(_) -> None:
    model = create_model(_MODEL.value)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)  # what can be compressed would be less on disk
    state = {
        name: jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes)
        for name in ("params", "mu", "nu")
    }
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        with Checkpoints(Path(folder), keep=1) as checkpoints:
            checkpoints.save(1, state, Best())
            handed_over = time.process_time()
        saved = time.process_time()
        item = Path(folder) / "1" / "state"
        verify_sums(item)
        verified = time.process_time()
        size = sum(p.stat().st_size for p in item.rglob("*") if p.is_file() and p.name != SUMS)
    print(
        f"{_MODEL.value}: {size / 1e6:.0f} MB of files; seconds of processor time: "
        f"{saved - begun:.2f} to save, of which {handed_over - begun:.2f} hold the loop up; "
        f"{verified - saved:.2f} for the sums."
    )


if __name__ == "__main__":
    app.run(main)
