"""Evaluation that counts every example exactly once, whatever the batch size."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vvt_jax.data.preprocess import normalize
from vvt_jax.distributed import sharding
from vvt_jax.training.losses import cross_entropy

Sums = dict[str, jax.Array]


def make_eval_step(
    model: nn.Module, preprocessing: Mapping[str, Any], *, confusion: bool = False
) -> Callable[[Any, Mapping[str, jax.Array]], Sums]:
    """Return the evaluation step, a pure function for `jax.jit`.

    It sums the loss, top-1 hits, top-5 hits and examples of a batch. A batch consists of `image`,
    uint8 `[batch, height, width, 3]`, `label`, int32 `[batch]`, and `mask`, bool `[batch]`, which
    is False for padding. With fewer than five classes, top-5 considers all of them.

    If `confusion` is set, the step also computes the confusion matrix, int32
    `[num_classes, num_classes]`: how often each class (row) was predicted as each other (column).
    """

    def eval_step(variables: Any, batch: Mapping[str, jax.Array]) -> Sums:
        logits: Any = model.apply(variables, normalize(batch["image"], preprocessing))
        _, ranked = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (ranked == batch["label"][:, None]) & batch["mask"][:, None]
        losses = jnp.where(batch["mask"], cross_entropy(logits, batch["label"]), 0)
        sums = {
            "loss": losses.sum(),
            "top1": hits[:, 0].sum(dtype=jnp.int32),
            "top5": hits.sum(dtype=jnp.int32),
            "examples": batch["mask"].sum(dtype=jnp.int32),
        }
        if confusion:
            counts = jnp.zeros((logits.shape[-1],) * 2, jnp.int32)
            counted = batch["mask"].astype(jnp.int32)
            sums["confusion"] = counts.at[batch["label"], ranked[:, 0]].add(counted)
        return sums

    return eval_step


def make_set_step(
    model: nn.Module, preprocessing: Mapping[str, Any]
) -> Callable[[Any, Mapping[str, jax.Array]], Sums]:
    """Return an evaluation step for data in which several classes may be right or some excluded.

    It is like the step of `make_eval_step`, except that a batch's `label` is int8
    `[batch, num_classes]`: 1 if the class is right, 0 if it is wrong, and -1 if the model must not
    choose it. Any right class is a hit. The loss is the negative log of the right classes' total
    probability, normalised over the classes that may be chosen. Examples without a right class are
    excluded from all sums.
    """

    def set_step(variables: Any, batch: Mapping[str, jax.Array]) -> Sums:
        logits: Any = model.apply(variables, normalize(batch["image"], preprocessing))
        right = batch["label"] > 0
        logits = jnp.where(batch["label"] < 0, -jnp.inf, logits)
        counted = batch["mask"] & right.any(-1)
        _, ranked = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = jnp.take_along_axis(right, ranked, axis=-1) & counted[:, None]
        of_right = jax.nn.logsumexp(jnp.where(right, logits, -jnp.inf), axis=-1)
        losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - of_right, 0)
        return {
            "loss": losses.sum(),
            "top1": hits[:, 0].sum(dtype=jnp.int32),
            "top5": hits.any(-1).sum(dtype=jnp.int32),
            "examples": counted.sum(dtype=jnp.int32),
        }

    return set_step


def evaluate(
    eval_step: Callable[[Any, Mapping[str, jax.Array]], Sums],
    variables: Any,
    batches: Iterable[Mapping[str, jax.Array]],
) -> tuple[dict[str, float], np.ndarray | None]:
    """Evaluate variables on batches.

    Returns:
        The mean `loss` (in nats), `top1` and `top5` (as fractions) and the number of `examples`;
        and the confusion matrix, if the step computes one, or else None. Without any examples, the
        means are NaN.

    Raises:
        ValueError: there are no batches.
    """
    host: dict[str, np.ndarray] = {}

    def add(finished: Iterable[Sums]) -> None:
        for sums in finished:
            for name, value in jax.device_get(sums).items():
                host[name] = host[name] + value if name in host else value

    dispatched = sharding.Dispatched()
    for batch in batches:
        add(dispatched.add(eval_step(variables, batch)))
    add(dispatched.finish())
    if not host:
        raise ValueError("There is nothing to evaluate: no batch came.")
    examples = int(host["examples"])
    means = {
        name: float(host[name]) / examples if examples else math.nan
        for name in ("loss", "top1", "top5")
    }
    return {**means, "examples": examples}, host.get("confusion")
