"""The compiled programs of a run, each built from the plan when it is first needed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vvt_jax.data.examples import Source
from vvt_jax.distributed import hosts, sharding
from vvt_jax.models import forms, unstack_blocks
from vvt_jax.system.errors import UserError
from vvt_jax.training.finetune import StartingWeights, initial_variables
from vvt_jax.training.plan import Plan
from vvt_jax.training.step import Totals, TrainState, make_train_step
from vvt_jax.training.tasks import Measured

TrainStep = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, jax.Array]]


class NonFiniteLossError(UserError):
    """A loss, gradient or weight is NaN or infinite."""


class Programs:
    """The programs that run on the devices.

    Args:
        plan: the plan of the run.
    """

    def __init__(self, plan: Plan):
        self._plan = plan

    def init_state(self) -> TrainState:
        """Return the state before the first step, laid out on the devices."""
        plan, options = self._plan, forms.compiler_options("init")
        init = jax.jit(plan.init_state, out_shardings=plan.shardings, compiler_options=options)
        return init(plan.config.seed)

    def start_from(
        self, start: StartingWeights, state: TrainState, *, keep_head: bool = False
    ) -> tuple[TrainState, list[str]]:
        """Return the state with the starting weights in it, and lines to report about them.

        See `initial_variables` for how the weights are chosen.
        """
        plan = self._plan
        variables, lines = initial_variables(
            start,
            plan.model,
            hosts.fetch(state.variables()),
            plan.main_source.class_names,
            keep_head=keep_head,
        )
        params = variables.pop("params")

        def place(tree, shardings):
            # Copied because the step donates these buffers, and JAX may share memory with NumPy.
            return jax.tree.map(jnp.copy, jax.device_put(tree, shardings))

        return dataclasses.replace(
            state,
            params=place(params, plan.shardings.params),
            mutable=place(variables, plan.shardings.mutable),
            ema=None if state.ema is None else place(params, plan.shardings.ema),
        ), lines

    def compile_train_step(self) -> TrainStep:
        """Compile and return the training step.

        The step donates the state's buffers, and rejects arguments of any other shape. Besides the
        state, it returns a small array that is ready when the step has finished. The state itself
        can't be waited for, because the next step reuses its buffers.
        """
        plan, fields = self._plan, self._plan.config.optimizer
        train_step = make_train_step(
            plan.model,
            plan.optimizer,
            prepare=plan.task.prepare,
            loss=plan.task.loss,
            ema_decay=fields.ema_decay,
            accumulate=fields.accumulate,
            freeze=fields.freeze,
            skip_nonfinite=fields.skip_nonfinite,
        )

        def update(state, batch):
            state = train_step(state, batch)
            return state, state.step

        return sharding.compile_program(
            "train",
            update,
            plan.abstract_state,
            sharding.abstract_batch(plan.mesh, plan.task.train_arrays()),
            donate=(0,),
            out_shardings=(plan.shardings, plan.shardings.step),
        )

    def without_totals(self, state: TrainState) -> TrainState:
        """Return the state with its totals reset to zero."""
        return dataclasses.replace(state, totals=self._zero_totals())

    def check_finite(self, state: TrainState) -> None:
        """Check that a state is finite and may be saved, before any of it is written.

        Raises:
            NonFiniteLossError: a loss, gradient or weight is not finite.
        """
        check_totals(state.totals)
        if not bool(self._are_finite((state.params, state.mutable, state.ema))):
            raise NonFiniteLossError(
                f"The weights after step {int(state.step)} are not finite, so they are not saved: "
                "the last checkpoint is from before; a lower config.optimizer.learning_rate may "
                "help."
            )

    def variables(self, state: TrainState, *, ema: bool) -> Any:
        """Return the state's variables, with averaged weights if `ema` is set, for `measure`."""
        return self._unstack(state.variables(ema=ema))

    @functools.cached_property
    def measure(self) -> Callable[[Any, Source], Measured]:
        """A function that evaluates variables on a source."""
        return self._plan.task.evaluator(self._plan.mesh, self._eval_variables)

    @functools.cached_property
    def measure_set(self) -> Callable[..., Measured]:
        """A function that evaluates variables on a source of `imagenet_sets`."""
        return self._plan.task.set_evaluator(self._plan.mesh, self._eval_variables)

    @functools.cached_property
    def _eval_variables(self) -> Any:
        """The shapes, dtypes and shardings of the variables that evaluation takes.

        Their blocks are unstacked, which makes a program that runs often faster.
        """
        shapes = jax.eval_shape(unstack_blocks, self._plan.abstract_state.variables())
        return sharding.abstract(sharding.state_shardings(self._plan.mesh, shapes), shapes)

    @functools.cached_property
    def _unstack(self) -> Callable[[Any], Any]:
        shardings = jax.tree.map(lambda x: x.sharding, self._eval_variables)
        return jax.jit(unstack_blocks, out_shardings=shardings)

    @functools.cached_property
    def _zero_totals(self) -> Callable[[], Totals]:
        # Compiled, because `device_put` would make several processes compare the values and wait.
        return jax.jit(Totals.zeros, out_shardings=self._plan.shardings.totals)

    @functools.cached_property
    def _are_finite(self) -> Callable[[Any], jax.Array]:
        def check(tree: Any) -> jax.Array:
            return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()

        return jax.jit(check, out_shardings=sharding.replicated(self._plan.mesh))


def check_totals(totals: Totals) -> None:
    """Check that all losses and gradients in the totals are finite, waiting for their last step.

    Raises:
        NonFiniteLossError: a loss or gradient since the last report was not finite.
    """
    if bad_step := int(totals.bad_step):
        raise NonFiniteLossError(
            f"The loss or its gradient is not finite at step {bad_step}: the last checkpoint is "
            "from before; a lower config.optimizer.learning_rate or clip_norm may help."
        )
