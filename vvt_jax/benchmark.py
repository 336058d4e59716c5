"""What a model costs: counted, compiled, and timed or, for a TPU that is not there, estimated.

    python -m vvt_jax.benchmark --model=vvt_tiny --size=224 --batch=8
    python -m vvt_jax.benchmark --model=vvt_tiny --batch=4 --train
    python -m vvt_jax.benchmark --size=512 --compare attention=vicinity attention=softmax
    python -m vvt_jax.benchmark --batch=64 --train --set dtype=bfloat16 --target=v5e:2x2
    python -m vvt_jax.benchmark --size=4096 --mesh=spatial:8

On a CPU, devices of the mesh that are not there are simulated. Timings are of the very programs
that evaluation and training run, in turn with a matrix product: the share of its rate says how well
a program uses the machine, however noisy that is.
"""

import argparse
import ast
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vvt_jax.costs import counting, hlo
from vvt_jax.distributed import sharding
from vvt_jax.models import VVT, create_model, forms, unstack_blocks
from vvt_jax.system.errors import UserError
from vvt_jax.training import mixing
from vvt_jax.training.optimizer import make_optimizer
from vvt_jax.training.step import init_state, make_train_step
from vvt_jax.weights.shapes import smallest_image

_MATMUL = 2048  # side of the matrices whose product is the yardstick
_LEAST_ROUNDS = 5
_GIB = 2**30
# Memory of one device, by the name that the compiler gives its kind.
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
        model: a name in `list_models()`.
        height: of the images, pixels.
        width: of the images, pixels.
        batch: images a call, over all devices.
        train: a training step (AdamW), or else a forward pass.
        fields: of the model, that differ from the named one's.
        forms: of operations, that differ from the platform's own; see `vvt_jax.models.forms`.
        mesh: devices along each axis; see `parallel.make_mesh`.
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
        """The setting after `"name=value name=value ..."`: its own fields, the model's, or forms
        (`form.depthwise`, `form.attention`).

        Raises:
            UserError: something else.
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
        """Raises UserError for a model or field that does not exist or fit."""
        try:
            return create_model(self.model, **self.fields)
        except ValueError as error:
            raise UserError(str(error)) from error


class Program:
    """The compiled program of a setting.

    Args:
        setting: what to compile.
        devices: to compile for, by default those that jax sees; they need not exist.
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
        """A call that runs the program once and waits for it; needs the devices."""
        return self._make_run()

    @functools.cached_property
    def chosen_forms(self) -> forms.Forms:
        """The forms that the program was compiled with."""
        place = sharding.compiling_for(self._mesh)
        with place, forms.use(**self.setting.forms) as chosen:
            return chosen

    @functools.cached_property
    def layers(self) -> list[counting.LayerCost]:
        """The forward cost of each layer on one image."""
        with forms.use(**dataclasses.asdict(self.chosen_forms)):
            return counting.count(self.model, self.setting.height, self.setting.width)

    @property
    def published_multiply_adds(self) -> int:
        """Of one image, in the published convention; three times as many for a training step."""
        return (3 if self.setting.train else 1) * sum(layer.published for layer in self.layers)

    def describe(self) -> dict[str, Any]:
        """All that is known without running: counted, and the compiler's own figures."""
        setting = self.setting
        memory: Any = self.compiled.memory_analysis()
        layers = self.layers
        estimate = self.compiled.cost_analysis() or {}
        collectives = hlo.collectives(self.compiled.as_text() or "")
        kinds, sizes = Counter(c.kind for c in collectives), Counter[str]()
        for collective in collectives:
            sizes[collective.kind] += collective.bytes
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        # What is donated counts once. For several chips only the peak is known.
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
    """Runs programs and the yardstick in turn, and describes each one's speed.

    Args:
        programs: of devices that exist.
        seconds: to measure for, all together, after one run of each that is not counted.

    Returns:
        For each program `images_per_second` and `matmul_flops` (medians), `quartiles` of the first,
        `rounds`, and `share`: the published multiply-adds' rate as a part of the yardstick's.
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
            multiply(side, side).block_until_ready()  # its best: with warm caches
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


def target_devices(target: str) -> Sequence[jax.Device]:
    """Devices of a TPU topology that is not there, e.g. `"v5e:2x2"`, to compile for.

    Raises:
        UserError: libtpu is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(target, platform="tpu").devices
    except Exception as error:  # libtpu's own kinds, and import errors of several layers
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"There is nothing to compile for {target!r} with ({reason}): it takes a topology such "
            "as v5e:2x2, and `pip install 'vvt-jax[tpu]'`."
        ) from error


def parse_size(text: str) -> tuple[int, int]:
    """`"224"` or `"512x1024"`, height by width in pixels."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"The size {text!r} is not understood: it is like 224, or 512x1024.")
    return int(sides[0]), int(sides[-1])


def parse_mesh(text: str) -> dict[str, int]:
    """`"data:2,spatial:2"`: devices along each axis."""
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


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of results, one column each, and of two also their ratio."""
    names = [_title(result) for result in results]
    rows: list[tuple[str, list[Any], Callable[[Any], str]]] = [
        (label, [result.get(key) for result in results], show)
        for label, key, show in _ROWS
        if any(result.get(key) is not None for result in results)
    ]
    lines = [["", *names, *(["ratio"] if len(results) == 2 else [])]]
    for label, values, show in rows:
        cells = ["unknown" if value is None else show(value) for value in values]
        if len(values) == 2:
            numbers = all(isinstance(v, int | float) for v in values) and values[0]
            cells.append(f"{values[1] / values[0]:.3f}" if numbers else "")
        lines.append([label, *cells])
    kinds = sorted({kind for result in results for kind in result["collectives"]})
    for kind in kinds:
        found = [result["collectives"].get(kind) for result in results]
        cells = [f"{c['count']} of {_bytes(c['bytes'])}" if c else "none" for c in found]
        lines.append([f"{kind}s", *cells, *([""] if len(results) == 2 else [])])
    if any(r["chip_bytes"] for r in results):
        fits = [
            "yes" if r["peak_bytes"] <= r["chip_bytes"] else "NO" if r["chip_bytes"] else "unknown"
            for r in results
        ]
        lines.append(["fits its memory", *fits, *([""] if len(results) == 2 else [])])
    return _align(lines)


def report_layers(result: Mapping[str, Any]) -> str:
    """A table of one result's layers."""
    lines = [["layer", "multiply-adds", "done here", "activations"]]
    for layer in result["layers"]:
        counts = (layer["published"], layer["actual"], layer["activations"])
        lines.append([layer["path"], *(f"{n:,}" for n in counts)])
    sums = (sum(x[k] for x in result["layers"]) for k in ("published", "actual", "activations"))
    return _align([*lines, ["sum", *(f"{n:,}" for n in sums)]])


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _billions(count: float) -> str:
    return f"{count / 1e9:.3f} G"


# Label, key in a result, how to show it.
_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("device", "device", str),
    ("devices", "devices", str),
    ("forms", "forms", lambda forms: ", ".join(forms.values())),
    ("parameters", "parameters", "{:,}".format),
    ("multiply-adds an image, published convention", "multiply_adds", _billions),
    ("multiply-adds an image, done here", "multiply_adds_actual", _billions),
    ("activations an image", "activations", lambda n: f"{n / 1e6:.2f} M"),
    ("images/s, median", "images_per_second", "{:.2f}".format),
    ("images/s, quartiles", "quartiles", lambda q: f"{q[0]:.2f} to {q[1]:.2f}"),
    ("matrix product, median", "matmul_flops", lambda n: f"{n / 1e9:.0f} GFLOP/s"),
    ("share of the matrix product's rate", "share", "{:.1%}".format),
    ("rounds", "rounds", str),
    ("compile time", "compile_seconds", "{:.1f} s".format),
    ("temporaries a device", "temporary_bytes", _bytes),
    ("arguments a device", "argument_bytes", _bytes),
    ("peak a device", "peak_bytes", _bytes),
    ("memory of the device", "chip_bytes", _bytes),
    ("floating-point operations a device, compiler's estimate", "flops", _billions),
    ("bytes accessed a device, compiler's estimate", "bytes_accessed", _bytes),
)


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in lines
    ]
    return "\n".join("  ".join(cells) for cells in padded)


def _title(result: Mapping[str, Any]) -> str:
    setting = result["setting"]
    words = [
        setting["model"],
        f"{setting['height']}x{setting['width']}",
        f"batch {setting['batch']}",
        "train" if setting["train"] else "forward",
        *(f"{name}={value}" for name, value in setting["fields"].items()),
    ]
    return " ".join(words)


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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vvt_jax.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vvt_tiny", help="default: %(default)s")
    parser.add_argument("--size", default="224", help="pixels, or HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=1, help="images a call, over all devices")
    parser.add_argument("--train", action="store_true", help="a training step, not a forward pass")
    parser.add_argument(
        "--set",
        default="",
        metavar="'NAME=VALUE ...'",
        help="fields of the model, e.g. 'dtype=bfloat16 depths=(2,2,6,2)', or form.depthwise=...",
    )
    parser.add_argument(
        "--mesh", default="data:1", help="e.g. data:2,spatial:2; a CPU simulates the devices"
    )
    parser.add_argument("--target", help="compile for a TPU that is not there, e.g. v5e:2x2")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("'NAME=VALUE ...'", "'NAME=VALUE ...'"),
        help="two settings in turn, each given by what differs; also size, batch, model, train",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    parser.add_argument("--no-run", action="store_true", help="compile only")
    parser.add_argument("--layers", action="store_true", help="also a table of the layers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    flags = _parse(arguments)
    height, width = parse_size(flags.size)
    base = Setting(
        model=flags.model,
        height=height,
        width=width,
        batch=flags.batch,
        train=flags.train,
        mesh=parse_mesh(flags.mesh),
    ).changed(flags.set)
    settings = [base.changed(text) for text in flags.compare] if flags.compare else [base]
    wanted = max(math.prod(setting.mesh.values()) for setting in settings)
    if wanted > 1 and not flags.target:
        sharding.simulate_devices(wanted)
    devices = target_devices(flags.target) if flags.target else None
    programs = [Program(setting, devices) for setting in settings]
    results = [program.describe() for program in programs]
    if not (flags.target or flags.no_run):
        for result, timing in zip(results, time_in_turn(programs, flags.seconds), strict=True):
            result.update(timing)
    print(report(results))
    if flags.target:
        print("\nThe compiler's estimates for devices that are not here: nothing was run.")
    if flags.layers:
        for result in results:
            print(f"\n{_title(result)}\n{report_layers(result)}")
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
