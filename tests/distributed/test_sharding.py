"""Meshes, layouts and the way of batches, on eight simulated devices in processes of their own."""

import json
import os
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from tests import fork_server
from vvt_jax.distributed.sharding import (
    AXES,
    Dispatched,
    batch_shardings,
    describe_rows,
    make_mesh,
    state_shardings,
    to_devices,
)
from vvt_jax.models.convolution import row_groups
from vvt_jax.system.errors import UserError


def _mesh(data=1, fsdp=1, spatial=1, batch_size=8):
    return make_mesh({"data": data, "fsdp": fsdp, "spatial": spatial}, batch_size)


def _on_eight_devices(code: str, **environment):
    """What the code printed, read as JSON."""
    environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = fork_server.run(
        ["-c", textwrap.dedent(code)], {**os.environ, **environment}, warnings_are_errors=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_LAYOUTS = """
    import json, jax, jax.numpy as jnp, optax
    import vvt_jax
    from vvt_jax.distributed import sharding
    from vvt_jax.system.errors import UserError
    from vvt_jax.training.step import init_state

    def mesh(data, fsdp, spatial, batch_size=64, height=None):
        sizes = {"data": data, "fsdp": fsdp, "spatial": spatial}
        return sharding.make_mesh(sizes, batch_size, height=height)

    told = {"meshes": [], "errors": {}}
    for sizes in ((8, 1, 1), (-1, 1, 1), (1, -1, 2), (2, 2, -1), (2, 2, 2),
                  (1, 1, 8, 64, 256), (2, 1, 4, 64, 32), (1, 1, 8, 64, 64)):
        told["meshes"].append(list(mesh(*sizes).shape.values()))
    for sizes in ((3, 1, 1), (1, 1, 1), (2, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, 1, 8), (-2, 1, 1),
                  (16, 1, 1), (4, 2, 1, 60), (1, 1, 8, 64, 36),
                  (1, 1, 8, 64, 1083)):
        try:
            mesh(*sizes)
        except UserError as error:
            told["errors"][str(sizes)] = str(error)

    model = vvt_jax.create_model("vvt_nano", depths=(256, 1, 1, 1), num_classes=10)
    state = jax.eval_shape(
        lambda: init_state(model, optax.adamw(1e-3), (1, 32, 32, 3), 0, ema=True)
    )
    for axis in ("fsdp", "data"):
        sizes = {"data": 1, "fsdp": 1, "spatial": 1, axis: 8}
        shardings = sharding.state_shardings(sharding.make_mesh(sizes, 64), state)
        told[axis] = {
            jax.tree_util.keystr(path): [list(shape.shape), list(sharding.spec)]
            for (path, shape), sharding in zip(
                jax.tree.leaves_with_path(state), jax.tree.leaves(shardings), strict=True
            )
        }
        if axis == "fsdp":
            abstract = sharding.abstract(shardings, state)
            told["report"] = sharding.layout_report(abstract).splitlines()
            told["short_report"] = sharding.layout_report(abstract, largest=2).splitlines()
            told["whole"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    told["described"] = [sharding.describe_mesh(mesh(*s)) for s in ((8, 1, 1), (1, 1, 8, 64, 256))]
    batch = sharding.batch_shardings(mesh(2, 2, 2), ["image", "label", "mask"])
    arrays = {"image": jnp.zeros((8, 32, 32, 3)), "label": jnp.zeros(8), "mask": jnp.zeros(8)}

    import functools
    from vvt_jax.models import forms
    from vvt_jax.models.convolution import convolve

    def network(stride, kernels, x):  # the smallest in which XLA alone gets gradients wrong
        x = convolve(x, kernels[0], (stride, stride), [(1, 1)] * 2)
        x = convolve(x, kernels[1], (2, 2), [(1, 1)] * 2)
        return jnp.square(convolve(x, kernels[2], (1, 1), "SAME", feature_group_count=4)).sum()

    def differentiate(stride, *arguments, **layout):
        options = {"xla_backend_optimization_level": 0}
        function = jax.grad(functools.partial(network, stride))
        return jax.jit(function, compiler_options=options, **layout)(*arguments)

    shapes = ((3, 3, 3, 4), (3, 3, 4, 4), (3, 3, 1, 4))
    kernels = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    told["gradients"] = {}
    cases = ((4, 40, 4, True), (4, 40, 4, False), (8, 64, 8, True), (8, 40, 4, True))
    for devices, rows, stride, known in cases:
        x = jax.random.normal(jax.random.key(9), (1, rows, 8, 3))
        sizes = {"data": 1, "fsdp": 1, "spatial": devices}
        place = sharding.make_mesh(sizes, 1, height=rows, devices=jax.devices()[:devices])
        layout = sharding.batch_shardings(place, ["image"])["image"]
        whole = sharding.replicated(place)
        inside = sharding.compiling_for(place)
        if not known:
            inside = forms.compiling_for("cpu", spatial=devices)
        with inside:
            many = differentiate(
                stride, jax.device_put(kernels, whole), jax.device_put(x, layout),
                out_shardings=whole,
            )
        told["gradients"][f"{rows} over {devices}, {known}"] = [
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
            for a, b in zip(differentiate(stride, kernels, x), jax.device_get(many), strict=True)
        ]
    told["batch"] = {k: list(s.shard_shape(arrays[k].shape)) for k, s in batch.items()}
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def layouts():
    return _on_eight_devices(_LAYOUTS)


def test_mesh_sizes(layouts):
    assert layouts["meshes"] == [
        [8, 1, 1],
        [8, 1, 1],
        [1, 4, 2],
        [2, 2, 2],
        [2, 2, 2],
        [1, 1, 8],
        [2, 1, 4],
        [1, 1, 8],
    ]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("(3, 1, 1)", "(data=3, fsdp=1, spatial=1) does not fit 8 device(s)"),
        ("(1, 1, 1)", "uses 1 of 8 device(s): set one size to -1"),
        ("(2, 1, 1)", "uses 2 of 8 device(s): set one size to -1"),
        ("(-1, -1, 1)", "at most one is -1"),
        ("(-1, 3, 1)", "does not fit 8 device(s)"),
        ("(0, 1, 8)", "sizes are positive"),
        ("(-2, 1, 1)", "sizes are positive"),
        ("(16, 1, 1)", "does not fit 8 device(s)"),
        ("(4, 2, 1, 60)", "config.batch_size=60 does not divide over the 8 devices"),
        ("(1, 1, 8, 64, 36)", "36 rows do not divide over the 8 devices that share an image"),
        ("(1, 1, 8, 64, 36)", "the nearest that do are 32 and 40."),
        ("(1, 1, 8, 64, 1083)", "the nearest that do are 1080 and 1088."),
    ],
)
def test_mesh_errors(layouts, sizes, words):
    assert words in layouts["errors"][sizes]


def test_fsdp_takes_the_largest_dimension_that_divides_and_never_the_stack(layouts):
    for path, (shape, spec) in layouts["fsdp"].items():
        stacked = "['blocks']" in path
        sizes = [0 if size % 8 or (stacked and i == 0) else size for i, size in enumerate(shape)]
        if not any(sizes):
            assert spec == [], path
            continue
        assert spec.count("fsdp") == 1, path
        assert sizes[spec.index("fsdp")] == max(sizes), path
    # spelled out for some
    for path, shape, spec in (
        (
            "['stage1']['blocks']['feed_forward']['fc1']['kernel']",
            [256, 32, 128],
            [None, None, "fsdp"],
        ),
        ("['stage1']['blocks']['feed_forward']['fc2']['kernel']", [256, 128, 32], [None, "fsdp"]),
        ("['stage1']['blocks']['norm1']['scale']", [256, 32], [None, "fsdp"]),
        ("['stage2']['patch_embed']['conv']['kernel']", [3, 3, 32, 48], [None, None, None, "fsdp"]),
        ("['head']['kernel']", [64, 10], ["fsdp"]),
        ("['head']['bias']", [10], []),
    ):
        assert layouts["fsdp"][f".params{path}"] == [shape, spec], path


def test_optimizer_state_and_average_lie_as_their_parameters(layouts):
    table = layouts["fsdp"]
    parameters = {path: layout for path, layout in table.items() if path.startswith(".params")}
    for path, layout in parameters.items():
        name = path.removeprefix(".params")
        others = [p for p in table if p.endswith(name) and p != path]
        assert len(others) == 3, path  # two moments and the moving average
        assert all(table[other] == layout for other in others), path


def test_report_of_the_layout(layouts):
    heading, *rows = layouts["report"]
    assert heading.split() == ["array", "shape", "partition", "bytes", "a", "device"]
    assert sum(not row.startswith("sum") for row in rows) == len(layouts["fsdp"])
    name = "params/stage1/blocks/feed_forward/fc1/kernel"
    (row,) = (row for row in rows if row.startswith(name))
    size = f"{256 * 32 * 128 * 4 // 8:,}"
    assert row.split() == [name, "256x32x128", "-,", "-,", "fsdp", size]
    listed = sum(int(row.split()[-1].replace(",", "")) for row in rows if row[:3] != "sum")
    total = int(rows[-1].split()[-1].replace(",", ""))
    assert total == listed
    assert f"{layouts['whole']:,} in all" in rows[-1]
    assert layouts["whole"] / 8 <= total <= 1.05 * layouts["whole"] / 8
    assert {row.split()[2] for row in rows[:-1] if row.startswith("sum of")} == {
        "step", "skipped", "seed", "params", "opt_state", "ema", "totals"
    }  # fmt: skip


def test_short_report_lists_the_largest_parameters(layouts):
    _, *rows = layouts["short_report"]
    assert [row.split()[0] for row in rows[:2]] == [
        "params/stage1/blocks/feed_forward/fc1/kernel",
        "params/stage1/blocks/feed_forward/fc2/kernel",
    ]
    assert rows[2].split() == ["and", str(len(layouts["fsdp"]) - 2), "more"]
    sums = [row.split() for row in layouts["report"] if row.startswith("sum")]
    assert [row.split() for row in rows[3:]] == sums


def test_description_of_a_mesh_has_the_forms_chosen_for_it(layouts):
    data, spatial = layouts["described"]
    assert data.startswith("8 device(s) of kind cpu: data 8 x fsdp 1 x spatial 1.")
    assert data.endswith("Forms: depthwise shift, attention separable, gelu kept.")
    assert "spatial 8" in spatial
    assert spatial.endswith("Forms: depthwise grouped, attention concatenated, gelu recomputed.")


@pytest.mark.parametrize(
    "case", ["40 over 4, True", "40 over 4, False", "64 over 8, True", "40 over 8, True"]
)
def test_gradients_of_kernels_are_right_where_rows_do_not_divide(layouts, case):
    """10 rows over 4 devices, with and without a layout that is known; 4 rows over 8 devices; 10
    rows over 8 devices, where the last ones need input from beyond their neighbours'."""
    assert max(layouts["gradients"][case]) < 1e-5


@pytest.mark.parametrize(
    ("rows", "devices", "groups"),
    [(34, 4, 4), (32, 4, 4), (9, 8, 5), (8, 8, 8), (7, 8, 1), (5, 3, 3), (5, 1, 1)],
)
def test_groups_of_rows(rows, devices, groups):
    assert row_groups(rows, devices) == groups


def test_rows_that_do_not_divide_evenly_are_described():
    def describe(devices, height):
        return describe_rows(AbstractMesh((1, 1, devices), AXES), height, (4, 8, 16, 32))

    assert describe(4, 128) is describe(1, 136) is None
    told = describe(8, 72)
    for words in ("8 devices", "72 rows", "256", "33% more"):
        assert words in told
    rows, groups, largest = "18, 9, 5 and 3 rows", "6, 5, 1 and 1 groups", "3, 2, 5 and 3 rows"
    assert told.index(rows) < told.index(groups) < told.index(largest)


def test_few_programs_are_dispatched_and_not_waited_for():
    dispatched, waited = Dispatched(), []
    results = [SimpleNamespace(block_until_ready=lambda i=i: waited.append(i)) for i in range(5)]
    returned = [dispatched.add(result) for result in results]
    assert waited == [0, 1, 2]
    assert [len(done) for done in returned] == [0, 0, 1, 1, 1]
    assert len(dispatched.finish()) == 2
    assert waited == [0, 1, 2, 3, 4]


def test_without_fsdp_the_state_is_whole_everywhere(layouts):
    assert {tuple(spec) for _, spec in layouts["data"].values()} == {()}


def test_batches_are_split_by_example_and_images_by_row(layouts):
    assert layouts["batch"] == {"image": [2, 16, 32, 3], "label": [2], "mask": [2]}


def test_one_device():
    mesh = _mesh(data=-1)
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    shardings = state_shardings(mesh, {"blocks": {"kernel": np.zeros((2, 8, 8))}})
    assert shardings["blocks"]["kernel"].is_fully_replicated
    with pytest.raises(UserError, match=r"does not fit 1 device\(s\)"):
        _mesh(fsdp=2)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_to_devices_gives_every_batch_in_order(count):
    mesh = _mesh()
    batches = [
        {"image": np.full((2, 4, 4, 3), i, np.uint8), "label": np.full(2, i)} for i in range(count)
    ]
    given = list(to_devices(iter(batches), mesh))
    assert len(given) == count
    for batch, got in zip(batches, given, strict=True):
        assert set(got) == set(batch)
        for name, array in got.items():
            assert array.sharding == batch_shardings(mesh, batch)[name]
            np.testing.assert_array_equal(array, batch[name])
            assert array.dtype == jax.dtypes.canonicalize_dtype(batch[name].dtype)


def test_to_devices_draws_few_batches_ahead():
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield {"label": np.full(2, drawn[-1], np.int32)}

    batches = to_devices(endless(), _mesh())
    assert drawn == []
    for i in range(10):
        assert int(next(batches)["label"][0]) == i
        assert len(drawn) <= i + 3


# Unoptimised, since compiling takes longest here. Without the published clamp: it has no gradient
# where it acts, so an element that rounding flips there would change gradients by far more.
_GRADIENTS = """
    import functools, json, jax, jax.numpy as jnp, numpy as np, optax
    import vvt_jax
    from vvt_jax.distributed import sharding
    from vvt_jax.training.mixing import prepare_batch
    from vvt_jax.training.optimizer import make_optimizer
    from vvt_jax.training.step import init_state, make_train_step
    from configs import common

    model = vvt_jax.create_model(
        "vvt_nano", embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(2, 1, 1, 1),
        num_classes=10, clamp=False, drop_path_rate=0.2,
    )
    fields = common.get_config().optimizer.to_dict()
    optimizer = make_optimizer(fields, lambda step: 1e-3)
    augment = {**common.get_config().augment, "mixup": 0.8, "cutmix": 1.0, "erase": 0.25}
    prepare = functools.partial(
        prepare_batch, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3}, augment=augment,
        label_smoothing=0.1, num_classes=10,
    )
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    init = jax.jit(
        lambda: init_state(model, optimizer, (1, 256, 32, 3), 0, ema=False),
        compiler_options=options,
    )
    start = jax.device_get(init())
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(8, 256, 32, 3), dtype=np.uint8),
        "label": rng.integers(10, size=8).astype(np.int32),
    }

    def run(sizes, bands=1):
        program = make_train_step(model.clone(ffn_bands=bands), optimizer, prepare=prepare)
        if sizes is None:
            return jax.device_get(jax.jit(program, compiler_options=options)(start, batch))
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), 8)
        shardings = sharding.state_shardings(mesh, start)
        state = jax.device_put(start, shardings)
        (on_devices,) = sharding.to_devices([batch], mesh)
        with sharding.compiling_for(mesh):
            done = jax.jit(
                program, donate_argnums=0, out_shardings=shardings, compiler_options=options
            )(state, on_devices)
        assert jax.tree.map(lambda x: x.sharding, done) == shardings
        return jax.device_get(done)

    def gradients(state):  # the first moment after one step is a tenth of them
        return jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))

    one, told = run(None), {}
    norm = np.sqrt(sum(np.square(g).sum() for g in gradients(one)))
    for sizes in ((2, 2, 2), (1, 1, 8, 2)):
        other = run(sizes[:3], *sizes[3:])
        far = np.sqrt(sum(np.square(a - b).sum() for a, b in
                          zip(gradients(one), gradients(other), strict=True)))
        told[str(sizes)] = {
            "loss": [float(one.totals.loss), float(other.totals.loss)],
            "grad_norm": [float(one.totals.grad_norm), float(other.totals.grad_norm)],
            "gradients": float(far / norm),
        }
    print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_step_on_eight_devices_equals_one_on_one(compilation_cache):
    """All axes together, and rows with feed-forward networks in two bands."""
    told = _on_eight_devices(_GRADIENTS, JAX_COMPILATION_CACHE_DIR=str(compilation_cache))
    assert list(told) == ["(2, 2, 2)", "(1, 1, 8, 2)"]
    for mesh, found in told.items():
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(*found[name], rtol=1e-5, err_msg=f"{mesh} {name}")
        assert 0 <= found["gradients"] < 1e-5, f"{mesh} {found}"


_BANDS = """
    import json, jax, jax.numpy as jnp, numpy as np
    from vvt_jax.costs import hlo
    from vvt_jax.distributed import sharding
    from vvt_jax.models import layers

    options = {"xla_backend_optimization_level": 0}
    rng = np.random.default_rng(0)
    told = {}
    for sizes, shape in (((1, 1, 8), (1, 32, 4, 4)), ((2, 2, 2), (4, 20, 4, 4))):
        x = rng.standard_normal(shape).astype(np.float32)
        whole, bands = (layers.ConvFeedForward(hidden=8, bands=n) for n in (1, 3))
        variables = jax.tree.map(
            lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
            jax.eval_shape(whole.init, jax.random.key(0), x),
        )

        def differentiate(module):
            value = lambda v, x: jnp.sin(module.apply(v, x)).sum()
            return jax.jit(jax.value_and_grad(value, (0, 1)), compiler_options=options)

        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), 4)
        put = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
        images = jax.device_put(x, sharding.batch_shardings(mesh, ["image"])["image"])
        with sharding.compiling_for(mesh):
            forward = jax.jit(bands.apply, compiler_options=options).lower(put, images).compile()
            many = differentiate(bands)(put, images)
        one = differentiate(whole)(variables, x)
        told[str(sizes)] = {
            "collectives": [[c.kind, c.shapes] for c in hlo.collectives(forward.as_text())],
            "far": max(
                float(np.abs(a - b).max() / np.abs(a).max())
                for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
            ),
        }
    print(json.dumps(told))
"""


@pytest.mark.slow
def test_bands_of_rows_trade_two_rows_of_the_narrow_map_alone():
    """Each device cuts the rows that it has; their number need not divide by the bands."""
    told = _on_eight_devices(_BANDS)
    assert list(told) == ["(1, 1, 8)", "(2, 2, 2)"]
    for mesh, found in told.items():
        assert found["collectives"] == [["collective-permute", [[1, 1, 1, 4, 4]]]] * 2, mesh
        assert found["far"] < 1e-5, mesh


_MODELS = """
    import json
    from experiments.gradients.run import Case, compare

    cases = (Case("classifier", 136, (1, 1, 4)), Case("fpn", 72, (1, 1, 8)),
             Case("classifier", 72, (1, 2, 4), batch=2, bands=3))
    print(json.dumps({case.name: compare(case) for case in cases}))
"""


@pytest.mark.slow
def test_gradients_of_models_are_right_where_rows_do_not_divide(compilation_cache):
    told = _on_eight_devices(_MODELS, JAX_COMPILATION_CACHE_DIR=str(compilation_cache))
    assert len(told) == 3
    for name, found in told.items():
        assert found["arrays"] > 100, name
        assert not found["wrong"], name
