"""What a run and a model were made from: recorded once, compared by every entry point."""

import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

from configs import common, digits
from vvt_jax.data import splits
from vvt_jax.data.examples import DataError, Source, with_classes
from vvt_jax.data.sources import open_source
from vvt_jax.distributed import hosts
from vvt_jax.distributed.hosts import GroupError
from vvt_jax.models.shapes import smallest_image
from vvt_jax.system.errors import UserError
from vvt_jax.train import train_and_evaluate
from vvt_jax.training import config_flags, configuration, run_record
from vvt_jax.training.checkpoint import Best, Checkpoints
from vvt_jax.training.configuration import ConfigError, settle
from vvt_jax.training.finetune import initial_variables
from vvt_jax.training.provenance import Provenance, opened_splits
from vvt_jax.training.run_record import RecordError
from vvt_jax.training.tasks import make_model
from vvt_jax.weights.pretrained import load_pretrained, save_pretrained

CLASSES = ("blue", "green", "red")
_PREPROCESSING = {
    "size": [32, 32],
    "crop_fraction": 1.0,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


def _fill(folder, classes=CLASSES, count=10):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((8, 8, 3), 20 + i, np.uint8)
            pixels[..., number % 3] = 200
            PIL.Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


def _config(data_dir, cache=""):
    config = digits.get_config()
    config.batch_size = 8
    config.total_steps = config.eval_every_steps = config.checkpoint_every_steps = 2
    config.compilation_cache = str(cache)
    config.model.embed_dims = (8, 8, 16, 16)
    config.data.source, config.data.test_split, config.data.threads = "folder", "", 2
    config.data.data_dir = str(data_dir)
    config.data.train_split, config.data.validation_split = "train[:80%]", "train[80%:]"
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run on a folder of three classes leaves, its weights being zeros: data and workdir."""
    root = tmp_path_factory.mktemp("trained")
    _fill(root / "data")
    config, workdir = _config(root / "data"), root / "run"
    made, sources = _open(config, workdir)
    model = make_model(config, len(CLASSES))
    shapes = jax.eval_shape(model.init, jax.random.key(0), smallest_image())
    variables = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)
    card = {"class_names": list(CLASSES), "preprocessing": _PREPROCESSING}
    made.write(workdir, _PREPROCESSING, sources)
    save_pretrained(workdir / "model", model, variables, card)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(2, {"params": variables["params"]}, Best())
    return root


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that run whose data may be changed, and the config to go on with."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    config = _config(tmp_path / "data")
    path = tmp_path / "run" / "config.json"
    written = json.loads(path.read_text())
    written["data"]["data_dir"] = str(tmp_path / "data")
    path.write_text(json.dumps(written))
    return tmp_path, config


def _older(workdir):
    """Takes away what a version without records did not write."""
    (workdir / "record.json").unlink()
    shutil.rmtree(workdir / "examples")


def _open(config, workdir, flagged=()):
    """What an entry point finds before it touches the model: the provenance and the sources."""
    made = Provenance(config, workdir, flagged)
    sources = {
        part: open_source("folder", split, data_dir=config.data.data_dir, cut=made.cuts[part])
        for part, split in opened_splits(config).items()
    }
    return made, made.match(sources)


def test_a_run_writes_down_what_it_was_made_from(trained):
    record = run_record.read(trained / "run")
    assert record.class_names == CLASSES
    assert record.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert {name: part.count for name, part in record.parts.items()} == {
        "train": 24,
        "validation": 6,
    }
    lines = (trained / "run" / "examples" / "validation.txt").read_text().splitlines()
    assert tuple(lines) == record.parts["validation"].names
    assert {line.split("/")[0] for line in lines} == set(CLASSES)


def test_names_of_any_bytes_come_back(tmp_path):
    names = ["a\nb", "c\\n", "\\", "é", "x\udcff", "r\r", ""]
    source = Source([None] * len(names), ("a",), "folder", "train", names=names)
    (tmp_path / "config.json").write_text('{"model": {}, "data": {}, "optimizer": {}}')
    run_record.write(tmp_path, ["a"], _PREPROCESSING, {"train": source})
    assert list(run_record.read(tmp_path).parts["train"].names) == names


@pytest.mark.parametrize("damage", ["list", "not JSON", "version", "no parts"])
def test_a_damaged_record_is_named(copied, damage):
    root, _ = copied
    path = root / "run" / "record.json"
    record = json.loads(path.read_text())
    if damage == "list":
        path = root / "run" / "examples" / "train.txt"
        path.write_text("blue/00.png\n")
    elif damage == "not JSON":
        path.write_text("{")
    elif damage == "version":
        path.write_text(json.dumps({**record, "format_version": 2}))
    else:
        path.write_text(json.dumps({**record, "parts": 3}))
    with pytest.raises(ConfigError, match=str(path)):
        run_record.read(root / "run")


# Classes


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("older", [False, True])
def test_a_renamed_class_is_refused(copied, mode, older):
    """Before, evaluating went from 100 % to 0 % and resuming went on, both with status 0."""
    root, config = copied
    if older:
        _older(root / "run")
    (root / "data" / "blue").rename(root / "data" / "azure")
    config.mode = mode
    with pytest.raises(RecordError, match=r"it also has 'azure' and it lacks 'blue'"):
        _open(config, root / "run")


def test_a_removed_class_is_refused_on_resume_and_measured_without_it(copied):
    root, config = copied
    shutil.rmtree(root / "data" / "blue")
    with pytest.raises(RecordError, match=r"it lacks 'blue'"):
        _open(config, root / "run")
    config.mode = "eval"
    _, sources = _open(config, root / "run")
    assert sources["validation"].class_names == CLASSES
    labels = [sources["validation"].examples[i]["label"] for i in range(4)]
    assert labels == [1, 1, 2, 2]


def test_an_evaluation_needs_no_training_images(copied):
    """Its files are gone, and the others are those that the run measured before."""
    root, config = copied
    before = run_record.read(root / "run").parts
    for name in before["train"].names:
        (root / "data" / name).unlink()
    config.mode, config.data.train_split = "eval", ""
    made, sources = _open(config, root / "run")
    assert _names(sources) == {"validation": list(before["validation"].names)}
    assert made.told == []
    config.data.validation_split = ""
    with pytest.raises(
        ConfigError, match=r"validation_split and config\.data\.test_split are empty"
    ):
        opened_splits(config)


def test_an_evaluation_looks_at_whole_images_as_the_run_did(copied):
    root, config = copied
    config.mode = "eval"
    config.inference.scales = (0.5, 1.0)
    assert list(Provenance(config, root / "run", ()).config.inference.scales) == [1.0]
    flagged = Provenance(config, root / "run", ("inference.scales",))
    assert list(flagged.config.inference.scales) == [0.5, 1.0]


@pytest.mark.parametrize("place", ["run", "run/model"])
def test_evaluating_weights_compares_the_names_of_their_classes(copied, place):
    """Before, a workdir with as many classes of other names gave 0 %."""
    root, config = copied
    config.mode, config.init_from = "eval", str(root / place)
    (root / "data" / "blue").rename(root / "data" / "azure")
    with pytest.raises(RecordError, match="it also has 'azure' and it lacks 'blue'"):
        _open(config, root / "elsewhere")


def test_training_from_a_workdir_of_other_classes_gets_a_new_head(copied):
    root, config = copied
    _fill(root / "other", ("ash", "elm", "oak"))
    config.init_from, config.data.data_dir = str(root / "run"), str(root / "other")
    made = Provenance(config, root / "new", ())
    model = make_model(config, 3)
    fresh = load_pretrained(root / "run" / "model")[1]
    _, told = initial_variables(made.start, model, fresh, ("ash", "elm", "oak"))
    assert told[-1].startswith("The head starts anew: ")
    assert told[-1].endswith(" of other names.")


@pytest.mark.slow
def test_eval_of_some_of_the_models_classes(digits_folder, tmp_path, compilation_cache):
    """The shipped model on 3 of its 10 classes, by a config that prepares images otherwise."""
    examples = open_source("digits", "test").examples
    for i in range(60):
        label = examples[i]["label"]
        if label in (2, 5, 8):
            (tmp_path / "data" / str(label)).mkdir(parents=True, exist_ok=True)
            image = PIL.Image.fromarray(examples[i]["image"][..., 0])
            image.save(tmp_path / "data" / str(label) / f"{i}.png")
    config = common.get_config()  # vvt_tiny, 224 pixels, ImageNet's mean
    config.total_steps, config.mode = 1, "eval"
    config.compilation_cache, config.data.threads = str(compilation_cache), 1
    config.batch_size, config.init_from = 64, str(digits_folder)
    config.data.source, config.data.data_dir = "folder", str(tmp_path / "data")
    config.data.validation_split, config.data.test_split = "train", ""
    metrics = train_and_evaluate(config, tmp_path / "run")
    assert metrics["eval/examples"] >= 10
    assert metrics["eval/top1"] > 0.9


def test_the_shipped_model_is_measured_as_it_is_whatever_the_config(digits_folder, tmp_path):
    """Before, the config's size, crop and normalisation were used: 15 % in place of 99 %."""
    _fill(tmp_path, ("2", "5", "8"), 2)
    config = common.get_config()
    config.mode, config.init_from = "eval", str(digits_folder)
    config.data.source, config.data.data_dir = "folder", str(tmp_path)
    config.data.validation_split, config.data.test_split = "train", ""
    made, sources = _open(config, tmp_path / "new")
    card = json.loads((digits_folder / "config.json").read_text())["card"]
    measured = make_model(made.config, 3)
    assert measured.num_classes == 10
    assert measured.embed_dims == (32, 48, 64, 64)
    assert run_record.fields_of(card) == configuration.values_of(
        made.config, run_record.fields_of(card)
    )
    assert [sources["validation"].examples[i]["label"] for i in range(6)] == [2, 2, 5, 5, 8, 8]


def test_labels_of_pixels_are_counted_anew_too():
    mask = np.array([[0, 1, 255]], np.uint8)
    source = Source([{"label": mask}], ("b", "c"), "s", "train", pixels=True)
    changed = with_classes(source, ("a", "c", "b")).examples[0]["label"]
    assert changed.tolist() == [[2, 1, 255]]


def test_two_classes_of_one_name_can_not_be_told_apart():
    source = Source([], ("a", "b", "a"), "s", "train")
    assert run_record.match_classes({"train": source}, ("a", "b", "a"), "it", some=False)
    with pytest.raises(RecordError, match="two of them have the same name"):
        run_record.match_classes({"train": source}, ("a", "a", "b"), "it", some=False)


# Preprocessing


def _card(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["card"]["preprocessing"] |= changes
    path.write_text(json.dumps(config))


_TWO = {"size": [64, 64], "crop_fraction": 0.5, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_flags_go_before_the_record_and_that_before_the_config(copied, mode):
    root, config = copied
    _card(root / "run" / "model", interpolation="bicubic", **_TWO)
    config.mode, config.init_from = mode, str(root / "run" / "model")
    made = Provenance(config, root / "new", ("data.std",))
    data = made.config.data
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert data.interpolation == "bicubic"
    recorded = mode == "eval"
    assert data.size == ((64, 64) if recorded else (32, 32))
    assert data.crop_fraction == (0.5 if recorded else 1.0)
    assert "As recorded in" in made.told[0]
    assert config.data.mean == (0.5, 0.5, 0.5)  # the config given is left as it was


@pytest.mark.parametrize("older", [False, True])
def test_measuring_a_run_takes_its_own_preprocessing(copied, older):
    root, config = copied
    if older:
        _older(root / "run")
    config.mode, config.data.crop_fraction = "eval", 0.5
    assert Provenance(config, root / "run", ()).config.data.crop_fraction == 1.0
    flagged = Provenance(config, root / "run", ("data.crop_fraction",))
    assert flagged.config.data.crop_fraction == 0.5


def test_a_resumed_run_keeps_the_preprocessing_that_it_took_from_its_weights(copied):
    root, config = copied
    path = root / "run" / "record.json"
    record = json.loads(path.read_text())
    record["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(record))
    assert Provenance(config, root / "run", ()).config.data.mean == (0.1, 0.2, 0.3)
    with pytest.raises(RecordError, match=r"config\.data\.mean=\[0\.1, 0\.2, 0\.3\], and the"):
        Provenance(config, root / "run", ("data.mean",))


def test_a_run_that_started_from_weights_is_measured_itself(copied):
    root, config = copied
    path = root / "run" / "config.json"
    written = json.loads(path.read_text())
    config.mode = "eval"
    config.init_from = written["init_from"] = "a/folder/that/is/gone"
    path.write_text(json.dumps(written))
    assert Provenance(config, root / "run", ()).start is None


# Splits


def _names(sources):
    return {part: list(source.names) for part, source in sources.items()}


def test_the_recorded_list_decides_and_changes_are_named(copied):
    """Before, one added image moved the whole split."""
    root, config = copied
    before = run_record.read(root / "run").parts
    (root / "data" / "red" / "new.png").write_bytes((root / "data/red/00.png").read_bytes())
    made, sources = _open(config, root / "run")
    assert _names(sources) == {part: list(p.names) for part, p in before.items()}
    (told,) = made.told
    assert told.startswith("1 file added since the run began ")
    assert "'red/new.png'" in told

    gone = [before["train"].names[3], before["validation"].names[0]]
    for name in gone:
        (root / "data" / name).unlink()
    made, sources = _open(config, root / "run")
    names = _names(sources)
    expected = list(before["train"].names)
    expected[3] = expected[4]
    assert names == {"train": expected, "validation": list(before["validation"].names[1:])}
    for told, split, name in zip(made.told[:2], ("train", "validation"), gone, strict=True):
        assert told.startswith(f"1 file of the run's {split} examples is gone (")
        assert f"'{name}'" in told


@pytest.mark.slow
def test_a_real_run_keeps_its_examples_and_its_classes(tmp_path, compilation_cache, capsys):
    data, workdir = tmp_path / "data", tmp_path / "run"
    _fill(data)
    config = _config(data, compilation_cache)
    train_and_evaluate(config, workdir)
    (data / "red" / "new.png").write_bytes((data / "red" / "00.png").read_bytes())
    for mode in ("train", "eval"):
        config.mode = mode
        assert train_and_evaluate(config, workdir)["eval/examples"] == 6
        assert "is not used: 'red/new.png'." in capsys.readouterr().out
    (data / "blue").rename(data / "azure")
    for mode in ("train", "eval"):
        config.mode = mode
        with pytest.raises(RecordError, match="it also has 'azure' and it lacks 'blue'"):
            train_and_evaluate(config, workdir)


@pytest.mark.slow  # shares its program with the run above
def test_a_broken_image_to_measure_on_loses_nothing(tmp_path, compilation_cache, capsys):
    data, workdir = tmp_path / "data", tmp_path / "run"
    _fill(data)
    config = _config(data, compilation_cache)
    name = _open(config, tmp_path / "other")[1]["validation"].names[0]
    content = (data / name).read_bytes()
    (data / name).write_bytes(content[: len(content) // 2])
    config.data.broken_limit = 0
    with pytest.raises(DataError, match=rf"1 of the 6 images of the validation .*{name}"):
        train_and_evaluate(config, workdir)
    assert (workdir / "checkpoints" / "2").is_dir()
    assert not (workdir / "model").exists()
    config.data.broken_limit = 1
    metrics = train_and_evaluate(config, workdir)  # at its last step, which was not measured
    assert (metrics["eval/examples"], metrics["eval/broken"]) == (5, 1)
    assert (workdir / "model" / "model.safetensors").exists()
    assert train_and_evaluate(config, workdir) == metrics
    told = capsys.readouterr().out
    assert "Left a broken image of the validation split out." in told
    assert name in told


def test_an_empty_split_is_refused_before_the_first_step(tmp_path):
    _fill(tmp_path / "data")
    config = _config(tmp_path / "data")
    config.data.validation_split = "train[:0%]"
    with pytest.raises(UserError, match="no examples"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_without_a_list_goes_on_with_the_random_cut(copied):
    root, config = copied
    _older(root / "run")
    made, sources = _open(config, root / "run")
    assert set(made.cuts.values()) == {splits.at_random}
    names = [f"{name}/{i:02}.png" for name in CLASSES for i in range(10)]
    order = np.random.default_rng(0).permutation(30)
    assert list(sources["validation"].names) == [names[i] for i in sorted(order[24:])]
    assert not (root / "run" / "record.json").exists()


@pytest.mark.parametrize("place", ["run", "run/model"])
def test_what_an_older_run_was_trained_on_is_not_measured(copied, place):
    root, config = copied
    _older(root / "run")
    config.mode, config.init_from = "eval", str(root / place)
    assert set(Provenance(config, root / "new", ()).cuts.values()) == {splits.at_random}
    config.data.data_dir = str(root / "elsewhere")
    cuts = Provenance(config, root / "new", ()).cuts.values()
    assert {type(cut) for cut in cuts} == {splits.ByHash}


def test_another_number_of_examples_without_names_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {}, "data": {}, "optimizer": {}}')
    source = open_source("digits", "train")
    run_record.write(tmp_path, source.class_names, _PREPROCESSING, {"train": source})
    record = run_record.read(tmp_path)
    run_record.check_counts(record, {"train": source})
    with pytest.raises(RecordError, match="had 1293 examples when this run began and has 144 now"):
        run_record.check_counts(record, {"train": open_source("digits", "validation")})


# Processes, older runs, durations


@pytest.fixture
def two_processes(monkeypatch):
    """Lets `check_agreement` see this process's values and those of another one."""

    def start(other):
        monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
        monkeypatch.setattr(hosts, "_exchange", lambda text: [text, json.dumps(other).encode()])

    return start


def test_processes_with_other_configs_are_refused(two_processes):
    config = digits.get_config()
    values = configuration.shared_fields(config)
    two_processes({**values, "config.seed": 5, "config.optimizer.learning_rate": 0.01})
    with pytest.raises(GroupError) as refused:
        hosts.check_agreement(values)
    assert (
        "process 1 has config.optimizer.learning_rate=0.01, and process 0 has 0.003; "
        "process 1 has config.seed=5, and process 0 has 0"
    ) in str(refused.value)
    two_processes(values)
    hosts.check_agreement(values)


def test_what_concerns_one_machine_may_differ_between_processes():
    one, other = digits.get_config(), digits.get_config()
    other.distributed.process_id, other.data.workers, other.data.data_dir = 1, 3, "/elsewhere"
    assert configuration.shared_fields(one) == configuration.shared_fields(other)
    for field, value in (("mode", "eval"), ("log_every_steps", 3), ("mesh.fsdp", 2)):
        changed = digits.get_config()
        changed.update_from_flattened_dict({field: value})
        assert configuration.shared_fields(one) != configuration.shared_fields(changed)


def test_processes_that_find_other_files_are_refused(copied, two_processes):
    root, config = copied
    _, sources = _open(config, root / "run")
    values = run_record.fingerprint(sources)
    two_processes({**values, "the number of train examples": 23})
    with pytest.raises(GroupError, match="process 1 has the number of train examples=23"):
        hosts.check_agreement(values)


def test_an_older_run_lacks_fields_that_were_added_later(tmp_path, monkeypatch):
    """Before, each of them made every older run impossible to resume."""
    config = digits.get_config()
    settle(config, tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    del written["optimizer"]["skip_nonfinite"], written["inference"]
    path.write_text(json.dumps(written))
    settle(config, tmp_path, write=False)
    config.optimizer.skip_nonfinite = 3
    with pytest.raises(ConfigError, match=r"config\.optimizer\.skip_nonfinite \(0 before, 3 now\)"):
        settle(config, tmp_path)
    # One whose default changes what the program did: the run goes on as it was.
    monkeypatch.setitem(configuration._BEFORE, "optimizer.skip_nonfinite", lambda config: 7)
    config.optimizer.skip_nonfinite = 0
    before = configuration.read(tmp_path)
    resumed = configuration.as_before(config, before, ())
    assert resumed.optimizer.skip_nonfinite == 7
    settle(resumed, tmp_path)
    path.write_text(json.dumps(written))
    flagged = configuration.as_before(config, before, ("optimizer.skip_nonfinite",))
    with pytest.raises(ConfigError, match=r"skip_nonfinite \(7 before, 0 now\)"):
        settle(flagged, tmp_path)


def test_a_field_that_only_the_config_has_does_not_stop_an_older_run(tmp_path):
    config = digits.get_config()
    settle(config, tmp_path)
    with config.unlocked():
        config.optimizer.brand_new = 1.5
    settle(config, tmp_path)


def test_an_older_run_with_a_duration_in_two_units_goes_on(tmp_path):
    config = digits.get_config()
    config.total_steps = 12
    settle(config, tmp_path)  # total_epochs is 20.0 beside it
    config.total_epochs = None
    settle(config, tmp_path)
    config.total_steps, config.total_epochs = None, 20.0
    with pytest.raises(ConfigError, match="total_steps"):
        settle(config, tmp_path)


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({"eval_every_epochs": 1.0}, {"eval_every_steps": None, "eval_every_epochs": 1.0}),
        ({"total_steps": 5}, {"total_steps": 5, "total_epochs": None}),
        ({"log_every_examples": 64}, {"log_every_steps": None}),
        ({"optimizer.warmup_steps": 3}, {"optimizer.warmup_epochs": None}),
        ({"eval_every_steps": None}, {"eval_every_steps": None}),
    ],
)
def test_a_flag_replaces_the_other_unit_of_the_config(values, left):
    """Before, eval_every_epochs=1 went on evaluating every 100 steps."""
    config = digits.get_config()
    config.update_from_flattened_dict(values)
    config_flags._replace_units(config, values.keys())
    assert {field: config[field] for field in left} == left


def test_flags_in_two_units_are_refused():
    config = digits.get_config()
    config.total_steps, config.total_epochs = 5, 1.0
    with pytest.raises(ConfigError, match=r"--config\.total_steps and --config\.total_epochs say"):
        config_flags._replace_units(config, {"total_steps", "total_epochs"})


def test_a_config_that_logs_by_epochs_does_so():
    config = common.get_config()
    config.log_every_epochs = 0.5
    fields = (config, "log_every", 10, 100)
    assert configuration.in_steps(*fields, default_steps=20) == 5
    config.log_every_epochs = None
    assert configuration.in_steps(*fields, default_steps=20) == 20
