"""Measure the quality of a model's features with a linear probe and k nearest neighbours.

    python -m vvt_jax.probe --model=runs/digits/model --config=configs/digits.py [--json=FILE]

Both are fitted to the pooled features of `config.data.train_split` and evaluated on `test_split`,
or on `validation_split` if there is no test split. Images are preprocessed as the model's card
says.
"""

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax is imported: the restart would import it twice
    from vvt_jax.system.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vvt_jax.system.command_line import ending_in_a_sentence
from vvt_jax.system.errors import UserError
from vvt_jax.training import configuration
from vvt_jax.training.config_flags import parse_flags
from vvt_jax.training.configuration import ConfigError

NEIGHBOURS = 20
_TEMPERATURE = 0.07  # scales the similarities in the neighbours' weights
_ITERATIONS = 1000  # most iterations of the linear probe's solver


def probe(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Return the top-1 accuracies of two simple classifiers on fixed features.

    `linear` is logistic regression (L2, C = 1) on standardised features. `knn` is a vote of the 20
    nearest training examples (or of all, if there are fewer) by cosine similarity s, each weighted
    by exp(s / 0.07), as in Wu et al., arXiv 1805.01978.

    Args:
        train: features `[examples, channels]` and labels `[examples]` to fit the classifiers to.
        test: the same for the examples to evaluate on.

    Returns:
        The accuracies `linear` and `knn` as fractions; the numbers `neighbours`, `train_examples`,
        `test_examples` and `channels`; and `converged`, whether the regression's solver converged.

    Raises:
        UserError: all training examples are of one class, or features are not finite.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (features, labels), (test_features, test_labels) = train, test
    if len(np.unique(labels)) < 2:
        raise UserError("The training split has examples of one class only: a probe needs two.")
    if not (np.isfinite(features).all() and np.isfinite(test_features).all()):
        raise UserError("The model's features are not finite: its weights are damaged.")
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        linear.fit(features, labels)
    neighbours = min(NEIGHBOURS, len(labels))
    nearest = KNeighborsClassifier(
        neighbours, metric="cosine", weights=lambda distance: np.exp(-distance / _TEMPERATURE)
    )
    nearest.fit(features, labels)
    return {
        "linear": float(linear.score(test_features, test_labels)),
        "knn": float(nearest.score(test_features, test_labels)),
        "neighbours": neighbours,
        "train_examples": len(labels),
        "test_examples": len(test_labels),
        "channels": features.shape[1],
        "converged": not any(issubclass(w.category, ConvergenceWarning) for w in caught),
    }


def pooled_features(predictor: Any, source: Any, data: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Return the features `[examples, channels]`, float32, and labels `[examples]` of a source.

    Args:
        predictor: a `Predictor`, which computes the features.
        source: a `Source`, which has the examples.
        data: `config.data`, for its numbers of workers and threads.

    Raises:
        DataError: an image of the source can't be decoded.
    """
    from vvt_jax.data.examples import DataError
    from vvt_jax.data.loader import eval_batches, why_broken, without_flags
    from vvt_jax.inference.predictor import pooled_of

    batches = eval_batches(
        source,
        record=predictor.card["preprocessing"],
        batch_size=predictor.batch_size,
        workers=data.workers,
        threads=data.threads,
    )
    features, labels = [], []
    broken: list[int] = []
    with contextlib.closing(without_flags(batches, broken)) as batches:
        for batch in batches:
            kept = batch["mask"]
            features.append(predictor.run(pooled_of, batch["image"])[kept])
            labels.append(batch["label"][kept])
    if broken:
        raise DataError(why_broken(source, broken[0]))
    return np.concatenate(features), np.concatenate(labels)


def run(model: str, config: ConfigDict, name: str | None = None) -> dict[str, Any]:
    """Probe a model folder or published weights on the data set of a config; see `probe`.

    Raises:
        UserError: an error of `Predictor`, `open_source` or `probe`, or a config without a training
            split or a split to evaluate on.
    """
    from vvt_jax.data.sources import open_source
    from vvt_jax.inference.predictor import Predictor

    data = config.data
    measured = data.test_split or data.validation_split
    if not data.train_split or not measured:
        raise ConfigError(
            "A probe needs config.data.train_split, and test_split or validation_split."
        )
    train, test = (
        open_source(data.source, split, data_dir=data.data_dir, upright=data.upright)
        for split in (data.train_split, measured)
    )
    try:
        predictor = Predictor(model, name, batch_size=config.batch_size)
    except UserError:
        raise
    except ValueError as error:  # a wrong model name
        raise UserError(str(error)) from error
    parts = [pooled_features(predictor, source, data) for source in (train, test)]
    told = {"model": model, "source": data.source, "train": train.split, "test": test.split}
    return {**told, **probe(*parts)}


def describe(result: Mapping[str, Any]) -> str:
    """Return a result as one line of text."""
    return (
        f"linear probe {result['linear']:.2%}{'' if result['converged'] else ' (not converged)'}, "
        f"{result['neighbours']}-nearest neighbours {result['knn']:.2%}: top-1 on "
        f"{result['test_examples']} examples of {result['source']} {result['test']}, learnt from "
        f"{result['train_examples']} of {result['train']}, {result['channels']} features."
    )


def main(argv: list[str], arguments: Mapping[str, Any]) -> None:
    path = arguments["json"].value
    with ending_in_a_sentence():
        if path and os.path.lexists(path) and not arguments["force"].value:
            raise ConfigError(f"--json={path} exists: give --force to replace it, or another.")
        config = arguments["config"].value
        configuration.check_values(config)
        result = run(arguments["model"].value, config, arguments["name"].value)
        print(describe(result))
        if path:
            try:
                Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--json={path} can't be written: {error.strerror}.") from error


if __name__ == "__main__":
    _FLAGS = {
        "config": config_flags.DEFINE_config_file("config", None, "As for vvt_jax.main."),
        "model": flags.DEFINE_string("model", None, "A model folder, or published weights."),
        "name": flags.DEFINE_string("name", None, "Of the model, where the weights don't say it."),
        "json": flags.DEFINE_string("json", None, "A file that takes the figures."),
        "force": flags.DEFINE_bool("force", False, "Replace that file."),
    }
    flags.mark_flags_as_required(["config", "model"])
    app.run(
        functools.partial(main, arguments=_FLAGS),
        flags_parser=functools.partial(parse_flags, config_flag=_FLAGS["config"]),
    )
