"""Measure what a model costs: counted, compiled, and timed (or estimated, for an absent TPU).

    python -m vvt_jax.benchmark --model=vvt_tiny --size=224 --batch=8
    python -m vvt_jax.benchmark --model=vvt_tiny --batch=4 --train
    python -m vvt_jax.benchmark --size=512 --compare attention=vicinity attention=softmax
    python -m vvt_jax.benchmark --batch=64 --train --set dtype=bfloat16 --target=v5e:2x2
    python -m vvt_jax.benchmark --size=4096 --mesh=spatial:8

On a CPU, missing devices of the mesh are simulated. Timings are of exactly the programs that
evaluation and training run. They alternate with a matrix product: the rate relative to that product
says how well a program uses the machine, however noisy the machine is.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before jax is imported: the restart would import it twice
    from vvt_jax.system.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from vvt_jax.costs.program import Program, Setting, parse_mesh, parse_size, time_in_turn
from vvt_jax.costs.report import report, report_layers, title_of
from vvt_jax.costs.targets import target_devices
from vvt_jax.distributed import sharding
from vvt_jax.system.command_line import ending_in_a_sentence


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
    """Run the command that the module docstring describes."""
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
            print(f"\n{title_of(result)}\n{report_layers(result)}")
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with ending_in_a_sentence():
        main()
