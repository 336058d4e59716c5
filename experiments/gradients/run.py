"""Gradients on meshes of simulated devices, compared with those of one device.

    python -m experiments.gradients.run

Every case compares all parameter gradients of one model, image size and mesh. The results are in
`results.json`, written after each case. A case that is already there is not run again, so the
command continues where it was stopped; delete the file to start over.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vvt_jax.distributed import sharding
from vvt_jax.system import storage

RESULTS = Path(__file__).parent / "results.json"
DEVICES = 8
TOLERANCE = 1e-4  # of an array's norm; XLA's fault is a factor of 2 or more
# How often the difference that rounding makes on one device is allowed. It is large where gradients
# are what is left when larger ones cancel, as before a batch normalisation of two values.
_ROUNDINGS = 3
_WIDTH = 32  # pixels
_CLASSES = 5

# Rows for 2, 4 and 8 devices. At most of them 32 times the devices does not divide the height.
_SHARED = (
    32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144, 152, 160, 168, 176, 184,
    192, 200, 216, 232, 256, 264, 296, 328, 520, 600, 1080,
)  # fmt: skip
HEIGHTS = {
    2: (*_SHARED, 34, 66, 130),
    4: (*_SHARED, 36, 100, 132),
    8: (*_SHARED, 272, 416, 720),
}
_HEAD_HEIGHTS = {2: (72,), 4: (72, 136), 8: (72, 136, 264)}
_MESH_HEIGHT = 72


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        head: `"fpn"`, `"upernet"`, or `"classifier"` for a model without a segmentation head.
        height: of the images, in pixels.
        mesh: devices along data, fsdp and spatial.
        batch: number of images.
        bands: of rows in the feed-forward networks.
    """

    head: str
    height: int
    mesh: tuple[int, int, int]
    batch: int = 2
    bands: int = 1

    @property
    def name(self) -> str:
        """What identifies the case in the results."""
        axes = " x ".join(f"{axis} {n}" for axis, n in zip(sharding.AXES, self.mesh, strict=True))
        return f"{self.head}, {self.height} rows, {axes}, batch {self.batch}, bands {self.bands}"


def cases() -> Iterator[Case]:
    """All of them; those that share a reference follow one another."""
    sizes = [2**i for i in range(DEVICES.bit_length())]
    meshes = [
        (data, fsdp, DEVICES // (data * fsdp))
        for data in sizes
        for fsdp in sizes
        if data * fsdp <= DEVICES
    ]
    for mesh in meshes:
        yield Case("classifier", _MESH_HEIGHT, mesh, batch=DEVICES)
    for mesh in ((1, 1, 8), (1, 1, 4), (1, 2, 4), (2, 2, 2)):
        yield Case("classifier", _MESH_HEIGHT, mesh, batch=DEVICES, bands=3)
    for height in sorted({height for heights in HEIGHTS.values() for height in heights}):
        for devices, heights in HEIGHTS.items():
            if height in heights:
                yield Case("classifier", height, (1, 1, devices))
    for head in ("fpn", "upernet"):
        for height in sorted({height for heights in _HEAD_HEIGHTS.values() for height in heights}):
            for devices, heights in _HEAD_HEIGHTS.items():
                if height in heights:
                    yield Case(head, height, (1, 1, devices))


@functools.lru_cache(maxsize=2)
def _problem(head: str, height: int, batch: int) -> tuple[Any, Any, Any]:
    """Variables, a batch, and its gradients on one device with whole maps."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        _model(head, 1).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)
    )
    # Spread as in a trained model, and away from the zeros and ones that parameters start from
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: _random_parameter(rng, jax.tree_util.keystr(path), x.shape), shapes
    )
    arrays = {"image": rng.standard_normal((batch, height, _WIDTH, 3)).astype(np.float32)}
    if head == "classifier":
        arrays["label"] = rng.integers(_CLASSES, size=batch).astype(np.int32)
    else:
        places = (batch, height, _WIDTH)
        arrays["segmentation"] = rng.integers(_CLASSES, size=places).astype(np.int32)
    gradients = jax.jit(_gradients(head, 1), compiler_options=_options())(variables, arrays)
    return variables, arrays, jax.device_get(gradients)


def _random_parameter(rng: Any, path: str, shape: tuple[int, ...]) -> Any:
    import numpy as np

    noise = rng.standard_normal(shape).astype(np.float32)
    if "kernel" in path:
        inputs = np.prod(shape[1 if "blocks" in path else 0 : -1])
        return noise / np.sqrt(max(1, inputs)).astype(np.float32)
    return (1 if "scale" in path or "var" in path else 0) + noise * np.float32(0.1)


def _model(head: str, bands: int) -> Any:
    import vvt_jax

    # Where the published clamp acts it has no gradient, so rounding could change gradients there
    fields: dict[str, Any] = {"num_classes": _CLASSES, "clamp": False, "ffn_bands": bands}
    if head == "classifier":
        return vvt_jax.create_model("vvt_nano", **fields)
    return vvt_jax.create_segmenter("vvt_nano", head=head, head_channels=16, dropout=0.0, **fields)


def _gradients(head: str, bands: int) -> Any:
    import jax

    model = _model(head, bands)

    def loss(params: Any, others: Any, batch: Any) -> Any:
        variables = {"params": params, **others}
        if head == "classifier":
            outputs, labels = (model.apply(variables, batch["image"]),), batch["label"]
        else:
            outputs, _ = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
            labels = batch["segmentation"]
        chosen = [
            jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, _CLASSES)
            for logits in outputs
            if logits is not None
        ]
        return -sum(each.sum() for each in chosen) / labels.size

    def gradients(variables: Any, batch: Any) -> Any:
        others = {name: part for name, part in variables.items() if name != "params"}
        return jax.value_and_grad(loss)(variables["params"], others, batch)

    return gradients


def _options() -> dict[str, Any]:
    """XLA distributes a program before it optimises it: the fault is there without."""
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _differences(expected: Any, actual: Any) -> dict[str, float]:
    """By the name of each array, the norm of its difference as a part of its own norm."""
    import jax
    import numpy as np

    least = 1e-4 * max(np.linalg.norm(x) for x in jax.tree.leaves(expected))
    pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(
            np.linalg.norm(a - b) / max(np.linalg.norm(a), least)
        )
        for (path, a), b in pairs
    }


@functools.lru_cache(maxsize=1)
def _rounding(head: str, height: int, batch: int) -> dict[str, float]:
    """The same between two programs of one device, with and without XLA's optimisations."""
    import jax

    variables, arrays, (_, expected) = _problem(head, height, batch)
    _, other = jax.device_get(jax.jit(_gradients(head, 1))(variables, arrays))
    return _differences(expected, other)


def compare(case: Case) -> dict[str, Any]:
    """How far the gradients of a case are from those of one device."""
    import jax
    import numpy as np

    from vvt_jax.costs import hlo

    start = time.perf_counter()
    variables, arrays, (loss, expected) = _problem(case.head, case.height, case.batch)
    sizes = dict(zip(sharding.AXES, case.mesh, strict=True))
    devices = jax.devices()[: int(np.prod(case.mesh))]
    mesh = sharding.make_mesh(sizes, case.batch, height=case.height, devices=devices)
    layout = sharding.state_shardings(mesh, variables)
    (batch,) = sharding.to_devices([arrays], mesh)
    with sharding.compiling_for(mesh):
        program = (
            jax.jit(
                _gradients(case.head, case.bands),
                out_shardings=(sharding.replicated(mesh), layout["params"]),
                compiler_options=_options(),
            )
            .lower(jax.device_put(variables, layout), batch)
            .compile()
        )
    other_loss, actual = jax.device_get(program(jax.device_put(variables, layout), batch))
    far = _differences(expected, actual)
    suspects = [name for name, value in far.items() if not value <= TOLERANCE]
    rounding = _rounding(case.head, case.height, case.batch) if suspects else {}
    wrong = [name for name in suspects if not far[name] <= _ROUNDINGS * rounding[name]]
    kinds = [collective.kind for collective in hlo.collectives(program.as_text())]
    return {
        "loss": abs(float(other_loss) / float(loss) - 1),
        "largest_difference": max(far.values()),
        "arrays": len(far),
        "wrong": wrong,
        "explained_by_rounding": len(suspects) - len(wrong),
        "rounding_on_one_device": max((rounding[name] for name in suspects), default=None),
        "collectives": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(results: dict[str, Any]) -> str:
    """The results in the form of the README's table."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases():
        if case.name in results:
            groups.setdefault(_group(case), []).append(results[case.name])
    lines = [
        "| cases | number | with a wrong gradient | largest difference |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {len(found)} | {sum(bool(each['wrong']) for each in found)} | "
        f"{max(each['largest_difference'] for each in found):.1e} |"
        for name, found in groups.items()
    ]
    return "\n".join(lines)


def _group(case: Case) -> str:
    if case.bands > 1:
        return "classifier, feed-forward networks in bands"
    if case.batch == DEVICES:
        return f"classifier, every mesh of {DEVICES} devices"
    return f"{case.head}, rows over {case.mesh[2]} devices"


def main() -> None:
    sharding.simulate_devices(DEVICES)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in cases():
        if case.name in results:
            continue
        found = results[case.name] = compare(case)
        told = f"wrong: {', '.join(found['wrong'])}" if found["wrong"] else "right"
        print(f"{case.name}: {found['largest_difference']:.1e}, {told}", flush=True)
        storage.replace(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    print(table(results))


if __name__ == "__main__":
    main()
