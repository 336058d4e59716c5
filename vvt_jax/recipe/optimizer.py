"""AdamW with warm-up, cosine and clipping, from the config's `optimizer` fields."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def make_schedule(
    fields: Mapping[str, Any], total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then a cosine that ends at the last step."""
    warmup = min(round(fields["warmup_epochs"] * steps_per_epoch), total_steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=fields["warmup_learning_rate"] if warmup else fields["learning_rate"],
        peak_value=fields["learning_rate"],
        warmup_steps=warmup,
        decay_steps=total_steps,
        end_value=fields["final_learning_rate"],
    )


def make_optimizer(
    fields: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), its gradients clipped by their global norm."""
    clip = optax.clip_by_global_norm(fields["clip_norm"]) if fields["clip_norm"] else None
    adamw = optax.adamw(
        schedule,
        b1=fields["b1"],
        b2=fields["b2"],
        eps=fields["eps"],
        weight_decay=fields["weight_decay"],
        mask=decays,
    )
    return optax.chain(clip, adamw) if clip else adamw


def decays(params: Any) -> Any:
    """True for parameters that weight decay acts on: kernels, not biases and norm scales.

    By name, since the rank does not tell: a bias of stacked blocks has two dimensions.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
