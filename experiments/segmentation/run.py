"""What segmenters cost: each layer's parameters and multiply-adds, and large images measured.

    python -m experiments.segmentation.run [layers] [large]

`layers` counts (a minute) and writes layers.md. `large` times and weighs vvt_tiny with Semantic FPN
on this machine, up to 2048x1024 pixels, and on simulated devices that share the rows of an image;
the machine should do nothing else (about ten minutes on two cores). Each size is a process.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from vvt_jax.models import counting, create_segmenter
from vvt_jax.models.shapes import variable_shapes
from vvt_jax.system.huge_pages import restart_with_huge_pages

HERE = Path(__file__).parent
SIZES = ("vvt_small", "vvt_medium", "vvt_large")
# The paper's table on ADE20K (arXiv 2206.10552): parameters in M, multiply-adds in G at 512².
PRINTED = {
    "fpn": {"vvt_small": (29.2, 50.9), "vvt_medium": (51.7, 70.8), "vvt_large": (65.5, 78.1)},
    "upernet": {"vvt_small": (55.5, 240), "vvt_medium": (77.9, 260), "vvt_large": (91.9, 267)},
}
_LARGE = ((512, 256), (512, 512), (1024, 512), (1024, 1024), (2048, 1024))  # width, height
_CLASSES = 19  # a street scene's


def layers() -> None:
    """layers.md: a row for each layer, a column for each backbone."""
    text = [
        "# Parameters and multiply-adds of segmenters, layer by layer",
        "",
        "150 classes; multiply-adds of one image of 512x512 pixels, counted from the program (as",
        "`vvt_jax.costs` does). The auxiliary head runs in training only. Layers",
        "without multiply-adds are norms.",
    ]
    for head, printed in PRINTED.items():
        rows: dict[str, dict[str, tuple[int, int]]] = {}
        for name in SIZES:
            for path, cost in _layers(name, head).items():
                rows.setdefault(path, {})[name] = cost
        text += ["", f"## {head}", "", f"| layer | {' | '.join(SIZES)} |", "|---|---|---|---|"]
        for path, by_size in rows.items():
            cells = [_cell(*by_size.get(name, (0, 0))) for name in SIZES]
            text.append(f"| {path} | {' | '.join(cells)} |")
        totals, tolds = [], []
        for name in SIZES:
            parameters = sum(cost[name][0] for cost in rows.values() if name in cost)
            products = sum(cost[name][1] for cost in rows.values() if name in cost)
            totals.append(f"{parameters / 1e6:.3f} M, {products / 1e9:.3f} G")
            tolds.append(
                f"{printed[name][0]} M, {printed[name][1]} G "
                f"({products / 1e9 / printed[name][1] - 1:+.2%})"
            )
        text.append(f"| **all** | {' | '.join(totals)} |")
        text.append(f"| printed (multiply-adds differ by) | {' | '.join(tolds)} |")
    (HERE / "layers.md").write_text("\n".join(text) + "\n")


def _layers(name: str, head: str) -> dict[str, tuple[int, int]]:
    """(parameters, multiply-adds) by layer, in the order of the forward pass."""
    model = create_segmenter(name, head=head)
    products = {layer.path: layer.published for layer in counting.count(model, 512, 512)}
    parameters: dict[str, int] = {}
    for path, shape in variable_shapes(model).items():
        if path.startswith("params/"):
            layer = path.removeprefix("params/").rpartition("/")[0]
            parameters[layer] = parameters.get(layer, 0) + math.prod(shape)
    paths = [*products, *(path for path in parameters if path not in products)]
    return {path: (parameters.get(path, 0), products.get(path, 0)) for path in paths}


def _cell(parameters: int, products: int) -> str:
    return f"{parameters:,}, {products / 1e9:.4f} G" if products else f"{parameters:,}"


def large() -> None:
    """large.json and large.md: seconds and memory against the size of an image."""
    rows = []
    for devices in (1, 2, 4):
        for width, height in _LARGE if devices == 1 else _LARGE[-1:]:
            done = subprocess.run(
                [sys.executable, "-m", "experiments.segmentation.run", "one", str(width),
                 str(height), str(devices)],
                env={**os.environ,
                     "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1])
    (HERE / "large.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = [
        "| width x height | devices that share its rows | seconds | temporaries a device "
        "| the process at its peak |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        text.append(
            f"| {row['width']}x{row['height']} | {row['devices']} | {row['seconds']:.2f} | "
            f"{row['temporary_bytes'] / 1e6:.0f} MB | {row['peak_bytes'] / 1e9:.2f} GB |"
        )
    (HERE / "large.md").write_text("\n".join(text) + "\n")


def _one(width: int, height: int, devices: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vvt_jax.distributed import sharding

    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "spatial": devices}, 1, height=height)
    model = create_segmenter("vvt_tiny", num_classes=_CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    layout = sharding.state_shardings(mesh, shapes)
    variables = jax.jit(model.init, out_shardings=layout)(
        jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    images = sharding.abstract_batch(mesh, {"image": ((1, height, width, 3), np.float32)})
    program = sharding.compile_program(
        "forward", model.apply, sharding.abstract(layout, shapes), images["image"]
    )
    image = jax.device_put(
        np.random.default_rng(0).normal(size=images["image"].shape).astype(np.float32),
        images["image"].sharding,
    )
    program(variables, image).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        program(variables, image).block_until_ready()
        seconds.append(time.perf_counter() - start)
    told = {
        "width": width,
        "height": height,
        "devices": devices,
        "seconds": min(seconds),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(told))


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["one"]:
        _one(*map(int, arguments[1:]))
        return
    parts = {"layers": layers, "large": large}
    for name in arguments or parts:
        if name not in parts:
            sys.exit(f"error: there is no part {name!r}: they are {', '.join(parts)}.")
        parts[name]()


if __name__ == "__main__":
    restart_with_huge_pages()
    main(sys.argv[1:])
