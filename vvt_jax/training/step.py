"""The state of a training run, and the step that updates it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from vvt_jax.training import mixing
from vvt_jax.training.losses import mean_cross_entropy
from vvt_jax.training.optimizer import frozen


@flax.struct.dataclass
class Totals:
    """Sums since the last report, kept on the device so that the loop never waits for them."""

    loss: jax.Array
    grad_norm: jax.Array
    steps: jax.Array  # since then
    updates: jax.Array  # of these, those that were not skipped: loss and norm are their sums
    skipped: jax.Array  # the state's, at the last of the steps
    bad_step: jax.Array  # the first step that was not finite and not skipped, 0 for none

    @classmethod
    def zeros(cls) -> "Totals":
        return cls(
            *(jnp.zeros(()) for _ in range(2)), *(jnp.zeros((), jnp.int32) for _ in range(4))
        )


@flax.struct.dataclass
class TrainState:
    """All that a run carries from step to step, and all that a checkpoint holds of it."""

    step: jax.Array  # batches gone through
    skipped: jax.Array  # of these, those without an update, their loss or gradient not finite
    seed: jax.Array  # what is random in a step follows from seed and step alone
    params: Any
    mutable: Any  # the model's other collections, e.g. batch statistics
    opt_state: optax.OptState
    ema: Any  # moving average of params, or None
    totals: Totals

    def variables(self, *, ema: bool = False) -> dict[str, Any]:
        """What `model.apply` takes, with the averaged weights on request."""
        return {"params": self.ema if ema else self.params, **self.mutable}


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int, int],
    seed: jax.typing.ArrayLike,
    *,
    ema: bool,
) -> TrainState:
    """The state before the first step; images are `[batch, height, width, 3]`."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    mutable = model.init(key, jnp.zeros(image_shape))
    params = mutable.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        params=params,
        mutable=mutable,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        totals=Totals.zeros(),
    )


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    prepare: Callable[[Mapping[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array]],
    loss: Callable[[Any, jax.Array], jax.Array] = mean_cross_entropy,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    freeze: Sequence[str] = (),
    skip_nonfinite: int = 0,
) -> Callable[[TrainState, Mapping[str, jax.Array]], TrainState]:
    """The update by one batch, a pure function for `jax.jit`.

    Args:
        model: takes images and `train=True`.
        optimizer: its state is the state's.
        prepare: of a batch and a key makes normalised images and targets `[batch, ...]`, see
            `mixing.prepare_batch`.
        loss: of what the model gives and the targets; a mean over the batch, each example with the
            same weight.
        ema_decay: of the averaged weights, where the state has some.
        accumulate: the batch goes through the model in so many parts, one after the other: the
            same update as in one, to rounding, for models without dropout, in less memory.
        freeze: parameters that get no gradient, see `optimizer.frozen`.
        skip_nonfinite: so many steps of a run whose loss or gradient is not finite leave all but
            `step`, `skipped` and `totals` as it was.
    """

    differentiate = _make_gradients(model, loss, freeze, accumulate)

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> TrainState:
        step = state.step + 1
        dropout = jax.random.fold_in(jax.random.key(state.seed), step)
        images, targets = prepare(batch, mixing.augmentation_key(state.seed, step))
        value, mutable, gradients = differentiate(
            state.params, state.mutable, images, targets, dropout
        )
        grad_norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
        skip, skipped = jnp.zeros((), bool), state.skipped
        if skip_nonfinite:  # else the selections would cost, and never select
            skip = ~finite & (skipped < skip_nonfinite)
            skipped = skipped + skip
            value, grad_norm = (jnp.where(skip, 0.0, x) for x in (value, grad_norm))
            params, mutable, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(skip, old, new),
                (params, mutable, opt_state, ema),
                (state.params, state.mutable, state.opt_state, state.ema),
            )
        bad = state.totals.bad_step
        totals = Totals(
            loss=state.totals.loss + value,
            grad_norm=state.totals.grad_norm + grad_norm,
            steps=state.totals.steps + 1,
            updates=state.totals.updates + ~skip,
            # It only grows. What a step does not read, jit does not take over.
            skipped=jnp.maximum(state.totals.skipped, skipped),
            bad_step=jnp.where(finite | skip | (bad > 0), bad, step),
        )
        return TrainState(step, skipped, state.seed, params, mutable, opt_state, ema, totals)

    return train_step


def _make_gradients(
    model: nn.Module,
    loss: Callable[[Any, jax.Array], jax.Array],
    freeze: Sequence[str],
    accumulate: int,
) -> Callable[..., tuple[jax.Array, Any, Any]]:
    """Of parameters, other collections, images, targets and a key makes the loss, the collections
    afterwards and the gradients."""

    def loss_of(params, mutable, images, targets, key):
        if freeze:
            params = jax.tree.map(
                lambda fixed, p: jax.lax.stop_gradient(p) if fixed else p,
                frozen(params, freeze),
                params,
            )
        outputs, mutable = model.apply(
            {"params": params, **mutable},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=list(mutable),
        )
        return loss(outputs, targets), mutable

    differentiate = jax.value_and_grad(loss_of, has_aux=True)

    def at_once(params, mutable, images, targets, key):
        (value, mutable), gradients = differentiate(params, mutable, images, targets, key)
        return value, mutable, gradients

    def in_parts(params, mutable, images, targets, key):
        def add(carry, part):
            value, gradients, latest = carry
            (more, latest), new = differentiate(params, latest, *part)
            return (value + more, jax.tree.map(jnp.add, gradients, new), latest), None

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), mutable)
        parts = (_parts(images, accumulate), _parts(targets, accumulate))
        keys = jax.random.split(key, accumulate)
        (value, gradients, mutable), _ = jax.lax.scan(add, start, (*parts, keys))
        value, gradients = jax.tree.map(lambda x: x / accumulate, (value, gradients))
        return value, mutable, gradients

    return at_once if accumulate == 1 else in_parts


def _parts(array: jax.Array, parts: int) -> jax.Array:
    """`[batch, ...]` -> `[parts, batch / parts, ...]`, part i of every so-manieth example: each
    device that holds a piece of the batch then has a piece of every part."""
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
