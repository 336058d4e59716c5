"""Checks of a config, and what a resumed run may change."""

import importlib
import json
from pathlib import Path

import numpy as np
import optax
import pytest

from configs import ade20k, common, digits, imagenet
from vvt_jax.data.augment import check_augment
from vvt_jax.models import create, list_models
from vvt_jax.training import configuration
from vvt_jax.training.config_flags import unknown_field
from vvt_jax.training.config_values import RULES, problem_of, rule_of
from vvt_jax.training.configuration import ConfigError, check_values, in_steps, settle
from vvt_jax.training.mixing import check_mixing
from vvt_jax.training.optimizer import make_optimizer, make_schedule


def _config(**changes):
    config = digits.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def test_the_configs_pass():
    check_values(digits.get_config())
    config = common.get_config()
    config.total_steps = 1
    check_values(config)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("mode", "evaluate", "it is 'train' or 'eval'"),
        ("seed", -1, "it can't be negative"),
        ("seed", 2**31, "it can be at most 2,147,483,647"),
        ("batch_size", 0, "it has to be positive"),
        ("total_steps", 0, "it has to be positive"),
        ("total_epochs", -1.0, "it has to be positive"),
        ("log_every_steps", 0, "it has to be positive"),
        ("eval_every_steps", -3, "it has to be positive"),
        ("checkpoint_every_steps", 0, "it has to be positive"),
        ("keep_checkpoints", 0, "it has to be positive"),
        ("data.workers", -1, "it can't be negative"),
        ("data.threads", -1, "it can't be negative"),
        ("optimizer.learning_rate", 0.0, "it has to be positive"),
        ("optimizer.eps", 0.0, "it has to be positive"),
        ("optimizer.warmup_epochs", -1.0, "it can't be negative"),
        ("optimizer.weight_decay", -0.1, "it can't be negative"),
        ("optimizer.clip_norm", -1.0, "it can't be negative"),
        ("optimizer.b1", 1.0, "it goes from 0 up to, not including, 1"),
        ("optimizer.b2", -0.1, "it goes from 0 up to, not including, 1"),
        ("optimizer.ema_decay", 1.0, "it goes from 0 up to, not including, 1"),
        ("optimizer.label_smoothing", 1.5, "it goes from 0 up to, not including, 1"),
        ("total_examples", -5, "it has to be positive"),
        ("log_every_steps", -1, "it has to be positive"),
        ("profile_steps", 0, "it has to be positive"),
        ("data.broken_limit", -1, "it can't be negative"),
        ("optimizer.warmup_steps", -1, "it can't be negative"),
        ("optimizer.warmup_examples", -1, "it can't be negative"),
        ("optimizer.learning_rate_batch", -1, "it can't be negative"),
        ("optimizer.layer_decay", 0.0, "it goes from, not including, 0 up to 1"),
        ("optimizer.layer_decay", 1.1, "it goes from, not including, 0 up to 1"),
        ("optimizer.accumulate", 0, "it has to divide batch_size=64"),
        ("optimizer.accumulate", 3, "it has to divide batch_size=64"),
        ("optimizer.final_learning_rate", -1e-6, "it can't be negative"),
        ("optimizer.warmup_learning_rate", -1e-6, "it can't be negative"),
        ("optimizer.learning_rate", float("nan"), "it has to be a finite number"),
        ("optimizer.learning_rate", 1e39, "float32 does not reach so far"),
        ("optimizer.warmup_learning_rate", float("inf"), "it has to be a finite number"),
        ("optimizer.eps", float("nan"), "it has to be a finite number"),
        ("optimizer.clip_norm", float("nan"), "it has to be a finite number"),
        ("optimizer.schedule_power", float("inf"), "it has to be a finite number"),
        ("optimizer.auxiliary_weight", float("nan"), "it has to be a finite number"),
        ("augment.mixup", float("nan"), "it has to be a finite number"),
        ("augment.cutmix", float("inf"), "it has to be a finite number"),
        ("data.workers", 10**30, "it can be at most 1,024"),
        ("total_epochs", float("inf"), "it has to be a finite number"),
        ("total_epochs", float("nan"), "it has to be a finite number"),
        ("total_epochs", 1e308, "float32 does not reach so far"),
        ("log_every_epochs", float("inf"), "it has to be a finite number"),
        ("log_every_epochs", 1e30, "it can be at most 10,000,000"),
        ("optimizer.warmup_epochs", float("inf"), "it has to be a finite number"),
        ("augment.repeats", 0, "it has to be positive"),
        ("augment.mix_groups", 3, "it has to divide batch_size=64"),
        ("augment.shift", 2**31, "it can be at most 4,096"),
        ("optimizer.eps", 1e-50, "float32 takes it for 0"),
        ("batch_size", 2**31, "it can be at most 1,048,576"),
        ("data.size", (2**40, 2**40), "1099511627776 does not fit: it can be at most 65,536"),
        ("data.size", (32,), "it is a tuple of 2 sides in pixels, such as (224, 224)"),
        ("optimizer.freeze", (1,), "1 does not fit: it has to be a string"),
    ],
)
def test_values_that_cannot_be_meant(field, value, why):
    with pytest.raises(ConfigError) as refused:
        check_values(_config(**{field.replace(".", "__"): value}))
    assert str(refused.value) == f"config.{field}={value!r} can't be run: {why}."


def test_every_field_has_a_rule_that_its_default_keeps():
    fields = configuration._flatten(common.get_config().to_dict())
    assert all(rule_of(field) is not None for field in fields)
    assert set(RULES) <= set(fields)
    assert problem_of(fields) is None


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = _config(data__mean=tuple(np.full(3, 0.5, np.float32)), data__size=(np.int64(32),) * 2)
    check_values(config)
    settle(config, tmp_path)
    settle(config, tmp_path)


def test_a_config_without_a_field_and_one_that_json_can_not_hold_are_refused():
    config = _config()
    with config.unlocked():
        del config.optimizer.eps
    with pytest.raises(ConfigError, match=r"lacks config\.optimizer\.eps"):
        check_values(config)
    config = _config()
    with config.unlocked():
        config.tags = {"a"}
    with pytest.raises(ConfigError, match=r"config\.tags is a set"):
        check_values(config)


@pytest.mark.parametrize("content", ["{}", '{"model": 3}', '{"format_version": 1, "card": {}}'])
def test_a_config_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="not the config of a run"):
        configuration.read(tmp_path)


def test_no_rule_fails_on_a_value_of_another_kind():
    for value in (None, "x", b"x", [], {}, object(), True, 1j, (), (None,), 10**400, -(10**400)):
        for field, rule in RULES.items():
            assert isinstance(rule(value), str), (field, value)


def test_a_duration_has_to_be_given():
    with pytest.raises(ConfigError) as refused:
        check_values(common.get_config())
    for name in ("config.total_steps", "total_examples", "total_epochs"):
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"total_steps": 7, "total_examples": 640, "total_epochs": 3.0}, 7),
        ({"total_examples": 650, "total_epochs": 3.0}, 10),
        ({"total_epochs": 2.5}, 39),
        ({}, 16),
    ],
)
def test_a_duration_is_the_first_that_is_given(given, steps):
    config = common.get_config()
    config.update(given)
    assert in_steps(config, "total", batch_size=64, examples=1000, default=1.0) == steps
    assert in_steps(config.optimizer, "warmup", batch_size=64, examples=1000) == 78


CONFIGS = {
    "cifar100": [""],
    "ade20k": [f"{name},{head}" for name in list_models()[2:] for head in ("fpn", "upernet")],
    "digits": [""],
    "fashion_mnist": [""],
    "folder": ["", "vvt_small"],
    "folder_segmentation": ["", "vvt_small,upernet"],
    "imagenet": [f"{name}{size}" for name in list_models()[1:] for size in ("", ",384")],
}


def test_every_config_is_known_here():
    files = {path.stem for path in Path(common.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == {*CONFIGS, "common"}


@pytest.mark.parametrize(("name", "arg"), [(n, a) for n, args in CONFIGS.items() for a in args])
def test_every_config_describes_a_run(name, arg):
    """Fields that exist, a model that is made and an optimizer that is too; it runs elsewhere."""
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config(arg) if arg else module.get_config()
    check_values(config)
    check_augment(config.augment)
    check_mixing(config.augment)
    fields = {k: v for k, v in config.model.items() if v is not None}
    model = create(**{**fields, "num_classes": 10})
    assert model.num_classes == 10
    schedule = make_schedule(config.optimizer, 100, 10, config.batch_size)
    assert 0 < float(schedule(10)) < 0.1
    params = {"stage1": {"norm": {"bias": np.zeros(2, np.float32)}}}
    state = make_optimizer(config.optimizer, schedule).init(params)
    assert np.shape(optax.tree.get(state, "mu")["stage1"]["norm"]["bias"]) == (2,)
    assert f"python -m vvt_jax.main --config=configs/{name}.py" in module.__doc__
    if "_" not in name and name != "digits":
        assert "ot run" in module.__doc__


def test_imagenet_follows_the_published_recipe():
    tiny, large = (imagenet.get_config(name) for name in ("vvt_tiny", "vvt_large"))
    schedule = make_schedule(tiny.optimizer, 300, 5, tiny.batch_size)
    peak = 5e-4 * tiny.batch_size / 512
    assert schedule(0) == schedule(1) == np.float32(1e-6)
    np.testing.assert_allclose(schedule(5), 1e-6 + 4 / 5 * (peak - 1e-6), rtol=1e-6)
    np.testing.assert_allclose(schedule(299), 1e-5, rtol=2e-2)  # never quite
    assert (tiny.optimizer.clip_norm, large.optimizer.clip_norm) == (0.0, 1.0)
    assert (tiny.model.drop_path_rate, large.model.drop_path_rate) == (0.1, 0.3)
    assert tiny.augment.to_dict() == {
        "crop": "random_resized_crop",
        "min_scale": 0.08,
        "scale": (0.5, 2.0),
        "class_share": 0.75,
        "photometric": False,
        "flip": True,
        "shift": 0,
        "randaugment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "repeats": 3,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_groups": 1,
        "mix_probability": 1.0,
        "cutmix_probability": 0.5,
        "erase": 0.25,
    }
    assert (tiny.optimizer.weight_decay, tiny.optimizer.label_smoothing) == (0.05, 0.1)
    assert (tiny.data.crop_fraction, tiny.data.interpolation) == (0.875, "bicubic")
    tuned = imagenet.get_config("vvt_small,384")
    assert (tuned.data.size, tuned.data.crop_fraction) == ((384, 384), 0.875)
    assert tuned.model.drop_path_rate == 0.0
    schedule = make_schedule(tuned.optimizer, 30, 5, tuned.batch_size)
    assert {float(schedule(step)) for step in range(6, 30)} == {float(np.float32(5e-6))}


@pytest.mark.parametrize("arg", ["vvt_huge", "vvt_tiny,256", "vvt_nano"])
def test_imagenet_names_what_it_takes(arg):
    with pytest.raises(ValueError, match=rf"configs/imagenet.py:{arg} is not known: .* vvt_tiny"):
        imagenet.get_config(arg)


def test_a_new_folder_gets_the_config(tmp_path):
    config = _config()
    settle(config, tmp_path / "deep" / "run")
    written = json.loads((tmp_path / "deep" / "run" / "config.json").read_text())
    assert written["optimizer"] == {**config.optimizer.to_dict(), "freeze": []}
    assert written["data"]["size"] == [32, 32]
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["config.json"]


def test_the_same_config_settles_again(tmp_path):
    for _ in range(3):
        settle(_config(), tmp_path)


def test_to_evaluate_only_compares(tmp_path):
    settle(_config(mode="eval"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    settle(_config(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    settle(_config(mode="eval", data__workers=3), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"config\.seed"):
        settle(_config(mode="eval", seed=1), tmp_path)


_FREE_CHANGES = {
    "mesh__data": 2,
    "mesh__fsdp": 4,
    "mesh__spatial": 2,
    "data__workers": 3,
    "data__threads": 1,
    **{
        f"{what}_every_{unit}": value
        for what in ("log", "eval", "checkpoint")
        for unit, value in (("steps", 7), ("examples", 7), ("epochs", 1.5))
    },
    "profile_steps": 7,
    "keep_checkpoints": 7,
    "compilation_cache": "",
    "data__broken_limit": 7,
    "data__eval_also": ["imagenet_a"],
    "distributed__coordinator": "host:1234",
    "distributed__num_processes": 2,
    "distributed__process_id": 1,
    "distributed__start_timeout": 7,
    "distributed__heartbeat_timeout": 7,
    "profile_at_step": 7,
}


@pytest.mark.parametrize("field", _FREE_CHANGES)
def test_what_does_not_alter_the_updates_may_change(tmp_path, field):
    settle(_config(), tmp_path)
    config = _config()
    config.update_from_flattened_dict({field.replace("__", "."): _FREE_CHANGES[field]})
    settle(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for part in field.split("__"):
        written = written[part]
    assert written == _FREE_CHANGES[field]


@pytest.mark.parametrize(
    ("field", "before", "now"),
    [
        ("seed", 0, 1),
        ("batch_size", 64, 32),
        ("total_steps", None, 10),
        ("model__name", "vvt_nano", "vvt_tiny"),
        ("model__locality", None, "none"),
        ("model__embed_dims", None, (8, 8, 8, 8)),
        ("data__source", "digits", "tfds:mnist"),
        ("data__size", (32, 32), (64, 64)),
        ("augment__shift", 2, 0),
        ("optimizer__b1", 0.9, 0.8),
    ],
)
def test_any_other_change_is_named_with_both_values(tmp_path, field, before, now):
    settle(_config(), tmp_path)
    kept = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError) as refused:
        settle(_config(**{field: now}), tmp_path)
    before, now = (list(v) if isinstance(v, tuple) else v for v in (before, now))
    name = field.replace("__", ".")
    assert f"another config: config.{name} ({before} before, {now} now);" in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert (tmp_path / "config.json").read_bytes() == kept


def test_every_field_but_the_free_ones_is_compared(tmp_path):
    """A field that is added to the configs is compared unless it is declared free."""
    config = digits.get_config()
    settle(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    free = {"mode", *(field.replace("__", ".") for field in _FREE_CHANGES)}

    def fields(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from fields(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    def altered(tree, parts):
        inner = altered(tree[parts[0]], parts[1:]) if len(parts) > 1 else "altered"
        return {**tree, parts[0]: inner}

    for field in fields(written):
        (tmp_path / "config.json").write_text(json.dumps(altered(written, field.split("."))))
        if field in free:
            settle(config, tmp_path)
        else:
            with pytest.raises(ConfigError, match=rf"config\.{field} \(altered before"):
                settle(config, tmp_path)


def test_several_changes_and_fields_that_one_lacks_are_named(tmp_path):
    settle(_config(), tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    del written["optimizer"]["b2"]
    written["optimizer"]["momentum"] = 0.5
    path.write_text(json.dumps(written))
    with pytest.raises(ConfigError) as refused:
        settle(_config(seed=3), tmp_path)
    assert (
        "config.optimizer.momentum (0.5 before, nothing now), "
        "config.seed (0 before, 3 now); use another workdir"
    ) in str(refused.value)


@pytest.mark.parametrize("content", ["", '{"seed": 0', "[1, 2]", "null", "7"])
def test_a_damaged_config_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        settle(_config(), tmp_path)
    assert str(refused.value).startswith(f"{path} is damaged (")
    assert "use another workdir" in str(refused.value)
    assert path.read_text() == content


def _attribute_error(action):
    with pytest.raises((AttributeError, KeyError)) as raised:
        action(digits.get_config())
    return AttributeError(*raised.value.args)


@pytest.mark.parametrize(
    ("action", "argv", "sentence"),
    [
        (
            lambda config: config.optimizer.learning_rat,
            ["main", "--config.optimizer.learning_rat=1"],
            "There is no field config.optimizer.learning_rat: did you mean 'learning_rate'? "
            "configs/common.py lists all of them.",
        ),
        (
            lambda config: setattr(config, "sed", 1),
            ["main"],
            "There is no field sed: did you mean 'seed'? configs/common.py lists all of them.",
        ),
        (
            lambda config: config.zzzzzz,
            ["main"],
            "There is no field zzzzzz: configs/common.py lists all of them.",
        ),
    ],
    ids=["flag", "file", "nothing near"],
)
def test_unknown_field(action, argv, sentence):
    assert unknown_field(_attribute_error(action), argv) == sentence


def test_unknown_field_passes_another_error_on():
    told = unknown_field(AttributeError("no such thing"), ["main"])
    assert told.endswith(": no such thing.")


def test_segmentation_follows_the_cited_recipes():
    fpn, upernet = (ade20k.get_config(f"vvt_small,{head}") for head in ("fpn", "upernet"))
    schedule = make_schedule(fpn.optimizer, 80_000, 0, fpn.batch_size)
    for step in (0, 40_000, 79_000):
        np.testing.assert_allclose(schedule(step), 1e-4 * (1 - step / 80_000) ** 0.9, rtol=1e-3)
    schedule = make_schedule(upernet.optimizer, 160_000, 1500, upernet.batch_size)
    for step, warm in {0: 0.0, 750: 0.5, 1500: 1.0, 80_000: 1.0}.items():
        np.testing.assert_allclose(
            schedule(step), warm * 6e-5 * (1 - step / 160_000), rtol=1e-5, atol=1e-12
        )
    assert (fpn.optimizer.weight_decay, upernet.optimizer.weight_decay) == (1e-4, 0.01)
    assert (fpn.total_steps, upernet.total_steps) == (80_000, 160_000)
    assert upernet.model.drop_path_rate == 0.3
    with pytest.raises(ValueError, match="after the colon stands"):
        ade20k.get_config("vvt_small,unet")
