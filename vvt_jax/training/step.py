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
    """Sums since the last report, kept on the device so that the loop need not wait for them."""

    loss: jax.Array
    grad_norm: jax.Array
    steps: jax.Array  # number of steps since the last report
    updates: jax.Array  # steps that were not skipped; loss and grad_norm are sums over these
    skipped: jax.Array  # value of the state's `skipped` after the last of the steps
    bad_step: jax.Array  # first step that was neither finite nor skipped; 0 if there is none

    @classmethod
    def zeros(cls) -> "Totals":
        return cls(
            *(jnp.zeros(()) for _ in range(2)), *(jnp.zeros((), jnp.int32) for _ in range(4))
        )


@flax.struct.dataclass
class TrainState:
    """Everything that a run carries from step to step and that a checkpoint holds of it."""

    step: jax.Array  # number of batches processed
    skipped: jax.Array  # batches without an update because the loss or gradient was not finite
    seed: jax.Array  # all randomness in a step is determined by seed and step alone
    params: Any
    mutable: Any  # the model's other collections, e.g. batch statistics
    opt_state: optax.OptState
    ema: Any  # moving average of the parameters, or None
    totals: Totals

    def variables(self, *, ema: bool = False) -> dict[str, Any]:
        """Return the variables for `model.apply`, with the averaged weights if `ema` is set."""
        return {"params": self.ema if ema else self.params, **self.mutable}


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int, int],
    seed: jax.typing.ArrayLike,
    *,
    ema: bool,
) -> TrainState:
    """Return the state before the first step; images are `[batch, height, width, 3]`."""
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
    """Return the training step for one batch, a pure function for `jax.jit`.

    Args:
        model: the model, called with images and `train=True`.
        optimizer: the optimizer, whose state is the `opt_state` of the training state.
        prepare: a function from a batch and a key to normalised images and targets `[batch, ...]`,
            see `mixing.prepare_batch`.
        loss: the loss as a function of the model's outputs and the targets. It is a mean over the
            batch in which all examples have the same weight.
        ema_decay: the decay rate of the averaged weights, if the state has them.
        accumulate: the number of parts in which a batch passes through the model, one after the
            other. This needs less memory and, for models without dropout, gives the same update
            as a single pass, up to rounding.
        freeze: the parameters that get no gradient, see `optimizer.frozen`.
        skip_nonfinite: the number of steps in a run that may be skipped because their loss or
            gradient is not finite. A skipped step changes only `step`, `skipped` and `totals`.
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
        if skip_nonfinite:  # otherwise the selections would cost time and never select anything
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
            # The maximum is simply `skipped`, which only grows, but computing it reads the old
            # value: jit does not donate the buffer of an input that the step never reads.
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
    """Return a function that computes the loss, the updated collections and the gradients.

    Its arguments are the parameters, the model's other collections, images, targets and a key.
    """

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
    """Split `[batch, ...]` into `[parts, batch / parts, ...]`.

    Part i consists of every `parts`-th example, beginning with example i, so that each device that
    holds a piece of the batch has a piece of every part.
    """
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
