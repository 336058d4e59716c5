"""Devices: the mesh, what is laid out where, and the way of a batch onto the devices."""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vvt_jax import forms
from vvt_jax.errors import UserError

AXES = ("data", "fsdp", "spatial")
_BATCH = PartitionSpec(("data", "fsdp"))
_IMAGES = PartitionSpec(("data", "fsdp"), "spatial")  # rows of an image over "spatial"
_WITH_ROWS = ("image", "segmentation")  # arrays of a batch that have an image's rows
_IN_FLIGHT = 2  # batches that are on their way to the devices while one is computed


def make_mesh(
    sizes: Mapping[str, int],
    batch_size: int,
    *,
    height: int | None = None,
    stride: int = 32,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `AXES`.

    Args:
        sizes: devices along each axis; one of them may be -1, for all that are left.
        batch_size: global; has to divide over the axes that share a batch.
        height: of the images in pixels, if known; has to divide over the axis that shares them.
        stride: of the model's last map, in pixels.
        devices: by default all that jax sees.

    Raises:
        UserError: sizes that do not fit the devices, the batch or the images.
    """
    shape = [int(sizes[axis]) for axis in AXES]
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(n for n in shape if n != -1)
    told = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape) or len(devices) % max(fixed, 1):
        raise UserError(
            f"config.mesh ({told}) does not fit {len(devices)} device(s): "
            "sizes are positive, at most one is -1, and they multiply to the number of devices."
        )
    shape = [len(devices) // fixed if n == -1 else n for n in shape]
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh ({told}) uses {math.prod(shape)} of {len(devices)} device(s): "
            "set one size to -1 to use all that are left."
        )
    if batch_size < 1 or batch_size % (shape[0] * shape[1]):
        raise UserError(
            f"config.batch_size={batch_size} does not divide over the {shape[0] * shape[1]} "
            "devices that share a batch (mesh data x fsdp)."
        )
    if height is not None and height % shape[2]:
        raise UserError(
            f"config.data.size: {height} rows do not divide over the {shape[2]} devices that share "
            "an image (mesh spatial)."
        )
    # Measured: over 8 devices, weight gradients of strided convolutions come out wrong by tenths,
    # without a word, where maps have fewer rows (XLA of jax 0.10); over 2 and 4 they are right.
    if height is not None and shape[2] > max(4, rows := math.ceil(height / stride)):
        raise UserError(
            f"config.mesh.spatial={shape[2]} is too much for images of {height} rows: the model's "
            f"last map has {rows} rows, and gradients would be wrong."
        )
    # linen's random streams want automatic axes; explicit ones are today's default
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract(mesh_shardings: Any, shapes: Any) -> Any:
    """Shapes and dtypes with their shardings, two trees of one structure."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        mesh_shardings,
    )


def compile_program(
    use: str,
    function: Callable[..., Any],
    *arguments: Any,
    donate: tuple[int, ...] = (),
    out_shardings: Any = None,
) -> jax.stages.Compiled:
    """Compiles a function for its arguments' mesh, with the forms and compiler options best there.

    Args:
        use: `"forward"` or `"train"`, see `forms.compiler_options`.
        function: pure.
        *arguments: trees of `jax.ShapeDtypeStruct` with shardings on one mesh.
        donate: positions of the arguments whose memory the results take over.
        out_shardings: of the results; by default the compiler's choice.
    """
    mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    platform = mesh.devices.flat[0].platform
    program = jax.jit(
        function,
        donate_argnums=donate,
        out_shardings=out_shardings,
        compiler_options=forms.compiler_options(use, platform),
    )
    with forms.compiling_for(platform, spatial=mesh.shape["spatial"]):
        return program.lower(*arguments).compile()


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A tree of shardings for a state: each array's largest dimension that divides, over "fsdp".

    The first dimension of stacked blocks, which the model scans over, is left whole.
    """

    def sharding(path, leaf) -> NamedSharding:
        stacked = any(getattr(part, "key", None) == "blocks" for part in path)
        sizes = [
            (size, axis)
            for axis, size in enumerate(leaf.shape)
            if size % mesh.shape["fsdp"] == 0 and not (stacked and axis == 0)
        ]
        if mesh.shape["fsdp"] == 1 or not sizes:
            return NamedSharding(mesh, PartitionSpec())
        _, axis = max(sizes, key=lambda pair: pair[0])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of what is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(mesh: Mesh, batch: Iterable[str]) -> dict[str, NamedSharding]:
    """Shardings for the named arrays of a batch: examples over data and fsdp, rows over spatial."""
    return {
        name: NamedSharding(mesh, _IMAGES if name.startswith(_WITH_ROWS) else _BATCH)
        for name in batch
    }


def abstract_batch(
    mesh: Mesh, arrays: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch to compile for: the shape and dtype of each array, with its sharding."""
    shardings = batch_shardings(mesh, arrays)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[name])
        for name, (shape, dtype) in arrays.items()
    }


def abstract_like(arrays: Any) -> Any:
    """Shapes, dtypes and shardings of arrays that are on the devices."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which examples of a global batch the devices of this process hold, whole or in part: int
    `[examples]`, rising."""
    pieces = NamedSharding(mesh, _BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique([np.arange(batch_size)[piece] for piece in pieces])


def to_devices(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, batch_size: int | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Puts batches on the devices, some ahead of their use, so that transfers hide behind steps.

    Args:
        batches: of each global batch the examples `local_rows(mesh, batch_size)`.
        mesh: of the devices, also those of other processes.
        batch_size: global; None where every process gives all of its examples.
    """

    def put(batch):
        size = batch_size or len(next(iter(batch.values())))
        rows = local_rows(mesh, size)

        def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
            def piece(index):
                if batch_size is None:
                    return array[index]
                examples = range(size)[index[0]]
                first = np.searchsorted(rows, examples.start)
                return array[(slice(first, first + len(examples)), *index[1:])]

            return jax.make_array_from_callback((size, *array.shape[1:]), sharding, piece)

        shardings = batch_shardings(mesh, batch)
        return {name: place(array, shardings[name]) for name, array in batch.items()}

    ahead: collections.deque[dict[str, jax.Array]] = collections.deque()
    batches = iter(batches)
    for batch in itertools.islice(batches, _IN_FLIGHT):
        ahead.append(put(batch))
    while ahead:
        yield ahead.popleft()
        for batch in itertools.islice(batches, 1):
            ahead.append(put(batch))
