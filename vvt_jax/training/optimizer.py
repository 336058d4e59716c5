"""AdamW with warm-up, decay and clipping, built from the config's `optimizer` fields.

For fine-tuning, it supports layer-wise learning rate decay and frozen parameters.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_STAGE = re.compile(r"stage(\d+)")


def make_schedule(
    fields: Mapping[str, Any],
    total_steps: int,
    warmup_steps: int,
    batch_size: int = 0,
    epoch_steps: float = 1.0,
) -> optax.Schedule:
    """Return the learning rate schedule: a linear warm-up and a decay that ends at the last step.

    The schedule `"cosine_by_epoch"` is an exception: it changes only between epochs, and its
    warm-up always takes all of its epochs, even if the run is shorter.

    Args:
        fields: the config's optimizer fields, of which these are used:

            - `learning_rate`: the peak learning rate.
            - `learning_rate_batch`: if it is not 0, the batch size that `learning_rate` is meant
              for; the peak scales in proportion to the actual batch size (Goyal et al., arXiv
              1706.02677).
            - `warmup_learning_rate` and `final_learning_rate`: the rates that the warm-up begins
              with and that the decay ends with.
            - `schedule`: `"cosine"`, a cosine decay after the warm-up; `"polynomial"`, a decay
              with the power `schedule_power` that begins at the first step and that the warm-up
              scales, as in mmsegmentation; or `"cosine_by_epoch"`, the schedule of the authors,
              see `_by_epoch`.
        total_steps: the number of steps in the run.
        warmup_steps: the number of warm-up steps, 0 or more. Except for `"cosine_by_epoch"`, it is
            limited so that the peak is reached at the last step at the latest.
        batch_size: the number of images per update.
        epoch_steps: the number of steps per epoch, for `"cosine_by_epoch"`, which changes the rate
            once per epoch.
    """
    peak = fields["learning_rate"]
    if fields["learning_rate_batch"]:
        peak *= batch_size / fields["learning_rate_batch"]
    warmup = min(warmup_steps, total_steps - 1)
    if fields["schedule"] == "polynomial":
        decay = optax.polynomial_schedule(
            peak, fields["final_learning_rate"], fields["schedule_power"], total_steps
        )
        start = fields["warmup_learning_rate"]

        def scaled(step: Any) -> Any:
            return start + (decay(step) - start) * jnp.minimum(1.0, step / warmup)

        return scaled if warmup else decay
    if fields["schedule"] == "cosine_by_epoch":
        ends = fields["warmup_learning_rate"], peak, fields["final_learning_rate"]
        return _by_epoch(*ends, total_steps, warmup_steps, epoch_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=fields["warmup_learning_rate"] if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=total_steps,
        end_value=fields["final_learning_rate"],
    )


def _by_epoch(
    start: float, peak: float, final: float, total_steps: int, warmup_steps: int, epoch_steps: float
) -> optax.Schedule:
    """Return the schedule of the authors' training script, which updates the rate after each epoch.

    With t = max(e - 1, 0) in epoch e, counted from 0, so that the first two epochs have the same
    rate, the learning rate is start + t·(peak - start) / W during the W epochs of warm-up, and
    then final + (peak - final)·(1 + cos(π·t / E)) / 2 in a run of E epochs. The cosine begins at
    the start of the run, not at the end of the warm-up.

    Args:
        start: the rate at the start of the warm-up.
        peak: the rate that the warm-up leads to.
        final: the rate that the cosine leads to.
        total_steps: the number of steps in the run.
        warmup_steps: the number of steps in the warm-up.
        epoch_steps: the number of steps in an epoch, which need not be an integer.
    """

    def in_epochs(steps: int) -> float:  # undoes the rounding of whole epochs to steps
        epochs = steps / epoch_steps
        whole = round(epochs)
        return whole if whole and abs(epochs - whole) * epoch_steps <= 0.51 else epochs

    epochs, warmup = in_epochs(total_steps), in_epochs(warmup_steps)
    t = np.maximum(np.arange(max(1, math.ceil(epochs))) - 1.0, 0.0)
    rates = final + (peak - final) * (1 + np.cos(np.pi * t / epochs)) / 2
    if warmup:
        rates = np.where(t < warmup, start + t * (peak - start) / warmup, rates)
    # The first step of each epoch after the first one, as integers so that comparisons are exact.
    starts = np.ceil(np.arange(1, len(rates)) * epoch_steps - 1e-6).astype(np.int32)

    def schedule(step: Any) -> jax.Array:
        return jnp.asarray(rates, jnp.float32)[jnp.sum(step >= starts)]

    return schedule


def make_optimizer(
    fields: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter, arXiv 1711.05101) with clipping by global gradient norm.

    If `layer_decay` is below 1, the updates are scaled by `layer_scales`. Parameters that match
    `freeze` (see `frozen`) get neither updates nor optimizer state.
    """
    parts = []
    if fields["clip_norm"]:
        parts.append(optax.clip_by_global_norm(fields["clip_norm"]))
    parts.append(
        optax.adamw(
            schedule,
            b1=fields["b1"],
            b2=fields["b2"],
            eps=fields["eps"],
            weight_decay=fields["weight_decay"],
            mask=decays,
        )
    )
    decay = fields["layer_decay"]
    if decay != 1:
        parts.append(_scale_by_depth(decay) if not fields["freeze"] else optax.identity())
    optimizer = optax.chain(*parts) if len(parts) > 1 else parts[0]
    if not fields["freeze"]:
        return optimizer
    optimizer = optax.partition(
        {False: optimizer, True: optax.set_to_zero()},
        lambda params: frozen(params, fields["freeze"]),
    )
    if decay == 1:
        return optimizer
    scale = _scale_by_depth(decay)  # outside the partition, to count frozen blocks as well

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        return scale.update(updates, optax.EmptyState(), params)[0], state

    return optax.GradientTransformation(optimizer.init, update)


def decays(params: Any) -> Any:
    """Return a tree that is True for parameters with weight decay: kernels, not biases or scales.

    Parameters are selected by name, because their rank doesn't distinguish them: a bias of stacked
    blocks has two dimensions.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """Return a tree that is True for frozen parameters, those whose path matches a pattern.

    Args:
        params: a tree of parameters.
        patterns: regular expressions to search for in paths such as
            `stage1/blocks/attention/query/kernel`.

    Raises:
        ValueError: a pattern is not a regular expression or matches no path, or the patterns match
            all paths.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
    unused = set(patterns)

    def match(path, _) -> bool:
        found = {pattern for pattern in patterns if re.search(pattern, _join(path))}
        unused.difference_update(found)
        return bool(found)

    tree = jax.tree_util.tree_map_with_path(match, params)
    if unused:
        raise ValueError(f"No parameter's path has {sorted(unused)[0]!r} in it.")
    if patterns and all(jax.tree.leaves(tree)):
        raise ValueError(f"{list(patterns)} leave nothing to train.")
    return tree


def layer_scales(params: Any, decay: float) -> Any:
    """Return the factor of each parameter's learning rate, as in BEiT (arXiv 2106.08254).

    In a model of L blocks, the factor is `decay ** (L + 1 - layer)`. The first patch embedding is
    layer 0, and block i, counted from 1, is layer i. The patch embedding of any later stage belongs
    to the stage's first block, and a stage's norm to its last block. Everything else (the head) is
    layer L + 1. Stacked blocks get one factor per block: `[depth, 1, ...]`.
    """
    depths: dict[int, int] = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        names = _join(path).split("/")
        if "blocks" in names and (stage := _stage(names)):
            depths[stage] = leaf.shape[0]
    total = sum(depths.values())
    before = {stage: sum(d for s, d in depths.items() if s < stage) for stage in depths}

    def scale(path, leaf) -> Any:
        names = _join(path).split("/")
        stage = _stage(names)
        if stage not in depths:
            return 1.0
        first = before[stage] + 1
        if "blocks" in names:
            layers = first + np.arange(depths[stage])
            return (decay ** (total + 1.0 - layers)).reshape(-1, *[1] * (leaf.ndim - 1))
        if "patch_embed" in names:
            layer = first if stage > min(depths) else 0
        else:
            layer = before[stage] + depths[stage]
        return decay ** (total + 1.0 - layer)

    return jax.tree_util.tree_map_with_path(scale, params)


def _stage(names: Sequence[str]) -> int | None:
    return next((int(found[1]) for name in names if (found := _STAGE.fullmatch(name))), None)


def _scale_by_depth(decay: float) -> optax.GradientTransformation:
    def scale(updates, params):
        del params
        return jax.tree.map(
            lambda u, s: (u * s).astype(u.dtype), updates, layer_scales(updates, decay)
        )

    return optax.stateless(scale)


def _join(path: Any) -> str:
    return "/".join(str(part.key) for part in path)
