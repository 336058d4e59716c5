"""AdamW with warm-up, decay and clipping, from the config's `optimizer` fields; for fine-tuning,
learning rates that fall with the depth, and parameters that stay as they are."""

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
    """Learning rate by step: linear warm-up, and a decay that ends at the last step (but for
    `"cosine_by_epoch"`, which reaches its peak after the warm-up's epochs alone).

    Args:
        fields: `learning_rate` (at its peak), `learning_rate_batch` (where it is not 0, the peak is
            that of so many images and grows in proportion to the batch: Goyal et al., arXiv
            1706.02677), `warmup_learning_rate` and `final_learning_rate`; `schedule`, `"cosine"`
            after the warm-up, or `"polynomial"`, of the power `schedule_power`, which falls from
            the first step on and which the warm-up scales (as mmsegmentation has it); or
            `"cosine_by_epoch"`, the authors' own, see `_by_epoch`.
        total_steps: of the run.
        warmup_steps: 0 or more; the peak is reached at the latest at the last step.
        batch_size: images of an update.
        epoch_steps: steps of an epoch, of which `"cosine_by_epoch"` counts whole ones.
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
    """The schedule of the authors' training script, which sets the rate once after each epoch.

    In epoch e, counted from 0, it is the rate of t = max(e - 1, 0), so that the first two epochs
    are alike: start + t·(peak - start) / W during the W epochs of warm-up, and after them
    final + (peak - final)·(1 + cos(π·t / E)) / 2 in a run of E epochs. The cosine begins with the
    run and not with the end of the warm-up.

    Args:
        start: rate at the start of the warm-up.
        peak: rate that the warm-up leads to.
        final: rate that the cosine leads to.
        total_steps: of the run.
        warmup_steps: of the warm-up.
        epoch_steps: of an epoch; need not be a whole number.
    """

    def in_epochs(steps: int) -> float:  # both were rounded to steps
        epochs = steps / epoch_steps
        whole = round(epochs)
        return whole if whole and abs(epochs - whole) * epoch_steps <= 0.51 else epochs

    epochs, warmup = in_epochs(total_steps), in_epochs(warmup_steps)
    t = np.maximum(np.arange(max(1, math.ceil(epochs))) - 1.0, 0.0)
    rates = final + (peak - final) * (1 + np.cos(np.pi * t / epochs)) / 2
    if warmup:
        rates = np.where(t < warmup, start + t * (peak - start) / warmup, rates)
    # The first step of each epoch but the first one; compared as whole numbers, so exact anywhere
    starts = np.ceil(np.arange(1, len(rates)) * epoch_steps - 1e-6).astype(np.int32)

    def schedule(step: Any) -> jax.Array:
        return jnp.asarray(rates, jnp.float32)[jnp.sum(step >= starts)]

    return schedule


def make_optimizer(
    fields: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), its gradients clipped by their global norm.

    With `layer_decay` below 1, see `layer_scales`. Parameters that `freeze` names (see `frozen`)
    get neither updates nor optimizer state.
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
    scale = _scale_by_depth(decay)  # outside: it counts the blocks that are frozen as well

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        return scale.update(updates, optax.EmptyState(), params)[0], state

    return optax.GradientTransformation(optimizer.init, update)


def decays(params: Any) -> Any:
    """True for parameters that weight decay acts on: kernels, not biases and norm scales.

    By name, since the rank does not tell: a bias of stacked blocks has two dimensions.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """True for parameters that stay as they are: a regular expression is found in their path.

    Args:
        params: a tree of parameters.
        patterns: searched in paths such as `stage1/blocks/attention/query/kernel`.

    Raises:
        ValueError: a pattern that is no regular expression, that no path has, or all of them do.
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
    """What each parameter's learning rate is multiplied by, as BEiT (arXiv 2106.08254) does.

    `decay ** (L + 1 - layer)` in a model of L blocks: the first patch embedding is layer 0, block i
    is layer i, counted from 1, a stage's patch embedding goes with its first block and its norm
    with its last one, and all the rest (the head) is layer L + 1. Stacked blocks get one number
    each: `[depth, 1, ...]`.
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
