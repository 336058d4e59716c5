"""What VVT costs, from counts and compilations: tables and plots, written beside this file.

    python -m experiments.costs.run [sizes] [resolution] [pixels] [chip]

`sizes` and `resolution` count (seconds). `pixels` compiles and times vvt_tiny's forward pass on
this machine, which should do nothing else (under 10 minutes on two cores). `chip` compiles for a
TPU v5e (half an hour) and needs the extra `tpu`. Each part writes its JSON when it is done, and
draws from it.
"""

import dataclasses
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vvt_jax.costs.program import Program, Setting, time_in_turn
from vvt_jax.costs.targets import target_devices
from vvt_jax.models import counting, create_model
from vvt_jax.system.errors import UserError

HERE = Path(__file__).parent
SIZES = ("vvt_tiny", "vvt_small", "vvt_medium", "vvt_large")
# Read off the paper's figure (arXiv 2206.10552), ±3 G.
PRINTED = {
    "VVT-L": {448: 41, 512: 55, 640: 88, 800: 138, 1024: 227, 1280: 351},
    "PVT-L": {512: 56, 800: 176, 1280: 648},
    "PVTv2-b4": {512: 69, 800: 206},
    "Swin-B": {512: 92, 800: 244},
    "ResNet152": {512: 60, 800: 148, 1280: 376},
}
CHIP, CHIP_BYTES = "v5e:2x2", int(15.75 * 2**30)  # what the compiler leaves of 16 GiB
_CHIP_STEP = 32  # pixels


def sizes() -> None:
    """Parameters, multiply-adds and activations of the four sizes."""
    rows = []
    for name in SIZES:
        model = create_model(name)
        row = {"model": name, "parameters": counting.parameter_count(model)}
        for side in (224, 384, 512):
            layers = counting.count(model, side, side)
            row[f"multiply_adds_{side}"] = sum(layer.published for layer in layers)
            row[f"activations_{side}"] = sum(layer.activations for layer in layers)
        rows.append(row)
    _write("sizes", rows)
    lines = [
        "| model | parameters | multiply-adds at 224 / 384 / 512 | activations at 224 |",
        "|---|---|---|---|",
    ]
    for row in rows:
        counts = " / ".join(f"{row[f'multiply_adds_{s}'] / 1e9:.3f} G" for s in (224, 384, 512))
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {counts} | "
            f"{row['activations_224'] / 1e6:.1f} M |"
        )
    (HERE / "sizes.md").write_text("\n".join(lines) + "\n")


def resolution() -> None:
    """Multiply-adds against resolution, beside the printed points of other backbones."""
    sides = list(range(224, 1281, 96))
    counted = {
        name: [sum(x.published for x in counting.count(create_model(name), s, s)) for s in sides]
        for name in SIZES
    }
    _write("resolution", {"sides": sides, "multiply_adds": counted, "printed_giga": PRINTED})
    figure, axes = plt.subplots(figsize=(7, 5))
    for name, values in counted.items():
        axes.plot(sides, [v / 1e9 for v in values], label=f"{name}, counted")
    for name, points in PRINTED.items():
        axes.plot(list(points), list(points.values()), "o:", alpha=0.7, label=f"{name}, printed")
    axes.set(xlabel="side of the image, pixels", ylabel="multiply-adds, 10⁹")
    axes.set_title("Cost against resolution")
    _save(figure, axes, "resolution")


def pixels() -> None:
    """Forward time and temporary memory here, vicinity against softmax attention."""
    results = []
    for side in (224, 384, 512, 768, 1024, 1536, 2048):
        programs = []
        for attention in ("vicinity", "softmax"):
            setting = Setting("vvt_tiny", side, side, fields={"attention": attention})
            program = Program(setting)
            found = program.describe()
            result = {"attention": attention, "side": side} | {
                key: found[key] for key in ("temporary_bytes", "peak_bytes", "multiply_adds")
            }
            results.append(result)
            if found["peak_bytes"] < 12e9:  # what is left on a machine of 24 GB for two of them
                programs.append((program, result))
        timings = time_in_turn([program for program, _ in programs], 15)
        for (_, result), timing in zip(programs, timings, strict=True):
            result["seconds"] = 1 / timing["images_per_second"]
            result["share"] = timing["share"]
        print(*results[-2:], sep="\n")
        _write("pixels", results)
    draw_pixels()


def draw_pixels() -> None:
    """The plot of `pixels`, from what it wrote."""
    results = json.loads((HERE / "pixels.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    for attention in ("vicinity", "softmax"):
        own = [r for r in results if r["attention"] == attention]
        timed = [r for r in own if "seconds" in r]
        left.loglog([r["side"] ** 2 for r in timed], [r["seconds"] for r in timed], "o-")
        right.loglog(
            [r["side"] ** 2 for r in own],
            [r["temporary_bytes"] / 1e9 for r in own],
            "o-",
            label=f"{attention} attention",
        )
    right.axhline(24, color="grey", linestyle=":", label="this machine's memory")
    left.set(xlabel="pixels", ylabel="seconds an image", title="Forward time, 2 cores, float32")
    right.set(xlabel="pixels", ylabel="GB of temporaries", title="Forward memory, compiled")
    _save(figure, right, "pixels")


def chip() -> None:
    """The largest square image, one at a time, that fits a 16 GB chip, by the TPU's compiler."""
    found = []
    for train in (False, True):
        for attention in ("vicinity", "softmax"):
            fields = {"attention": attention, "dtype": "bfloat16", "unroll": False}
            tried = _try_sides(Setting("vvt_tiny", train=train, fields=fields))
            fits = [side for side, peak in tried.items() if _fits(peak)]
            found.append(
                {
                    "attention": attention,
                    "train": train,
                    "largest_side_that_fits": max(fits),
                    "peak_bytes_by_side": tried,
                }
            )
            _write("chip", found)
    draw_chip()


def _fits(peak: int | str) -> bool:
    return not isinstance(peak, str) and peak <= CHIP_BYTES


def _try_sides(setting: Setting) -> dict[int, int | str]:
    """Peak memory (bytes, or why not) by side, up to one that does not fit and a few % below it,
    guessed from how memory grows."""
    devices, tried = target_devices(CHIP), {}
    growth = 2 if setting.fields["attention"] == "vicinity" else 4  # of memory with the side

    def fits(side: int) -> bool:
        try:
            program = Program(dataclasses.replace(setting, height=side, width=side), devices)
            tried[side] = program.describe()["peak_bytes"]
        except (UserError, RuntimeError) as error:  # the compiler's own "does not fit"
            tried[side] = str(error).partition("\n")[0][:160]
        print(setting.train, setting.fields["attention"], side, tried[side], flush=True)
        return _fits(tried[side])

    def longer(side: int, factor: float) -> int:
        return int(side * factor) // _CHIP_STEP * _CHIP_STEP

    side = 512
    while fits(side):
        guess = longer(side, min(4.0, 0.98 * (CHIP_BYTES / tried[side]) ** (1 / growth)))
        side = max(guess, longer(side, 1.06))
    while sum(map(_fits, tried.values())) < 2 or max(tried) > 1.1 * max(
        side for side, peak in tried.items() if _fits(peak)
    ):
        side = longer(side, 0.94)
        fits(side)
    return tried


def draw_chip() -> None:
    """The plot of `chip`, from what it wrote."""
    results = json.loads((HERE / "chip.json").read_text())
    figure, axes = plt.subplots(figsize=(7, 2.8))
    for row, result in enumerate(reversed(results)):
        side = result["largest_side_that_fits"]
        colour = "C0" if result["attention"] == "vicinity" else "C1"
        axes.barh(row, side, color=colour)
        axes.text(side + 60, row, f"{side}²", va="center")
    labels = [
        f"{'training' if r['train'] else 'inference'}, {r['attention']}" for r in reversed(results)
    ]
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="side of the largest square image, pixels", xlim=(0, 7000))
    axes.set_title("vvt_tiny in bfloat16 on a TPU v5e of 16 GB (compiled, not run)")
    figure.tight_layout()
    figure.savefig(HERE / "chip.png", dpi=110)
    plt.close(figure)


def _write(name: str, content: object) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _save(figure, axes, name: str) -> None:
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parts = {part.__name__: part for part in (sizes, resolution, pixels, chip)}
    chosen = sys.argv[1:] or list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        sys.exit(f"error: There is no part {unknown[0]!r}: there are {', '.join(parts)}.")
    for name in chosen:
        parts[name]()
