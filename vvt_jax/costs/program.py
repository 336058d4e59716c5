"""A program of a model, compiled and timed exactly as evaluation and training run it."""

import ast
import dataclasses
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vvt_jax.costs import hlo
from vvt_jax.distributed import sharding
from vvt_jax.models import VVT, counting, create_model, forms, unstack_blocks
from vvt_jax.models.shapes import smallest_image
from vvt_jax.system.errors import UserError
from vvt_jax.training import mixing
from vvt_jax.training.optimizer import make_optimizer
from vvt_jax.training.step import init_state, make_train_step

_MATMUL = 2048  # side of the square matrices whose product is the yardstick
_LEAST_ROUNDS = 5
_GIB = 2**30
# Memory of one device in bytes, by the compiler's name for its kind.
_CHIP_BYTES = {
    "TPU v3": 16 * _GIB,
    "TPU v4": 32 * _GIB,
    "TPU v5 lite": 16 * _GIB,
    "TPU v5": 95 * _GIB,
    "TPU v6 lite": 32 * _GIB,
}
_OPTIMIZER = {
    "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05, "clip_norm": 1.0,
    "layer_decay": 1.0, "freeze": (),
}  # fmt: skip
_AUGMENT = {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0}
_PREPROCESSING = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: the name of the model, from `list_models()`.
        height: height of the images, in pixels.
        width: width of the images, in pixels.
        batch: the number of images per call, over all devices.
        train: whether to run a training step (AdamW) instead of a forward pass.
        fields: the model fields that differ from those of the named model.
        forms: the forms of operations that differ from the platform's default; see
            `vvt_jax.models.forms`.
        mesh: the number of devices along each axis; see `sharding.make_mesh`.
    """

    model: str = "vvt_tiny"
    height: int = 224
    width: int = 224
    batch: int = 1
    train: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def changed(self, text: str) -> "Setting":
        """Return the setting with the changes `"name=value name=value ..."` applied.

        The names are fields of the setting, fields of the model, or forms (`form.depthwise`,
        `form.attention`).

        Raises:
            UserError: a part of the text is malformed.
        """
        setting = self
        for part in text.split():
            name, equals, value = part.partition("=")
            if not equals:
                raise UserError(f"{part!r} is no setting: it has to be name=value.")
            if name == "size":
                height, width = parse_size(value)
                setting = dataclasses.replace(setting, height=height, width=width)
            elif name == "mesh":
                setting = dataclasses.replace(setting, mesh=parse_mesh(value))
            elif name.startswith("form."):
                chosen = {**setting.forms, name.removeprefix("form."): value}
                setting = dataclasses.replace(setting, forms=chosen)
            elif name == "train":
                if value.lower() not in ("true", "false"):
                    raise UserError(f"train={value} is not understood: it is True or False.")
                setting = dataclasses.replace(setting, train=value.lower() == "true")
            elif name == "batch":
                if not (value.isascii() and value.isdigit()):
                    raise UserError(f"batch={value} is not understood: it is a whole number.")
                setting = dataclasses.replace(setting, batch=int(value))
            elif name == "model":
                setting = dataclasses.replace(setting, model=value)
            else:
                fields = {**setting.fields, name: _literal(value)}
                setting = dataclasses.replace(setting, fields=fields)
        return setting

    def make_model(self) -> VVT:
        """Create the model of the setting.

        Raises:
            UserError: the model or a field does not exist, or a value does not fit.
        """
        try:
            return create_model(self.model, **self.fields)
        except ValueError as error:
            raise UserError(str(error)) from error


class Program:
    """The compiled program of a setting.

    Args:
        setting: what to compile.
        devices: the devices to compile for, which need not exist; by default those that jax sees.
    """

    def __init__(self, setting: Setting, devices: Sequence[jax.Device] | None = None):
        self.setting = setting
        self.model = setting.make_model()
        self._mesh = _make_mesh(setting, devices)
        start = time.perf_counter()
        try:
            with forms.use(**setting.forms):
                build = self._build_train_step if setting.train else self._build_forward
                self.compiled, self._make_run = build()
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        self.compile_seconds = time.perf_counter() - start
        device = self._mesh.devices.flat[0]
        self.platform, self.device_kind = device.platform, device.device_kind
        self.devices = self._mesh.devices.size

    def _abstract(self, shapes: Any) -> Any:
        return sharding.abstract(sharding.state_shardings(self._mesh, shapes), shapes)

    def _abstract_batch(self, **arrays: tuple[tuple[int, ...], Any]) -> dict[str, Any]:
        shapes = {name: jax.ShapeDtypeStruct(*kind) for name, kind in arrays.items()}
        return sharding.abstract(sharding.batch_shardings(self._mesh, shapes), shapes)

    def _build_forward(self) -> tuple[jax.stages.Compiled, Callable]:
        shape = (self.setting.batch, self.setting.height, self.setting.width, 3)
        images = self._abstract_batch(image=(shape, jnp.float32))["image"]

        def init():
            return unstack_blocks(self.model.init(jax.random.key(0), smallest_image()))

        variables = self._abstract(jax.eval_shape(init))
        compiled = sharding.compile_program("forward", self.model.apply, variables, images)

        def make_run():
            own = _initialise(init, variables)
            drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
            given = jax.device_put(drawn, images.sharding)
            return lambda: jax.block_until_ready(compiled(own, given))

        return compiled, make_run

    def _build_train_step(self) -> tuple[jax.stages.Compiled, Callable]:
        setting = self.setting
        shape = (setting.batch, setting.height, setting.width, 3)
        optimizer = make_optimizer(_OPTIMIZER, lambda _: 1e-4)
        init = functools.partial(
            init_state, self.model, optimizer, (1, setting.height, setting.width, 3), 0, ema=False
        )
        state = self._abstract(jax.eval_shape(init))
        batch = self._abstract_batch(image=(shape, jnp.uint8), label=(shape[:1], jnp.int32))
        prepare = functools.partial(
            mixing.prepare_batch,
            preprocessing=_PREPROCESSING,
            augment=_AUGMENT,
            label_smoothing=0.1,
            num_classes=self.model.num_classes,
        )
        step = make_train_step(self.model, optimizer, prepare=prepare)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        compiled = sharding.compile_program(
            "train", step, state, batch, donate=(0,), out_shardings=shardings
        )

        def make_run():
            rng = np.random.default_rng(0)
            arrays = {
                "image": rng.integers(256, size=shape, dtype=np.uint8),
                "label": rng.integers(self.model.num_classes, size=shape[:1], dtype=np.int32),
            }
            given = {name: jax.device_put(a, batch[name].sharding) for name, a in arrays.items()}
            own = _initialise(init, state)

            def run():
                nonlocal own
                own = jax.block_until_ready(compiled(own, given))

            return run

        return compiled, make_run

    def make_run(self) -> Callable[[], Any]:
        """Return a function that runs the program once and waits for it; the devices must exist."""
        return self._make_run()

    @functools.cached_property
    def chosen_forms(self) -> forms.Forms:
        """The forms of operations that the program was compiled with."""
        place = sharding.compiling_for(self._mesh)
        with place, forms.use(**self.setting.forms) as chosen:
            return chosen

    @functools.cached_property
    def layers(self) -> list[counting.LayerCost]:
        """The cost of each layer in the forward pass on one image."""
        with forms.use(**dataclasses.asdict(self.chosen_forms)):
            return counting.count(self.model, self.setting.height, self.setting.width)

    @property
    def published_multiply_adds(self) -> int:
        """Multiply-adds per image, by the published convention; three times that for training."""
        return (3 if self.setting.train else 1) * sum(layer.published for layer in self.layers)

    def describe(self) -> dict[str, Any]:
        """Return what is known without running the program: counts and the compiler's figures."""
        setting = self.setting
        memory: Any = self.compiled.memory_analysis()
        layers = self.layers
        estimate = self.compiled.cost_analysis() or {}
        collectives = hlo.collectives(self.compiled.as_text() or "")
        kinds, sizes = Counter(c.kind for c in collectives), Counter[str]()
        for collective in collectives:
            sizes[collective.kind] += collective.bytes
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        # Donated buffers count once. For several chips, only the peak is known.
        sum_of_parts = arguments + temporaries + memory.output_size_in_bytes
        sum_of_parts -= memory.alias_size_in_bytes
        peak = max(sum_of_parts, getattr(memory, "peak_memory_in_bytes", 0) or 0)
        return {
            "setting": dataclasses.asdict(setting),
            "device": self.device_kind,
            "devices": self.devices,
            "forms": dataclasses.asdict(self.chosen_forms),
            "parameters": counting.parameter_count(self.model),
            "multiply_adds": self.published_multiply_adds,
            "multiply_adds_actual": (3 if setting.train else 1) * sum(x.actual for x in layers),
            "activations": sum(layer.activations for layer in layers),
            "layers": [dataclasses.asdict(layer) for layer in layers],
            "compile_seconds": self.compile_seconds,
            "argument_bytes": arguments,
            "temporary_bytes": temporaries,
            "peak_bytes": peak,
            "chip_bytes": _CHIP_BYTES.get(self.device_kind),
            "flops": estimate.get("flops"),
            "bytes_accessed": estimate.get("bytes accessed"),
            "collectives": {k: {"count": kinds[k], "bytes": sizes[k]} for k in sorted(kinds)},
        }


def time_in_turn(programs: Sequence[Program], seconds: float) -> list[dict[str, Any]]:
    """Run programs and the yardstick, a matrix product, in turn and measure their speed.

    Args:
        programs: programs compiled for devices that exist.
        seconds: the total time to measure for, after one run of each program that does not count.

    Returns:
        For each program, `images_per_second` and `matmul_flops` (medians), `quartiles` of the
        former, `rounds`, and `share`: the rate of the published multiply-adds as a fraction of the
        yardstick's.
    """
    side = jax.random.normal(jax.random.key(0), (_MATMUL, _MATMUL))
    multiply = jax.jit(jnp.matmul).lower(side, side).compile()
    runs = [program.make_run() for program in programs]
    for run in runs:
        run()
    multiply(side, side).block_until_ready()

    times: list[list[float]] = [[] for _ in programs]
    yardstick: list[list[float]] = [[] for _ in programs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < _LEAST_ROUNDS:
        for i, run in enumerate(runs):
            # A first run warms the caches, so that the yardstick runs at its best
            multiply(side, side).block_until_ready()
            yardstick[i].append(_seconds(lambda: multiply(side, side).block_until_ready()))
            times[i].append(_seconds(run))

    measured = []
    for program, taken, reference in zip(programs, times, yardstick, strict=True):
        batch = program.setting.batch
        rate = batch / statistics.median(taken)
        matmul_flops = 2 * _MATMUL**3 / statistics.median(reference)
        low, _, high = statistics.quantiles([batch / t for t in taken], n=4)
        measured.append(
            {
                "images_per_second": rate,
                "quartiles": [low, high],
                "rounds": len(taken),
                "matmul_flops": matmul_flops,
                "share": 2 * program.published_multiply_adds * rate / matmul_flops,
            }
        )
    return measured


def parse_size(text: str) -> tuple[int, int]:
    """Parse `"224"` or `"512x1024"`, height by width in pixels."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"The size {text!r} is not understood: it is like 224, or 512x1024.")
    return int(sides[0]), int(sides[-1])


def parse_mesh(text: str) -> dict[str, int]:
    """Parse `"data:2,spatial:2"`, the number of devices along each axis."""
    mesh = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in sharding.AXES or not size.removeprefix("-").isdecimal():
            raise UserError(
                f"The mesh {text!r} is not understood: it is like data:2,spatial:2, of "
                f"{', '.join(sharding.AXES)}."
            )
        mesh[axis] = int(size)
    return mesh


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _make_mesh(setting: Setting, devices: Sequence[jax.Device] | None):
    sizes = {axis: setting.mesh.get(axis, 1) for axis in sharding.AXES}
    devices = jax.devices() if devices is None else devices
    if -1 not in sizes.values():
        devices = devices[: int(np.prod(list(sizes.values())))]
    return sharding.make_mesh(sizes, setting.batch, height=setting.height, devices=devices)


def _initialise(init: Callable[[], Any], abstract: Any) -> Any:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    options = forms.compiler_options("init")
    return jax.jit(init, out_shardings=shardings, compiler_options=options)()
