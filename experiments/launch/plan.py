"""What training takes in memory and time on named hardware: computed, not run.

    python -m experiments.launch.plan

Writes `plan.json` and `plan.md` beside this file. Counted are the models' parameters, multiply-adds
and activations (`experiments/costs/sizes.json`, by `vvt_jax.costs`); printed by their makers are
the devices' memory, bandwidth and operations a second. Two factors come from the one compilation
that is at hand, `experiments/costs/v5e_train.json`: the bytes of temporaries, and the bytes
accessed, for each activation.
"""

import dataclasses
import json
from pathlib import Path

from vvt_jax.models import counting

HERE = Path(__file__).parent
COSTS = HERE.parent / "costs"
SIDES = (224, 512, 1024)  # pixels
IMAGENET_IMAGES = 300 * 1_281_167  # the published recipe's 300 epochs
GROUP = 8  # devices that the hours are for
# Weights, gradients and AdamW's two moments, float32
STATE_BYTES = 4 * 4
USABLE = 0.9  # of a device's memory; the rest is the runtime's, and fragments


@dataclasses.dataclass(frozen=True)
class Device:
    """As its maker prints it.

    Attributes:
        name: as it is called.
        kind: as jax calls it, a key of `costs.PEAK_FLOPS`.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float


DEVICES = (
    Device("TPU v5e", "TPU v5 lite", 16 * 2**30, 819e9),
    Device("TPU v5p", "TPU v5", 95 * 2**30, 2765e9),
    Device("TPU v6e", "TPU v6 lite", 32 * 2**30, 1640e9),
    Device("A100 80 GB", "NVIDIA A100-SXM4-80GB", 80e9, 2039e9),
    Device("H100 80 GB", "NVIDIA H100 80GB HBM3", 80e9, 3350e9),
)


def main() -> None:
    compiled = json.loads((COSTS / "v5e_train.json").read_text())[0]
    activations = compiled["activations"] * compiled["setting"]["batch"]
    kept = compiled["temporary_bytes"] / activations
    moved = compiled["bytes_accessed"] / activations

    rows = []
    for counted in json.loads((COSTS / "sizes.json").read_text()):
        name, state = counted["model"], STATE_BYTES * counted["parameters"]
        for side in SIDES:
            flops = 6 * _of_side(counted, "multiply_adds", side)  # forward and backward
            count = _of_side(counted, "activations", side)
            image_bytes = kept * count
            row = {
                "model": name,
                "side": side,
                "state_bytes": state,
                "image_bytes": image_bytes,
                "image_flops": flops,
                "image_bytes_accessed": moved * count,
                "devices": {},
            }
            for device in DEVICES:
                seconds = {
                    "flops": flops / counting.PEAK_FLOPS[device.kind],
                    "bandwidth": moved * count / device.bandwidth,
                }
                bound = max(seconds, key=lambda kind: seconds[kind])
                rate = 1 / seconds[bound]
                row["devices"][device.name] = {
                    "images_that_fit": int((USABLE * device.memory - state) / image_bytes),
                    "images_per_second_at_most": rate,
                    "bound_by": bound,
                    "hours_of_imagenet_at_least": IMAGENET_IMAGES / rate / GROUP / 3600,
                }
            rows.append(row)
    factors = {"temporary_bytes": kept, "bytes_accessed": moved}
    devices = [dataclasses.asdict(d) | {"flops": counting.PEAK_FLOPS[d.kind]} for d in DEVICES]
    result = {"per_activation": factors, "devices": devices, "plan": rows}
    (HERE / "plan.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "plan.md").write_text(_page(kept, moved, rows))


def _of_side(counted: dict, what: str, side: int) -> int:
    """A count on an image of that side: it grows with the pixels, from what is there for any size
    (the gates and the head). Those of two sides give it for all that divide by 32."""
    at = {known: counted[f"{what}_{known}"] for known in (224, 384, 512)}
    slope = (at[512] - at[224]) / (512**2 - 224**2)
    found = {known: round(at[224] + slope * (known**2 - 224**2)) for known in (*at, side)}
    assert all(found[known] == at[known] for known in at), f"{what} is not linear in the pixels"
    return found[side]


def _check(kept: float) -> list[tuple[int, float, float]]:
    """Side, planned and compiled bytes of a step on one image of vvt_tiny, where the compiler's
    own estimate is at hand."""
    tiny = json.loads((COSTS / "sizes.json").read_text())[0]
    (compiled,) = (
        found["peak_bytes_by_side"]
        for found in json.loads((COSTS / "chip.json").read_text())
        if found["train"] and found["attention"] == "vicinity"
    )
    state = STATE_BYTES * tiny["parameters"]
    return [
        (side, state + kept * _of_side(tiny, "activations", side), compiled[str(side)])
        for side in (512, 2048, 2688)
    ]


def _page(kept: float, moved: float, rows: list[dict]) -> str:
    names = [device.name for device in DEVICES]

    def table(heads: list[str], cells) -> list[str]:
        lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        return [*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]

    def by_device(key: str, show):
        def cells(row: dict) -> list[str]:
            return [
                f"{row['model']}, {row['side']}²",
                *(show(row["devices"][name][key]) for name in names),
            ]

        return cells

    bounds = {found["bound_by"] for row in rows for found in row["devices"].values()}
    return "\n".join(
        [
            "# Memory and time of training, planned",
            "",
            "**Computed by `python -m experiments.launch.plan`, not run.** bfloat16 activations, "
            "float32 weights and AdamW, no rematerialisation, no FSDP. Times are bounds that no "
            "run reaches: what the devices would take if nothing but the "
            + (" or the ".join(sorted(bounds)))
            + " limited them, with data always ready and communication hidden.",
            "",
            "The state takes 16 bytes a parameter (weights, gradients, two moments). Each counted "
            f"activation takes {kept:.2f} bytes until the backward pass, and moves {moved:.1f} "
            "bytes in a step: both from the compiler's estimate of `vvt_tiny` at 224², batch 64, "
            "on a TPU v5e ([v5e_train.json](../costs/v5e_train.json)), taken to hold for the other "
            "sizes, resolutions and devices.",
            "",
            "## How far off that is",
            "",
            "For `vvt_tiny` on one image at a time the compiler itself says more "
            "([chip.json](../costs/chip.json)): where few large images share a device, plan for "
            "half of what the tables let fit.",
            "",
            "| image | planned, GB | compiler, GB | ratio |",
            "| --- | --- | --- | --- |",
            *(
                f"| {side}² | {planned / 1e9:.2f} | {found / 1e9:.2f} | {found / planned:.2f} |"
                for side, planned, found in _check(kept)
            ),
            "",
            "## What one image takes",
            "",
            *table(
                ["model", "state, GB", "an image, MB", "its GFLOP", "its GB accessed"],
                lambda row: [
                    f"{row['model']}, {row['side']}²",
                    f"{row['state_bytes'] / 1e9:.2f}",
                    f"{row['image_bytes'] / 1e6:.0f}",
                    f"{row['image_flops'] / 1e9:.0f}",
                    f"{row['image_bytes_accessed'] / 1e9:.2f}",
                ],
            ),
            "",
            f"## Images that fit one device ({USABLE:.0%} of its memory)",
            "",
            *table(["model", *names], by_device("images_that_fit", str)),
            "",
            "## Images a second of one device, at most",
            "",
            *table(["model", *names], by_device("images_per_second_at_most", "{:.0f}".format)),
            "",
            f"## Hours of {GROUP} devices for ImageNet's {IMAGENET_IMAGES / 1e6:.0f} million "
            "images (300 epochs), at least",
            "",
            *table(["model", *names], by_device("hours_of_imagenet_at_least", "{:.1f}".format)),
            "",
        ]
    )


if __name__ == "__main__":
    main()
