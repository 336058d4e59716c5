"""mIoU on the stamps: vicinity attention, the same without locality, and softmax attention.

    python -m experiments.stamps.make --out=FOLDER
    python -m experiments.stamps.run --data=FOLDER --runs=FOLDER_OF_RUNS

Nine runs, three variants with three seeds each, of equal steps; and a linear classifier of a
pixel's colour alone, which knows nothing of shapes. Stopped at any moment, the same command goes
on. results.json gets a line for each run that is done, results.md the table.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from experiments.stamps import config as stamps_config
from vvt_jax.data.examples import Source
from vvt_jax.data.pixel_labels import IGNORED
from vvt_jax.data.sources import open_source
from vvt_jax.inference.segment import segmentation_metrics
from vvt_jax.system.errors import UserError
from vvt_jax.system.huge_pages import restart_with_huge_pages
from vvt_jax.system.interruption import Interrupted
from vvt_jax.train import train_and_evaluate

HERE = Path(__file__).parent
VARIANTS = {
    "vicinity": {},
    "no locality": {"locality": "none"},
    "softmax": {"attention": "softmax"},
}
SEEDS = (0, 1, 2)
_COLOUR = "colour alone (linear)"
_PIXELS = 200  # of each training scene, that the linear classifier learns of


def train(data: str, runs: Path, variant: str, seed: int, steps: int) -> dict[str, float]:
    """One run, or the rest of it; its measurements on the test scenes."""
    config = stamps_config.get_config()
    config.seed = seed
    config.total_steps = steps
    config.data.data_dir = data
    config.model.update(VARIANTS[variant])
    workdir = runs / f"{variant.replace(' ', '_')}_{seed}_{steps}"
    metrics = train_and_evaluate(config, workdir)
    return {name.removeprefix("test/"): v for name, v in metrics.items() if "test/" in name}


def colour_classifier(data: str) -> dict[str, float]:
    """A linear classifier of red, green and blue: trained on some pixels of each training scene,
    measured on every pixel of the test scenes."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    source = open_source("folder_segmentation", "train", data_dir=data)
    parts = [_pixels(source, i) for i in range(len(source.examples))]
    chosen = [rng.choice(len(labels), _PIXELS) for _, labels in parts]
    colours = np.concatenate([c[i] for (c, _), i in zip(parts, chosen, strict=True)])
    labels = np.concatenate([t[i] for (_, t), i in zip(parts, chosen, strict=True)])
    model = LogisticRegression(max_iter=200).fit(colours, labels)

    source = open_source("folder_segmentation", "test", data_dir=data)
    confusion = np.zeros((source.num_classes,) * 2, np.int64)
    for i in range(len(source.examples)):
        colours, labels = _pixels(source, i)
        np.add.at(confusion, (labels, model.predict(colours)), 1)
    metrics = segmentation_metrics(0.0, confusion)
    return {name: metrics[name] for name in ("pixel_accuracy", "miou")}


def _pixels(source: Source, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours `[pixels, 3]` in 0..1 and labels `[pixels]` of the pixels that count."""
    example = source.examples[index]
    counted = example["label"] != IGNORED
    return np.asarray(example["image"])[counted] / 255, example["label"][counted].astype(int)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.stamps.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="what experiments.stamps.make wrote")
    parser.add_argument("--runs", type=Path, required=True, help="the runs' folders go there")
    parser.add_argument("--steps", type=int, default=stamps_config.STEPS)
    parser.add_argument("--results", type=Path, default=HERE, help="where results.json goes")
    options = parser.parse_args()
    path = options.results / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    jobs = [(_COLOUR, 0)] + [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    try:
        for variant, seed in jobs:
            key = {"variant": variant, "seed": seed}
            if variant != _COLOUR:
                key["steps"] = options.steps
            if any(key.items() <= row.items() for row in rows):
                continue
            measured = (
                colour_classifier(options.data)
                if variant == _COLOUR
                else train(options.data, options.runs, variant, seed, options.steps)
            )
            rows.append({**key, **measured})
            path.write_text(json.dumps(rows, indent=2) + "\n")
            (options.results / "results.md").write_text(table(rows, options.steps))
    except UserError as error:
        sys.exit(f"error: {error}")
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.exit_status)


def table(rows: list[dict], steps: int) -> str:
    """The results in Markdown: test mIoU of each seed, their mean, and pixel accuracy."""
    lines = [
        f"| {steps} steps | test mIoU of each seed | mean | pixel accuracy |",
        "|---|---|---|---|",
    ]
    for variant in (_COLOUR, *VARIANTS):
        found = [r for r in rows if r["variant"] == variant and r.get("steps", steps) == steps]
        if found:
            mious = [100 * row["miou"] for row in found]
            accuracy = np.mean([100 * row["pixel_accuracy"] for row in found])
            each = ", ".join(f"{value:.2f}" for value in mious)
            lines.append(f"| {variant} | {each} % | {np.mean(mious):.2f} % | {accuracy:.2f} % |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
