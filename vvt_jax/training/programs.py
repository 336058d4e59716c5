"""The compiled programs of a run, each made from its plan when it is first needed."""

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
    """A loss, gradient or weight that is not a number, or infinite."""


class Programs:
    """What runs on the devices.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: Plan):
        self._plan = plan

    def init_state(self) -> TrainState:
        """The state before the first step, laid out on the devices."""
        plan, options = self._plan, forms.compiler_options("init")
        init = jax.jit(plan.init_state, out_shardings=plan.shardings, compiler_options=options)
        return init(plan.config.seed)

    def start_from(
        self, start: StartingWeights, state: TrainState, *, keep_head: bool = False
    ) -> tuple[TrainState, list[str]]:
        """The state with other weights, and what to say of them; see `initial_variables`."""
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
            # Copied: the step takes the memory over, and jax may share numpy's.
            return jax.tree.map(jnp.copy, jax.device_put(tree, shardings))

        return dataclasses.replace(
            state,
            params=place(params, plan.shardings.params),
            mutable=place(variables, plan.shardings.mutable),
            ema=None if state.ema is None else place(params, plan.shardings.ema),
        ), lines

    def compile_train_step(self) -> TrainStep:
        """Compiles the update. It donates the state's buffers, and any other shape is an error.

        What it returns beside the state is small, and there when the step is done: the state itself
        can't be waited for, because the next step takes its buffers.
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
        """The state with totals that start at zero."""
        return dataclasses.replace(state, totals=self._zero_totals())

    def check_finite(self, state: TrainState) -> None:
        """Refuses a state that must not be saved, before anything of it is written.

        Raises:
            NonFiniteLossError: a loss, a gradient or a weight that is not finite.
        """
        check_totals(state.totals)
        if not bool(self._are_finite((state.params, state.mutable, state.ema))):
            raise NonFiniteLossError(
                f"The weights after step {int(state.step)} are not finite, so they are not saved: "
                "the last checkpoint is from before; a lower config.optimizer.learning_rate may "
                "help."
            )

    def variables(self, state: TrainState, *, ema: bool) -> Any:
        """The state's weights, averaged ones on request, as `measure` takes them."""
        return self._unstack(state.variables(ema=ema))

    @functools.cached_property
    def measure(self) -> Callable[[Any, Source], Measured]:
        """Measures variables on a source."""
        return self._plan.task.evaluator(self._plan.mesh, self._eval_variables)

    @functools.cached_property
    def measure_set(self) -> Callable[..., Measured]:
        """Measures variables on a source of `imagenet_sets`."""
        return self._plan.task.set_evaluator(self._plan.mesh, self._eval_variables)

    @functools.cached_property
    def _eval_variables(self) -> Any:
        """Variables as evaluation takes them: unstacked, which a program that runs often is faster
        with."""
        shapes = jax.eval_shape(unstack_blocks, self._plan.abstract_state.variables())
        return sharding.abstract(sharding.state_shardings(self._plan.mesh, shapes), shapes)

    @functools.cached_property
    def _unstack(self) -> Callable[[Any], Any]:
        shardings = jax.tree.map(lambda x: x.sharding, self._eval_variables)
        return jax.jit(unstack_blocks, out_shardings=shardings)

    @functools.cached_property
    def _zero_totals(self) -> Callable[[], Totals]:
        # Compiled rather than `device_put`, which makes several processes compare values and wait
        return jax.jit(Totals.zeros, out_shardings=self._plan.shardings.totals)

    @functools.cached_property
    def _are_finite(self) -> Callable[[Any], jax.Array]:
        def check(tree: Any) -> jax.Array:
            return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()

        return jax.jit(check, out_shardings=sharding.replicated(self._plan.mesh))


def check_totals(totals: Totals) -> None:
    """Waits for the step that the totals are of.

    Raises:
        NonFiniteLossError: a loss or a gradient since the last report was not finite.
    """
    if bad_step := int(totals.bad_step):
        raise NonFiniteLossError(
            f"The loss or its gradient is not finite at step {bad_step}: the last checkpoint is "
            "from before; a lower config.optimizer.learning_rate or clip_norm may help."
        )
