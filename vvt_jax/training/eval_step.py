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
    """Sums over a batch of loss, top-1 and top-5 hits and examples, a pure function for `jax.jit`.

    Batches are `image`, uint8 `[batch, height, width, 3]`, `label`, int32 `[batch]`, and `mask`,
    bool `[batch]`, False for padding. With fewer than five classes, top-5 looks at all of them.

    With `confusion`, also how often which class (row) was taken for which (column): int32
    `[num_classes, num_classes]`.
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
    """As `make_eval_step`, where several classes may be right and some can't be chosen.

    Of a batch `label` is int8 `[batch, num_classes]`: 1 where the class is right, 0 where it is
    wrong, -1 where the model may not choose it. A hit is any right class; the loss is that of the
    right classes' probability together, among those that can be chosen. An example without a right
    class counts nowhere.
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
    """Mean `loss` (nats), `top1` and `top5` (fractions) and the number of `examples`; and the
    confusion matrix, where the step counts one. The means over no examples are not a number."""
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
