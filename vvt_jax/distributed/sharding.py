"""The device mesh, the layout of arrays on it, and the transfer of batches to the devices."""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vvt_jax.models import forms
from vvt_jax.models.convolution import row_groups
from vvt_jax.models.vvt import SMALLEST_SIDE
from vvt_jax.system.errors import UserError

AXES = ("data", "fsdp", "spatial")
_BATCH = PartitionSpec(("data", "fsdp"))
_IMAGES = PartitionSpec(("data", "fsdp"), "spatial")  # an image's rows are split over "spatial"
_WITH_ROWS = ("image", "segmentation")  # arrays of a batch that have an image's rows
_SIMULATING = "xla_force_host_platform_device_count"
_PATIENCE = (  # timeouts of simulated devices, in seconds
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
)
_IN_FLIGHT = 2  # batches in transfer to the devices while one is computed
_PROGRAMS_AHEAD = 2  # unfinished dispatched programs; more would only keep batches in memory


def make_mesh(
    sizes: Mapping[str, int],
    batch_size: int,
    *,
    height: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a device mesh with the axes `AXES`.

    Args:
        sizes: the number of devices along each axis. One of them may be -1, for all remaining
            devices.
        batch_size: the global batch size, which must be divisible by the number of devices that
            share a batch.
        height: the height of the images in pixels, if known. It must be divisible by the number of
            devices that share an image.
        devices: the devices, by default all that JAX sees.

    Raises:
        UserError: the sizes don't fit the devices, the batch or the images.
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
    # This concerns only the images, because JAX places arrays on devices in equal parts. The
    # model's feature maps may have any number of rows: `convolution.split_rows` lays them out.
    if height is not None and height % shape[2]:
        below = height - height % shape[2]
        near = [n for n in (below, below + shape[2]) if n >= SMALLEST_SIDE]
        raise UserError(
            f"config.data.size: {height} rows do not divide over the {shape[2]} devices that share "
            f"an image (mesh spatial); the nearest that do are {' and '.join(map(str, near))}."
        )
    # Linen's random streams require automatic axes, while JAX now defaults to explicit ones.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract(mesh_shardings: Any, shapes: Any) -> Any:
    """Combine a tree of shapes and dtypes with a tree of shardings of the same structure."""
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
    """Compile a function for the mesh of its arguments, with the best forms and compiler options.

    Args:
        use: either `"forward"` or `"train"`, see `forms.compiler_options`.
        function: a pure function.
        *arguments: trees of `jax.ShapeDtypeStruct` with shardings on one mesh.
        donate: the positions of the arguments whose buffers are donated to the results.
        out_shardings: the shardings of the results, by default chosen by the compiler.
    """
    mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    program = jax.jit(
        function,
        donate_argnums=donate,
        out_shardings=out_shardings,
        compiler_options=forms.compiler_options(use, mesh.devices.flat[0].platform),
    )
    with compiling_for(mesh):
        return program.lower(*arguments).compile()


def compiling_for(mesh: Mesh) -> contextlib.AbstractContextManager[forms.Forms]:
    """Return `forms.compiling_for` for a mesh's platform and the way its devices share images."""
    return forms.compiling_for(
        mesh.devices.flat[0].platform,
        spatial=mesh.shape["spatial"],
        rows=NamedSharding(mesh, _IMAGES),
    )


def describe_mesh(mesh: Mesh) -> str:
    """Return one line that describes the mesh and the forms chosen for it."""
    with compiling_for(mesh) as chosen:
        told = ", ".join(f"{name} {form}" for name, form in dataclasses.asdict(chosen).items())
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    count, kind = mesh.devices.size, mesh.devices.flat[0].device_kind
    return f"{count} device(s) of kind {kind}: {axes}. Forms: {told}."


def describe_rows(mesh: Mesh, height: int, strides: Sequence[int]) -> str | None:
    """Describe how the rows of a model's feature maps are split, if the split is uneven, else None.

    Args:
        mesh: the mesh of devices.
        height: the height of the images, in pixels.
        strides: the strides of the model's feature maps, in pixels, each of them a multiple of the
            previous one.
    """
    devices = mesh.shape["spatial"]
    if devices == 1 or height % (devices * strides[-1]) == 0:
        return None
    maps = [math.ceil(height / stride) for stride in strides]
    groups = [row_groups(rows, devices) for rows in maps]
    most = [
        math.ceil(rows / (devices if n > 1 else 1)) for rows, n in zip(maps, groups, strict=True)
    ]
    more = most[0] * devices / maps[0] - 1
    return (
        f"{devices} devices share the {height} rows of an image, which {devices * strides[-1]} "
        f"does not divide: the model's maps of {_listed(maps)} rows are split into "
        f"{_listed(groups)} groups, of up to {_listed(most)} rows. This takes more memory than an "
        f"even split ({more:.0%} more for the largest map)."
    )


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def layout_table(abstract_state: Any) -> list[tuple[str, str, str, int]]:
    """Return the path, shape, partition and bytes per device of each array of a state, in order.

    Args:
        abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings.
    """
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            "x".join(map(str, leaf.shape)) or "scalar",
            ", ".join(str(axis or "-") for axis in leaf.sharding.spec) or "whole",
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        )
        for path, leaf in jax.tree.leaves_with_path(abstract_state)
    ]


def layout_report(abstract_state: Any, largest: int | None = None) -> str:
    """Format `layout_table` as text, with the bytes per device of each part and of the whole state.

    Args:
        abstract_state: a training state of `jax.ShapeDtypeStruct` with shardings.
        largest: the number of parameters to list, beginning with the largest; by default, all
            arrays of the state are listed in their order.
    """
    table = layout_table(abstract_state)
    sums: collections.Counter[str] = collections.Counter()
    for path, _, _, size in table:
        sums[path.partition("/")[0]] += size
    shown = table
    if largest is not None:  # the optimizer state has the same layout
        parameters = [row for row in table if row[0].startswith("params/")]
        shown = sorted(parameters, key=lambda row: -row[3])[:largest]
    lines = [("array", "shape", "partition", "bytes a device")]
    lines += [(path, shape, spec, f"{size:,}") for path, shape, spec, size in shown]
    if left := len(table) - len(shown):
        lines.append((f"and {left} more", "", "", ""))
    lines += [(f"sum of {part}", "", "", f"{size:,}") for part, size in sums.items()]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
    lines.append((f"sum, of {whole:,} in all", "", "", f"{sum(sums.values()):,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ([*map(str.ljust, line[:3], widths), line[3].rjust(widths[3])] for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def simulate_devices(count: int) -> None:
    """Make a CPU simulate `count` devices, unless `XLA_FLAGS` already sets their number.

    Call this before the first use of JAX's devices; after that, it has no effect.
    """
    if _SIMULATING not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # in use already
            jax.config.update("jax_num_cpu_devices", count)
    give_simulated_devices_time()


def give_simulated_devices_time() -> None:
    """Let devices that share a CPU wait for one another for an hour instead of 40 seconds.

    XLA ends the program if one of them takes longer, which always happens with large images and few
    cores. This does nothing if no devices are simulated, and keeps timeouts that `XLA_FLAGS`
    already sets. Call it before the first use of JAX's devices.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if _SIMULATING in given or jax.config.values["jax_num_cpu_devices"] > 1:
        missing = [flag for flag in _PATIENCE if flag.partition("=")[0] not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Return a tree of shardings that split each array of a state over "fsdp".

    An array is split along its largest dimension that divides evenly, and replicated if there is
    none. The first dimension of stacked blocks, which the model scans over, is never split.
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
    """Return the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(mesh: Mesh, batch: Iterable[str]) -> dict[str, NamedSharding]:
    """Return shardings for the named arrays of a batch.

    Examples are split over data and fsdp, and the rows of images over spatial.
    """
    return {
        name: NamedSharding(mesh, _IMAGES if name.startswith(_WITH_ROWS) else _BATCH)
        for name in batch
    }


def abstract_batch(
    mesh: Mesh, arrays: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a batch to compile for, from the shape and dtype of each array."""
    shardings = batch_shardings(mesh, arrays)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[name])
        for name, (shape, dtype) in arrays.items()
    }


def abstract_like(arrays: Any) -> Any:
    """Return the shapes, dtypes and shardings of arrays that are on the devices."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the indices of a global batch's examples that this process's devices hold.

    This includes examples that they hold only in part. The result is int `[examples]`, ascending.
    """
    pieces = NamedSharding(mesh, _BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique([np.arange(batch_size)[piece] for piece in pieces])


def to_devices(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, batch_size: int | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Transfer batches to the devices ahead of their use, to overlap transfers with computation.

    Args:
        batches: the examples `local_rows(mesh, batch_size)` of each global batch.
        mesh: the mesh of devices, including those of other processes.
        batch_size: the global batch size, or None if every process provides all examples of each
            batch.
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


class Dispatched:
    """A short queue of results from dispatched programs that may not have finished yet.

    It is kept short because each program holds its batch until it has run, and because simulated
    devices deadlock when many communicating programs wait for the same threads.
    """

    def __init__(self) -> None:
        self._results: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> list[Any]:
        """Add a result, wait until at most two are left, and return those that are done, if any."""
        self._results.append(result)
        return self._wait(_PROGRAMS_AHEAD)

    def finish(self) -> list[Any]:
        """Wait for all results, and return those that `add` has not returned, in order."""
        return self._wait(0)

    def _wait(self, left: int) -> list[Any]:
        count = max(0, len(self._results) - left)
        return [jax.block_until_ready(self._results.popleft()) for _ in range(count)]
