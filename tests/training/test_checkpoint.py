"""Checkpoints of small states on disk: what comes back, what is kept, what is refused."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import fork_server
from vvt_jax.training.checkpoint import Best, CheckpointError, Checkpoints
from vvt_jax.training.checksums import SUMS
from vvt_jax.training.step import Totals, TrainState


def _state(step=0, *, seed=0, ema=True, width=8):
    rng = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"blocks": {"kernel": random(2, width, 3)}, "head": {"bias": random(3)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 1e-3))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        skipped=jnp.asarray(1, jnp.int32),
        seed=jnp.asarray(2**31 - 1, jnp.uint32),
        params=params,
        mutable={"batch_stats": {"mean": random(4)}} if seed else {},
        opt_state=opt_state,
        ema=jax.tree.map(lambda p: p / 3, params) if ema else None,
        totals=Totals(random(), random(), *map(jnp.asarray, (3, 2, 1, 2))),
    )


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _save(folder, *steps, keep=2, best=Best(), **options):  # noqa: B008 - frozen
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step, **options), best)


def _restore(folder, like=None, keep=2):
    with Checkpoints(folder, keep=keep) as checkpoints:
        return checkpoints.restore(_abstract(like or _state()))


def _kept(folder):
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "no ema"])
@pytest.mark.parametrize("seed", [0, 1], ids=["no collections", "collections"])
def test_comes_back_bit_for_bit(tmp_path, ema, seed):
    state, best = _state(7, seed=seed, ema=ema), Best(step=4, score=1 / 3)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, state, best)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 7
        restored, restored_best = checkpoints.restore(_abstract(state))
    assert restored_best == best
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_dtypes(restored, state)


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "no ema"])
@pytest.mark.parametrize("seed", [0, 1], ids=["no collections", "collections"])
def test_comes_back_without_the_optimizer_state(tmp_path, ema, seed):
    """Which would be of another optimizer."""
    state = _state(7, seed=seed, ema=ema)
    _save(tmp_path, 7, seed=seed, ema=ema)
    wanted = state.replace(opt_state=optax.EmptyState())
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        with pytest.raises(CheckpointError, match=r"opt_state/\S+ has shape"):
            checkpoints.restore(_abstract(wanted))
        restored, best = checkpoints.restore(_abstract(wanted), without=("opt_state",))
        variables = checkpoints.restore_variables()
    assert best == Best()
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    chex.assert_trees_all_equal(restored, wanted)
    chex.assert_trees_all_equal(variables, state.variables(ema=ema))


def test_newest_and_best_are_kept_and_the_newest_comes_back(tmp_path):
    best = Best()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, top1 in enumerate([0.1, 0.6, 0.9, 0.8, 0.5, 0.9, 0.2, 0.3, 0.1], 1):
            best = max(best, Best(step, top1), key=lambda b: b.score)
            checkpoints.save(step, _state(step), best)
    assert _kept(tmp_path) == [3, 8, 9]
    restored, found = _restore(tmp_path)
    assert (int(restored.step), found) == (9, best)


def test_the_best_stays_after_a_resume(tmp_path):
    _save(tmp_path, 3, 4, best=Best(3, 0.9))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        _, best = checkpoints.restore(_abstract(_state()))
        for step in (5, 6, 7):
            checkpoints.save(step, _state(step), best)
    assert _kept(tmp_path) == [3, 7]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore(_abstract(_state()))
        for step in (8, 9, 10):
            checkpoints.save(step, _state(step), Best(8, 0.95))
    assert _kept(tmp_path) == [8, 10]


def test_without_evaluations_the_newest_are_kept(tmp_path):
    _save(tmp_path, 1, 2, 3, 4, keep=3)
    assert _kept(tmp_path) == [2, 3, 4]


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, _state(3), Best(3, 0.5))
        checkpoints.save(3, _state(3, seed=1), Best())
    restored, best = _restore(tmp_path)
    assert best == Best(3, 0.5)
    chex.assert_trees_all_equal(restored, _state(3))


def test_saving_is_not_disturbed_by_steps_that_take_the_memory_over(tmp_path):
    state = _state(width=500_000)  # some 60 MB
    step = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 2 + 1, dataclasses.replace(s, step=s.step + 1)),
        donate_argnums=0,
    )
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        copies = {}
        for number in range(9):
            if number % 4 == 0:
                copies[number] = jax.tree.map(lambda x: np.array(x, copy=True), state)
                checkpoints.save(number, state, Best())
            state = step(state)
    for number in copies:
        alone = tmp_path.parent / f"{tmp_path.name}-{number}"
        shutil.copytree(tmp_path / str(number), alone / str(number))
        restored, _ = _restore(alone, state)
        chex.assert_trees_all_equal(restored, copies[number])


def test_the_restored_state_can_be_donated(tmp_path):
    _save(tmp_path, 1)
    restored, _ = _restore(tmp_path)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    for _ in range(3):
        restored = step(restored)
    chex.assert_trees_all_close(restored.params, jax.tree.map(lambda x: x * 8, _state().params))


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    _save(tmp_path, 1, 2)
    half = tmp_path / "3.orbax-checkpoint-tmp-1700000000"
    shutil.copytree(tmp_path / "2", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 2
        assert checkpoints.restore(_abstract(_state()))[0].step == 2
        checkpoints.save(3, _state(3), Best())
    assert _kept(tmp_path) == [2, 3]


def _arrays(folder):
    """The files of the large arrays, of which there are few."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 50_000]
    assert paths
    return paths


def _truncated(folder):
    for path in _arrays(folder):
        os.truncate(path, path.stat().st_size // 2)


def _emptied(folder):
    for path in _arrays(folder):
        path.write_bytes(b"")


def _missing(folder):
    for path in _arrays(folder):
        path.unlink()


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _flipped(folder):
    _flip(_arrays(folder)[0])


def _flipped_bookkeeping(folder):
    _flip(folder / "bookkeeping" / "metadata")


def _flipped_sums(folder):
    _flip(folder / "state" / SUMS)


def _emptied_sums(folder):
    (folder / "state" / SUMS).write_bytes(b"")


def _without_sums(folder):
    (folder / "state" / SUMS).unlink()


def _without_state(folder):
    shutil.rmtree(folder / "state")


def _without_bookkeeping(folder):
    shutil.rmtree(folder / "bookkeeping")


_DAMAGES = {
    _truncated: "is not what was written)",
    _emptied: "is not what was written)",
    _missing: "is missing)",
    _flipped: "is not what was written)",
    _flipped_bookkeeping: "(bookkeeping/metadata is not what was written)",
    _flipped_sums: "state/",
    _emptied_sums: "(state/SHA256SUMS is empty)",
    _without_sums: "(state/SHA256SUMS is missing)",
    _without_state: "(state/SHA256SUMS is missing)",
    _without_bookkeeping: "(bookkeeping/SHA256SUMS is missing)",
}


def _version(folder, version):
    path = folder / "bookkeeping" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version}))


def _old_version(folder):
    """Version 1 had no sums."""
    _version(folder, 1)
    for item in ("state", "bookkeeping"):
        (folder / item / SUMS).unlink()


def _new_version(folder):
    _version(folder, 9)
    digest = hashlib.sha256((folder / "bookkeeping" / "metadata").read_bytes()).hexdigest()
    (folder / "bookkeeping" / SUMS).write_text(f"{digest}  metadata\n")


def _all_damaged(folder):
    for path in folder.parent.iterdir():
        _flipped(path)


_REFUSALS = {
    _old_version: "has format version 1, but this program reads version 2.",
    _new_version: "has format version 9, but this program reads version 2.",
    _all_damaged: "and there is no sound one before it: use another workdir",
}
_RESTORE_EACH = """
    import json, sys
    from pathlib import Path
    from tests.training.test_checkpoint import _abstract, _state
    from vvt_jax.training.checkpoint import CheckpointError, Checkpoints

    told = {}
    for folder in Path(sys.argv[1]).iterdir():
        said = []
        keep = None if folder.name.startswith("read") else 2
        state = _state(width=10_001 if folder.name == "other_model" else 10_000)
        with Checkpoints(folder, keep=keep, say=said.append) as checkpoints:
            try:
                step = int(checkpoints.restore(_abstract(state))[0].step)
            except CheckpointError as error:
                step = None
                said.append(str(error))
            told[folder.name] = said, step, checkpoints.latest_step()
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """Folders whose newest checkpoint is damaged, and what a process that tried to restore from
    each said, restored, and took for the latest then: orbax's reads that fail go on to complain in
    the tests that come after."""
    root = tmp_path_factory.mktemp("damaged")
    _save(root / "other_model", 1, 2, width=10_000)
    for damage in (*_DAMAGES, *_REFUSALS):
        shutil.copytree(root / "other_model", root / damage.__name__)
        damage(root / damage.__name__ / "2")
    shutil.copytree(root / "_flipped", root / "read_only")
    done = fork_server.run(["-c", textwrap.dedent(_RESTORE_EACH), root])
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("damage", "words"), _DAMAGES.items(), ids=lambda d: getattr(d, "__name__", "")
)
def test_a_damaged_newest_checkpoint_is_told_of_and_put_aside(restored, damage, words):
    root, told = restored
    (sentence,), step, latest = told[damage.__name__]
    assert (step, latest) == (1, 1)
    assert sentence.startswith(f"The checkpoint {root / damage.__name__ / '2'} is damaged (")
    assert words in sentence
    assert sentence.endswith("; it is now 2.damaged. Going on from the one of step 1.")
    assert {p.name for p in (root / damage.__name__).iterdir()} == {"1", "2.damaged"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((refusal.__name__, words) for refusal, words in _REFUSALS.items()),
        (
            "other_model",
            "is of another model or optimizer: ema/blocks/kernel has shape (2, 10000, 3) there, "
            "(2, 10001, 3) here;",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_and_left_alone(restored, name, words):
    root, told = restored
    (sentence,), step, latest = told[name]
    assert (step, latest) == (None, 2)
    assert sentence.startswith(f"The checkpoint {root / name / '2'} ")
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert {p.name for p in (root / name).iterdir()} == {"1", "2"}


def test_what_only_reads_puts_nothing_aside(restored):
    root, told = restored
    (sentence,), step, _ = told["read_only"]
    assert step == 1
    assert sentence.endswith("is not what was written). Going on from the one of step 1.")
    assert {p.name for p in (root / "read_only").iterdir()} == {"1", "2"}


def test_the_sums_are_those_of_sha256sum(tmp_path):
    _save(tmp_path, 3)
    for item in ("state", "bookkeeping"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", SUMS],
            cwd=tmp_path / "3" / item,
            check=True,
            capture_output=True,
        )


def test_what_was_put_aside_is_never_overwritten(tmp_path):
    for _ in range(2):
        _save(tmp_path, 1, 2)
        _without_sums(tmp_path / "2")
        assert _restore(tmp_path)[0].step == 1
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2.damaged", "2.damaged-2"}


_WITHOUT_ROOM = """
    import resource, sys
    from pathlib import Path
    from tests.training.test_checkpoint import _save, _state
    from vvt_jax.training.checkpoint import Best, CheckpointError, Checkpoints

    folder = Path(sys.argv[1])
    _save(folder, 1, width=10_000)
    # Files can't grow beyond a size, which fails writes as a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    for _ in range(2):
        try:
            with Checkpoints(folder, keep=2) as checkpoints:
                checkpoints.save(2, _state(2, width=10_000), Best())
        except CheckpointError as error:
            print(error)
"""


def test_a_checkpoint_without_room_is_told_of_and_leaves_the_one_before(tmp_path):
    done = fork_server.run(["-c", textwrap.dedent(_WITHOUT_ROOM), tmp_path])
    assert done.returncode == 0, done.stderr
    # TensorStore's threads may print tracebacks of asyncio, past Python's logging
    assert "site-packages/orbax" not in done.stderr
    sentences = done.stdout.splitlines()
    assert len(sentences) == 2
    for sentence in sentences:
        assert sentence.startswith(f"A checkpoint can't be written into {tmp_path} (")
        assert sentence.endswith("with room on the disk, the same command goes on.")
    assert _restore(tmp_path, _state(width=10_000))[0].step == 1
    _save(tmp_path, 2, width=10_000)
    assert _kept(tmp_path) == [1, 2]


_SHARDED = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from pathlib import Path
    from jax.sharding import NamedSharding, PartitionSpec as P
    from vvt_jax.distributed import sharding
    from vvt_jax.training.checkpoint import Best, Checkpoints

    folder = Path(sys.argv[1])
    state = {"kernel": jnp.arange(64.0).reshape(4, 16) / 8, "step": jnp.asarray(5)}

    def laid_out(**sizes):
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "spatial": 1, **sizes}, 8)
        return sharding.state_shardings(mesh, state)

    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(5, jax.device_put(state, laid_out(fsdp=8)), Best())
    for sizes in ({"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 2, "spatial": 2}):
        shardings = laid_out(**sizes)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        with Checkpoints(folder, keep=2) as checkpoints:
            restored, _ = checkpoints.restore(abstract)
        for name in state:
            assert restored[name].sharding == shardings[name], (sizes, name)
            np.testing.assert_array_equal(restored[name], state[name])
    print("done")
"""


def test_comes_back_on_other_meshes(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = fork_server.run(["-c", textwrap.dedent(_SHARDED), tmp_path], environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    restored, _ = _restore_dict(tmp_path)
    np.testing.assert_array_equal(
        restored["kernel"], np.arange(64, dtype=np.float32).reshape(4, 16) / 8
    )


def _restore_dict(folder: Path):
    """On this process's one device."""
    state = {"kernel": jnp.zeros((4, 16)), "step": jnp.asarray(0)}
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(_abstract(state))
