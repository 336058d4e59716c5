"""A training or evaluation run: from a config to checkpoints, metrics and a model folder."""

import contextlib
import os
from collections.abc import Collection, Sequence

import jax
from ml_collections import ConfigDict

from vvt_jax.distributed import hosts, sharding
from vvt_jax.system import storage
from vvt_jax.system.errors import telling_of_full_disks
from vvt_jax.system.interruption import Interrupted, Interruption
from vvt_jax.system.lock import WorkdirLock, check_workdir
from vvt_jax.system.storage import AnyPath
from vvt_jax.training import charts, configuration
from vvt_jax.training import plan as planning
from vvt_jax.training.checkpoint import Best, Checkpoints, check_folder
from vvt_jax.training.configuration import ConfigError
from vvt_jax.training.evaluate import Evaluation
from vvt_jax.training.milestones import Milestones
from vvt_jax.training.plan import Plan, make_plan, open_sources
from vvt_jax.training.programs import NonFiniteLossError, Programs
from vvt_jax.training.provenance import Provenance
from vvt_jax.training.readback import Readback
from vvt_jax.training.reporting import Reporter, SilentReporter, describe
from vvt_jax.training.timing import Stopwatch, Trace

__all__ = ["Interrupted", "NonFiniteLossError", "train_and_evaluate"]


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike, *, flagged: Collection[str] = ()
) -> dict[str, float]:
    """Train and evaluate a model as the config specifies, resuming from the workdir if possible.

    The following are written to the workdir: `config.json`, `record.json` and `examples/` (what
    the run was made from, see `vvt_jax.training.run_record`), `layout.txt` (what each device
    holds), `checkpoints/`, `metrics.jsonl`, TensorBoard files and, from the first evaluation on,
    `model/`. The latter is a `save_pretrained` folder with the weights that have reached the
    highest validation top-1 accuracy (or mIoU) so far; these are the averaged weights if
    `optimizer.ema_decay` is set. Without a validation split, it holds the latest weights.

    Args:
        config: the configuration of the run, see `configs/common.py`.
        workdir: the run's folder, or a `gs://` address. Run again with the same workdir to resume.
            For how object stores differ, see `vvt_jax.system.storage`; TensorBoard files need a
            local folder.
        flagged: the fields, such as `data.size`, that were set on the command line. They override
            what a run or a model recorded, which in turn overrides the rest of the config.

    Returns:
        The measurements of the last evaluation, as in `metrics.jsonl`.

    Raises:
        UserError: the config, data set, checkpoint or loss can't be used; the message is one
            sentence.
        Interrupted: the run was stopped by SIGTERM or Ctrl-C, and its state was saved.
    """
    workdir = storage.locate(workdir)
    check_folder(workdir / "checkpoints")
    check_workdir(workdir)
    configuration.check_values(config)
    hosts.join(config.distributed, preemptible=config.mode == "train")
    if config.compilation_cache:
        cache = storage.locate(config.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", str(cache))
    may_write = config.mode == "train" or workdir.exists()
    made = Provenance(config, workdir, flagged)
    cache_dir = workdir / "offsets" if may_write else None
    sources = made.match(open_sources(made.config, cache_dir, made.cuts))
    plan = make_plan(made.config, sources)
    lines = planning.describe_data(plan)
    run = _evaluate if config.mode == "eval" else _train
    return run(plan, made, workdir, lines)


def _train(
    plan: Plan, made: Provenance, workdir: AnyPath, lines: Sequence[str]
) -> dict[str, float]:
    config, programs, total = plan.config, Programs(plan), plan.steps.total
    with contextlib.ExitStack() as stack:
        stack.enter_context(telling_of_full_disks(workdir))
        if hosts.is_first():
            stack.enter_context(WorkdirLock(workdir))
        interruption = stack.enter_context(Interruption())
        notes = list(made.told)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, say=notes.append)
        )
        if checkpoints.latest_step() is not None:
            state, best = checkpoints.restore(plan.abstract_state)
        else:
            state, best = programs.init_state(), Best()
            if config.init_from:
                state, new_notes = programs.start_from(made.read_start(), state)
                notes += new_notes
        start = step = int(state.step)
        train_step = programs.compile_train_step()  # so that compiling isn't timed
        if hosts.is_first():  # only now, so that a run that can't start leaves nothing behind
            made.write(workdir, plan.preprocessing, plan.sources)
        make_reporter = Reporter if hosts.is_first() else SilentReporter
        reporter = stack.enter_context(make_reporter(workdir, start_step=step, total_steps=total))
        layout = planning.describe_layout(plan, workdir / "layout.txt")
        for line in [*notes, *lines, planning.describe_steps(plan), *layout]:
            reporter.say(line)
        if step:
            reporter.say(f"Resumed at step {step} of {total}.")
        broken = plan.broken_images(reporter.say)
        batches = stack.enter_context(
            contextlib.closing(broken.watch(plan.train_batches(start_step=step)))
        )
        profile_at = config.profile_at_step if hosts.is_first() else 0
        trace = stack.enter_context(Trace(workdir / "profile", profile_at, config.profile_steps))
        evaluation = Evaluation(plan, programs, reporter.say)
        milestones = Milestones(plan, evaluation, checkpoints, reporter, best, workdir / "model")
        if step and evaluation.was_missed(step, reporter):
            milestones.reach(state, {}, evaluate=plan.steps.due(step).evaluate, save=False)

        stopwatch = Stopwatch()
        readback = Readback(plan, broken, stopwatch)
        dispatched = sharding.Dispatched()
        arrays = sharding.to_devices(batches, plan.mesh, config.batch_size)
        for batch in stopwatch.waiting(arrays):
            if step == total or interruption.stops_after(step - start):
                break
            trace.before(step + 1)
            state, step_done = train_step(state, batch)
            step += 1
            dispatched.add(step_done)
            trace.after(step, step_done)
            reporter.advance()
            if metrics := readback.read():  # while the devices are busy with this step
                reporter.write(step - 1, metrics)
                readback.name_broken()
            due = plan.steps.due(step)
            if due.log:
                readback.put(step, state.totals)
                state = programs.without_totals(state)
            if due.evaluate or due.save:
                metrics = readback.read()
                readback.name_broken()
                programs.check_finite(state)
                with stopwatch.paused():
                    milestones.reach(state, metrics, evaluate=due.evaluate, save=due.save)

        if interruption.signum:
            if metrics := readback.read():
                reporter.write(step, metrics)
            programs.check_finite(state)
            milestones.save(state)
            readback.name_broken()
    if interruption.signum:  # the signal may also have come during the last checkpoint's saving
        raise Interrupted(interruption.signum, step)
    return milestones.latest


def _evaluate(
    plan: Plan, made: Provenance, workdir: AnyPath, lines: Sequence[str]
) -> dict[str, float]:
    programs, notes = Programs(plan), list(made.told)
    evaluation = Evaluation(plan, programs, say=notes.append)
    extra_sets = evaluation.open_extra_sets(workdir / "offsets" if workdir.exists() else None)
    if made.start is not None:
        state, new_notes = programs.start_from(made.start, programs.init_state(), keep_head=True)
        notes += new_notes
    else:
        with Checkpoints(workdir / "checkpoints", keep=None, say=notes.append) as checkpoints:
            if checkpoints.latest_step() is None:
                raise ConfigError(
                    f"{workdir} has no checkpoint to evaluate: is it the run's folder?"
                )
            state, _ = checkpoints.restore(plan.abstract_state, without=("opt_state",))
    notes[:0] = planning.describe_rows(plan)
    folder = workdir / "evaluation"
    metrics = evaluation.measure(state, "validation", "eval", folder)
    metrics |= evaluation.measure(state, "test", "test", folder)
    metrics |= evaluation.measure_extra_sets(state, extra_sets, folder)
    if not hosts.is_first():
        return metrics
    step = int(state.step)
    charts.write_metrics(folder / "metrics.json", step, metrics)
    for name, value in metrics.items():
        if name.endswith("/loss"):
            notes.append(f"step {step}: {describe(name.removesuffix('/loss'), metrics)}")
        if name.endswith("/mce"):
            kind = name.removesuffix("/mce")
            notes.append(f"step {step}: {kind} mean corruption error {value:.2%}")
    notes.append(f"All measurements, and what each class is taken for, are in {folder}.")
    print(*lines, *notes, sep="\n")
    return metrics
