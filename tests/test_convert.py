"""Published names and shapes: there and back bit for bit, and nothing passes that does not fit.

The names of the published sizes, and figures of the published model, are in golden/.
"""

import argparse
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vvt_jax
from vvt_jax import convert
from vvt_jax.data.imagenet import class_names
from vvt_jax.system.errors import UserError
from vvt_jax.weights import torch_files
from vvt_jax.weights.checks import WeightsError
from vvt_jax.weights.published import published_shapes, recognise

_MICRO = {"depths": (1, 2, 1, 3), "embed_dims": (8, 8, 16, 24), "num_classes": 5, "unroll": False}


def _model(**fields):
    return vvt_jax.create_model("vvt_nano", **{**_MICRO, **fields})


def _variables(model):
    """Random bits of float32: also subnormal numbers, infinities and NaN."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.integers(2**32, size=leaf.shape, dtype=np.uint32).view(np.float32), shapes
    )


@pytest.fixture(scope="module")
def state_dict():
    model = _model()
    return convert.to_pytorch(_variables(model), model)


def _bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32), tree)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"num_classes": 0}, marks=pytest.mark.slow),
        pytest.param(
            {"feature_reduction": (1, 2, 4, 1), "gate_reduction": 2}, marks=pytest.mark.slow
        ),
        {"attention": "softmax"},
    ],
)
def test_round_trip_bit_for_bit(fields):
    model = _model(**fields)
    variables = _variables(model)
    published = convert.to_pytorch(variables, model)
    assert all(a.flags.c_contiguous and a.dtype == np.float32 for a in published.values())
    back = convert.from_pytorch(published, model)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, _bits(back), _bits(variables))
    again = convert.to_pytorch(back, model)
    assert list(again) == list(published)
    jax.tree.map(np.testing.assert_array_equal, _bits(again), _bits(published))


def test_axes_are_pytorchs(state_dict):
    variables = convert.from_pytorch(state_dict, _model())
    stage = variables["params"]["stage2"]
    np.testing.assert_array_equal(
        _bits(stage["blocks"]["attention"]["query"]["kernel"][1]),
        _bits(np.ascontiguousarray(state_dict["block2.1.attn.q_proj.weight"].T)),
    )
    ours, theirs = stage["patch_embed"]["conv"]["kernel"], state_dict["patch_embed2.proj.weight"]
    assert _bits(ours[0, 2, 3, 4]) == _bits(theirs[4, 3, 0, 2])
    ours = stage["blocks"]["feed_forward"]["depthwise"]["kernel"]
    theirs = state_dict["block2.1.mlp.dwconv.dwconv.weight"]
    assert _bits(ours[1, 0, 2, 0, 5]) == _bits(theirs[5, 0, 0, 2])


def test_softmax_ablation_has_neither_gate_nor_query_key_value_biases():
    model = _model(attention="softmax")
    names = set(convert.to_pytorch(_variables(model), model))
    assert names.isdisjoint({"block1.0.attn.se_fc.0.weight", "block1.0.attn.q_proj.bias"})
    assert {"block1.0.attn.q_proj.weight", "block1.0.attn.out_proj.bias"} <= names


def test_missing_tensor_is_named(state_dict):
    name = "block2.1.attn.k_proj.bias"
    with pytest.raises(WeightsError, match=f"lack {name}"):
        convert.from_pytorch({k: v for k, v in state_dict.items() if k != name}, _model())


def test_surplus_tensor_is_named(state_dict):
    with pytest.raises(WeightsError, match=r"surplus block1\.7\.norm1\.weight"):
        convert.from_pytorch({**state_dict, "block1.7.norm1.weight": np.zeros(8)}, _model())


def test_missing_and_surplus_tensors_are_named_together(state_dict):
    renamed = dict(state_dict)
    renamed["module.norm1.bias"] = renamed.pop("norm1.bias")
    with pytest.raises(
        WeightsError, match=r"lack norm1\.bias and have the surplus module\.norm1\.bias"
    ):
        convert.from_pytorch(renamed, _model())


def test_many_names_are_counted(state_dict):
    with pytest.raises(WeightsError, match=rf"and {len(state_dict) - 3} more"):
        convert.from_pytorch({}, _model())


@pytest.mark.parametrize("shape", [(8, 5), (4, 8, 1), (32,), ()])
def test_misshaped_tensor_is_named_with_both_shapes(state_dict, shape):
    name = "block1.0.attn.q_proj.weight"
    with pytest.raises(WeightsError) as error:
        convert.from_pytorch({**state_dict, name: np.zeros(shape)}, _model())
    assert f"{name} is {list(shape)} where the model has [4, 8]" in str(error.value)


def test_head_of_another_size_is_refused(state_dict):
    with pytest.raises(WeightsError, match=r"head\.weight is \[5, 24\].*\[7, 24\]"):
        convert.from_pytorch(state_dict, _model(num_classes=7))


def test_weights_error_is_the_users_to_mend():
    assert issubclass(WeightsError, UserError)


def test_skipped_head_is_fresh_in_any_number_of_classes(state_dict):
    model = _model(num_classes=7)
    params = convert.from_pytorch(state_dict, model, skip_head=True)["params"]
    head = params.pop("head")
    assert head["kernel"].shape == (24, 7)
    assert 0.01 < np.std(head["kernel"]) < 0.03
    assert (head["bias"] == 0).all()
    body = convert.from_pytorch(state_dict, _model())["params"]
    del body["head"]
    jax.tree.map(np.testing.assert_array_equal, _bits(params), _bits(body))


def test_skipped_head_without_classes(state_dict):
    params = convert.from_pytorch(state_dict, _model(num_classes=0), skip_head=True)["params"]
    assert set(params) == {"stage1", "stage2", "stage3", "stage4"}
    headless = {k: v for k, v in state_dict.items() if not k.startswith("head.")}
    assert set(convert.from_pytorch(headless, _model(), skip_head=True)["params"]) > set(params)


def test_head_is_surplus_where_there_are_no_classes(state_dict):
    with pytest.raises(WeightsError, match=r"surplus head\.weight, head\.bias"):
        convert.from_pytorch(state_dict, _model(num_classes=0))


def test_variables_of_another_model_are_refused():
    model = _model()
    with pytest.raises(WeightsError, match="stage4/blocks/"):
        convert.to_pytorch(_variables(model), _model(depths=(1, 2, 1, 2)))


_GOLDEN = Path(__file__).parent / "golden"
_PUBLISHED = _GOLDEN / "micro_weights_only.pth"
_HEADS = {"num_heads": (1, 1, 2, 3)}
_SIZES = json.loads((_GOLDEN / "checkpoint_names_and_shapes.json").read_text())


@pytest.fixture(scope="module")
def published():
    return {name: tensor.read() for name, tensor in torch_files.read_file(_PUBLISHED).items()}


def _training_checkpoint(path):
    """A training checkpoint as the authors write one, of the weights alone: its pickle is ours, the
    state dict inside it PyTorch's own."""
    with zipfile.ZipFile(_PUBLISHED) as archive:
        state_dict = archive.read("micro_weights_only/data.pkl")[2:-1]  # no header, no end
        rest = {
            name.partition("/")[2]: archive.read(name)
            for name in archive.namelist()
            if not name.endswith("data.pkl")
        }
    args = pickle.dumps(argparse.Namespace(model="vvt_micro", lr=1e-3, output_dir=""), 2)[2:-1]
    others = pickle.dumps({"state": {0: {"step": 3, "betas": (0.9, 0.999)}}, "none": None}, 2)

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    program = b"\x80\x02}(" + text("model") + state_dict
    for name in ("optimizer", "lr_scheduler", "scaler"):
        program += text(name) + others[2:-1]
    program += text("epoch") + b"K\x07" + text("args") + args + b"u."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("checkpoint/data.pkl", program)
        for name, content in rest.items():
            archive.writestr(f"checkpoint/{name}", content)
    return path


@pytest.mark.parametrize("form", ["bare", "training"])
def test_published_forms_give_the_golden_logits(tmp_path, form, published):
    path = _PUBLISHED if form == "bare" else _training_checkpoint(tmp_path / "checkpoint.pth")
    model, variables, card = vvt_jax.load_pretrained(path, **_HEADS)
    assert model == vvt_jax.create_model(
        "vvt_nano",
        embed_dims=(32, 48, 64, 96),
        num_heads=(1, 1, 2, 3),
        mlp_ratios=(2, 2, 2, 2),
        feature_reduction=(1, 2, 2, 4),
        num_classes=10,
    )
    images = np.random.default_rng([0, 7]).standard_normal((2, 70, 45, 3)).astype(np.float32)
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    logits = jax.jit(model.apply, compiler_options=options)(variables, images)
    golden = np.load(_GOLDEN / "golden.npz")["micro_70x45_fr4/logits"]
    np.testing.assert_allclose(logits, golden, rtol=0, atol=1e-5)
    assert card == {
        "preprocessing": {
            "size": [224, 224],
            "crop_fraction": 0.875,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
    }


@pytest.mark.parametrize("name", _SIZES)
def test_published_sizes_are_told_from_their_shapes(name):
    model = vvt_jax.create_model(name)
    assert recognise(_SIZES[name]) == model
    headless = {k: v for k, v in _SIZES[name].items() if not k.startswith("head.")}
    assert recognise(headless) == model.clone(num_classes=0)
    assert recognise(_SIZES[name], dtype="bfloat16").dtype == "bfloat16"
    assert list(published_shapes(model)) == list(_SIZES[name])


def test_the_softmax_ablation_is_told_from_its_shapes():
    model = vvt_jax.create_model("vvt_tiny", attention="softmax", num_classes=7)
    assert recognise(published_shapes(model)) == model


def _refused(path, *words, name=None, **fields):
    with pytest.raises(WeightsError) as refused:
        vvt_jax.load_pretrained(path, name, **fields)
    for word in (str(path), *words):
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_not_the_model_is_named(tmp_path, published):
    _refused(_PUBLISHED, "no shape tells the number of heads: give num_heads")
    _refused(_PUBLISHED, "lack block1.1.norm1.weight", name="vvt_tiny")
    _refused(
        _PUBLISHED, "attn.k_proj.weight is [32, 32]", name="vvt_nano", embed_dims=(32, 48, 64, 96)
    )
    _refused(_PUBLISHED, "head.weight is [10, 96]", **_HEADS, num_classes=7)
    with pytest.raises(ValueError, match="no field 'head'"):
        vvt_jax.load_pretrained(_PUBLISHED, **_HEADS, head=3)
    with pytest.raises(ValueError, match="Unknown model 'vvt_huge'"):
        vvt_jax.load_pretrained(_PUBLISHED, "vvt_huge")

    path = tmp_path / "x.pth"
    torch_files.write_file(path, {"conv1.weight": np.zeros((64, 3, 7, 7))})
    _refused(path, "no Vicinity Vision Transformer: it lacks patch_embed1.proj.weight")
    torch_files.write_file(path, {f"module.{k}": v for k, v in published.items()})
    _refused(path, "it lacks patch_embed1.proj.weight")
    torch_files.write_file(path, {**published, "block1.7.norm1.weight": np.zeros(32)})
    _refused(path, "lack block1.1.norm1.weight", **_HEADS)
    torch_files.write_file(path, {})
    _refused(path, "holds no state dict")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": 1}, 2))
    _refused(path, "'a' is no tensor")


def test_weights_that_are_no_numbers_are_refused(tmp_path, published):
    arrays = {name: np.array(array) for name, array in published.items()}
    arrays["block1.0.norm1.weight"][3] = np.nan
    torch_files.write_file(tmp_path / "x.pth", arrays)
    _refused(
        tmp_path / "x.pth",
        "block1.0.norm1.weight has NaN or infinite numbers",
        **_HEADS,
    )


def test_imagenets_classes_are_named(tmp_path):
    model = _model(num_classes=1000)
    variables = jax.tree.map(np.zeros_like, _variables(model))  # of numbers, which loading wants
    torch_files.write_file(tmp_path / "x.pth", convert.to_pytorch(variables, model))
    fields = {"num_heads": model.num_heads}
    _, _, card = vvt_jax.load_pretrained(tmp_path / "x.pth", **fields)
    assert card["class_names"] == list(class_names().values())
    assert card["class_names"][281] == "tabby"


def _exit(capsys, *arguments):
    """What the command prints to those it refuses."""
    with pytest.raises(SystemExit) as ended:
        convert.main([str(a) for a in arguments])
    assert ended.value.code not in (None, 0)
    message = str(ended.value.code)
    if message == "2":  # argparse says it itself
        message = capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in message
    assert "error: " in message
    return message


_SET = ("--set", "num_heads=(1,1,2,3)")


def test_there_and_back_by_command(tmp_path, published, capsys):
    folder, back = tmp_path / "folder", tmp_path / "back.pth"
    convert.main([str(_PUBLISHED), str(folder), *_SET])
    assert f"10 classes) is in {folder}." in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    convert.main(["--to-pytorch", str(folder), str(back)])
    again = {name: tensor.read() for name, tensor in torch_files.read_file(back).items()}
    assert list(again) == list(published)
    jax.tree.map(np.testing.assert_array_equal, again, published)

    before = {path: path.read_bytes() for path in (*folder.iterdir(), back)}
    assert "is there already" in _exit(capsys, _PUBLISHED, folder, *_SET)
    assert "is there already" in _exit(capsys, "--to-pytorch", folder, back)
    assert before == {path: path.read_bytes() for path in before}
    convert.main([str(_PUBLISHED), str(folder), *_SET, "--force"])
    convert.main(["--to-pytorch", str(folder), str(back), "--force"])
    assert before == {path: path.read_bytes() for path in before}


def test_bad_commands_are_sentences_and_write_nothing(tmp_path, capsys):
    target, file = tmp_path / "target", tmp_path / "file"
    file.write_text("mine")
    _exit(capsys)
    _exit(capsys, "--nonsense", "a", "b")
    assert "no setting" in _exit(capsys, _PUBLISHED, target, "--set", "num_heads")
    assert "no field 'heads'" in _exit(capsys, _PUBLISHED, target, *_SET, "--set", "heads=1")
    assert "Unknown model" in _exit(capsys, _PUBLISHED, target, "--name=vvt")
    assert "does not fit" in _exit(capsys, _PUBLISHED, target, "--set", "num_heads=many")
    assert "No such file" in _exit(capsys, tmp_path / "none.pth", target)
    assert "Is a directory" in _exit(capsys, tmp_path, target)
    assert "is a file" in _exit(capsys, _PUBLISHED, file, *_SET, "--force")
    assert "Not a directory" in _exit(capsys, _PUBLISHED, file / "x", *_SET)
    assert "is a folder" in _exit(capsys, "--to-pytorch", _PUBLISHED, tmp_path, *_SET, "--force")
    assert "No such file" in _exit(capsys, "--to-pytorch", _PUBLISHED, target / "a" / "b", *_SET)
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_as_a_process(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "vvt_jax.convert"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--to-pytorch" in done.stdout
    done = subprocess.run([*command, _PUBLISHED, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
