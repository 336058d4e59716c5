"""Giant images: memory and time against pixels, rows over devices, feed-forward networks in bands.

    python -m experiments.giant.run [memory] [devices] [bands] [time] [bands_time] [equal] [chip]

All of vvt_tiny, one image. `memory`, `devices` and `bands` compile (a few minutes each). `time`,
`bands_time` and `equal` run, the first two on a machine that should do nothing else (under 15
minutes each on two cores). `chip` compiles for a TPU v5e (up to half an hour) and needs the extra
`tpu`. Each part writes its JSON when it is done, and draws from what is there.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from vvt_jax.costs.program import Program, Setting, time_in_turn
from vvt_jax.costs.targets import target_devices
from vvt_jax.distributed import sharding
from vvt_jax.system.huge_pages import restart_with_huge_pages

HERE = Path(__file__).parent
SIDES = (512, 768, 1024, 1536, 2048, 3072, 4096)
LONGEST_TIMED = 2048  # pixels
BANDS = (1, 2, 4, 8, 16, 32)
TIMED_BANDS = (1, 4, 16)
TIME_BANDS = 4  # where time is drawn against pixels
DEVICES = 8
_KEPT = ("setting", "device", "devices", "forms", "temporary_bytes", "argument_bytes", "peak_bytes")
_TOPOLOGY = {1: "v5e:2x2", DEVICES: "v5e:2x4"}


def memory() -> None:
    """Temporaries of a forward pass against pixels, compiled for one device."""
    found = []
    for side in SIDES:
        found.append(summary(Program(_setting(side)).describe()))
        _write("memory", found)
    draw_pixels()


def time() -> None:
    """Seconds of a forward pass against pixels by the clock, with whole maps and in bands."""
    programs = [
        Program(_setting(side, fields=fields))
        for side in SIDES
        if side <= LONGEST_TIMED
        for fields in ({}, {"ffn_bands": TIME_BANDS})
    ]
    timings = time_in_turn(programs, 360)
    found = [
        summary(program.describe()) | {"seconds": 1 / timing["images_per_second"], **timing}
        for program, timing in zip(programs, timings, strict=True)
    ]
    _write("time", found)
    draw_pixels()


def exponent(pixels: Sequence[float], values: Sequence[float]) -> float:
    """The power of the pixels that values grow with, by least squares of the logarithms."""
    return float(np.polyfit(np.log(pixels), np.log(values), 1)[0])


def draw_pixels() -> None:
    """The plot of `memory` and `time`, from what they wrote."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5))
    for axes, name, key, scale, label in (
        (panels[0], "memory", "temporary_bytes", 1e9, "GB of temporaries"),
        (panels[1], "time", "seconds", 1, "seconds an image"),
    ):
        axes.set(xlabel="pixels", ylabel=label, title=f"Forward {name}")
        if not (found := _read(name)):
            axes.set_title(f"{name}: not run")
            continue
        for bands, colour in ((1, "C0"), (TIME_BANDS, "C1")):
            own = [r for r in found if r["setting"]["fields"].get("ffn_bands", 1) == bands]
            if not own:
                continue
            pixels = [r["setting"]["height"] * r["setting"]["width"] for r in own]
            values = [r[key] / scale for r in own]
            told = "whole maps" if bands == 1 else f"{bands} bands"
            told += f": pixels to the power {exponent(pixels, values):.3f}"
            axes.loglog(pixels, values, "o", color=colour, label=told)
            straight = [values[0] * p / pixels[0] for p in pixels]
            axes.loglog(pixels, straight, ":", color=colour)
            axes.set_xticks(pixels, [f"{r['setting']['width']}²" for r in own])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8, title="dotted: linear in the first", title_fontsize=8)
    _save(figure, "pixels")


def devices() -> None:
    """A forward pass of 4096² on one device, and on eight that share its rows."""
    meshes: tuple[dict[str, int], ...] = ({}, {"spatial": DEVICES})
    programs = [Program(_setting(4096, mesh=mesh)) for mesh in meshes]
    _write("devices", [summary(program.describe()) for program in programs])


def equal() -> None:
    """Logits of a 2048² image from eight simulated devices against those from one."""
    one, many = (
        np.asarray(Program(_setting(2048, mesh=mesh)).make_run()())
        for mesh in ({}, {"spatial": DEVICES})
    )
    difference = float(np.abs(one - many).max())
    largest = float(np.abs(one).max())
    found = {"side": 2048, "devices": DEVICES, "largest_logit": largest, "difference": difference}
    print(found)
    _write("equal", found)


def bands() -> None:
    """Memory by bands of the feed-forward networks, compiled."""
    found = []
    for setting in (
        *(_setting(4096, fields={"ffn_bands": n}) for n in BANDS),
        *(_setting(1024, train=True, fields={"ffn_bands": n, "remat": True}) for n in BANDS),
        *(_setting(1024, train=True, fields={"ffn_bands": n}) for n in TIMED_BANDS),
        _setting(4096, fields={"ffn_bands": 4}, mesh={"spatial": DEVICES}),
    ):
        found.append(summary(Program(setting).describe()))
        print(setting.train, setting.mesh, setting.fields, found[-1]["temporary_bytes"], flush=True)
        _write("bands", found)
    draw_bands()


def bands_time() -> None:
    """Time by bands, those of one kind in turn: a forward pass, and a training step."""
    found = []
    for side, train, fields in ((2048, False, {}), (1024, True, {"remat": True})):
        programs = [
            Program(_setting(side, train=train, fields={"ffn_bands": n, **fields}))
            for n in TIMED_BANDS
        ]
        for program, timing in zip(programs, time_in_turn(programs, 180), strict=True):
            found.append(summary(program.describe()) | timing)
        _write("bands_time", found)
    draw_bands()


def draw_bands() -> None:
    """The plot of `bands` and `bands_time`, from what they wrote."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5))
    kinds = (
        ("inference, 4096²", {"train": False}),
        ("training, 1024², remat", {"train": True, "remat": True}),
        ("training, 1024²", {"train": True, "remat": False}),
    )
    compiled = [r for r in _read("bands") if r["devices"] == 1]
    for label, wanted in kinds:
        own = [r for r in compiled if _kind(r) == {"remat": False, **wanted}]
        counts = [r["setting"]["fields"]["ffn_bands"] for r in own]
        panels[0].loglog(counts, [r["temporary_bytes"] / 1e9 for r in own], "o-", label=label)
    panels[0].set(xlabel="bands", ylabel="GB of temporaries", title="Memory, compiled")
    panels[0].set_xticks(BANDS, BANDS)
    panels[0].set_yticks((2, 4, 8), (2, 4, 8))
    panels[0].minorticks_off()
    panels[0].legend(fontsize=8)
    timed = _read("bands_time")
    for label, wanted in (("inference, 2048²", kinds[0][1]), (kinds[1][0], kinds[1][1])):
        own = [r for r in timed if _kind(r) == {"remat": False, **wanted}]
        counts = [r["setting"]["fields"]["ffn_bands"] for r in own]
        speed = [r["images_per_second"] / own[0]["images_per_second"] for r in own]
        panels[1].plot(counts, speed, "o-", label=label)
    panels[1].set(xlabel="bands", ylabel="speed, of that with whole maps", ylim=(0, None))
    panels[1].set_title("Speed, measured" if timed else "Speed: not run")
    panels[1].legend(fontsize=8)
    _save(figure, "bands")


def chip() -> None:
    """A forward pass of 4096² for one chip of a TPU v5e, and for eight that share its rows."""
    found = []
    for count, mesh in ((1, {}), (DEVICES, {"spatial": DEVICES})):
        program = Program(_setting(4096, mesh=mesh), target_devices(_TOPOLOGY[count]))
        found.append(summary(program.describe()))
        _write("chip", found)


def summary(described: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of `Program.describe`."""
    return {key: described[key] for key in (*_KEPT, "collectives")}


def _setting(side: int, **others: Any) -> Setting:
    return Setting("vvt_tiny", side, side, **others)


def _kind(result: Mapping[str, Any]) -> dict[str, bool]:
    setting = result["setting"]
    return {"train": setting["train"], "remat": setting["fields"].get("remat", False)}


def _read(name: str) -> list[dict[str, Any]]:
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def _write(name: str, content: object) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    restart_with_huge_pages()
    parts = {p.__name__: p for p in (memory, devices, bands, time, bands_time, equal, chip)}
    chosen = sys.argv[1:] or list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        sys.exit(f"error: There is no part {unknown[0]!r}: there are {', '.join(parts)}.")
    if {"devices", "bands", "equal"} & set(chosen):
        sharding.simulate_devices(DEVICES)
    for name in chosen:
        parts[name]()
