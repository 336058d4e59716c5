"""Exported programs, run in a process that has jax and none of this package."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from vvt_jax import create_model, export, load_pretrained, save_pretrained
from vvt_jax.inference.stablehlo import describe, export_model, write
from vvt_jax.models import forms
from vvt_jax.models.shapes import variable_shapes

_CARD = {
    "preprocessing": {
        "size": [32, 48],
        "crop_fraction": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
    "class_names": ["a", "b", "c"],
}

_QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Whatever is of this package can't be imported there.
_RUN = """
import sys
sys.modules["vvt_jax"] = sys.modules["flax"] = None
import jax.export, numpy as np
run = jax.export.deserialize(open(sys.argv[1], "rb").read()).call
for path in sys.argv[2:]:
    np.save(path + ".logits.npy", run(np.load(path)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = create_model(
        "vvt_nano", embed_dims=(8, 8, 8, 16), num_heads=(1, 1, 1, 2), num_classes=3
    )
    rng = np.random.default_rng(0)
    variables = {
        name: rng.normal(scale=0.2, size=shape).astype(np.float32)
        for name, shape in variable_shapes(model).items()
    }
    path = tmp_path_factory.mktemp("exported") / "model"
    save_pretrained(path, model, unflatten_dict(variables, sep="/"), _CARD)
    return path


def _compare(folder, file, *shapes):
    model, variables, _ = load_pretrained(folder)
    inputs = []
    for shape in shapes:
        images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        inputs.append(file.with_name(f"{len(inputs)}.npy"))
        np.save(inputs[-1], images)
    done = subprocess.run(
        [sys.executable, "-c", _RUN, file, *inputs],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )
    assert done.returncode == 0, done.stderr
    for path in inputs:
        logits = np.load(f"{path}.logits.npy")
        apply = jax.jit(model.apply, compiler_options=_QUICK_COMPILE)
        expected = apply(variables, np.load(path))
        assert np.ptp(expected) > 1e-3
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_any_batch_for_every_platform_in_one_file(folder, tmp_path, capsys):
    file = tmp_path / "model.jax"
    export.main([str(folder), f"--out={file}"])
    assert "[batch,32,48,3]" in capsys.readouterr().out
    _compare(folder, file, (1, 32, 48, 3), (3, 32, 48, 3))
    said = json.loads((tmp_path / "model.jax.json").read_text())
    assert said["platforms"] == ["cpu", "cuda", "tpu"]
    assert {key: said[key] for key in _CARD} == _CARD
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")

    before = {path: path.read_bytes() for path in tmp_path.glob("model.jax*")}
    assert len(before) == 2
    assert "is there already" in _exit(capsys, folder, f"--out={file}")
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locality", "platform"),
    [("sum", "cpu"), ("sum", "tpu"), ("product", "cpu"), ("1d", "tpu"), ("none", "cpu")],
)
def test_any_size(folder, tmp_path, locality, platform):
    """Each locality makes its position features in the program, in either form."""
    model, variables, _ = load_pretrained(folder, locality=locality)
    chosen = forms.choose(platform)
    with forms.use(depthwise=chosen.depthwise, attention=chosen.attention):
        exported = export_model(model, variables, size=None, platforms=["cpu"])
    if (locality, platform) == ("sum", "cpu"):  # written, and read without this package
        file = tmp_path / "model.jax"
        write(file, bytes(exported.serialize()), describe(exported), model, {})
        _compare(folder, file, (2, 33, 70, 3), (1, 64, 32, 3))
        return
    images = np.random.default_rng(0).normal(size=(2, 33, 70, 3)).astype(np.float32)
    expected = jax.jit(model.apply)(variables, images)
    assert np.ptp(expected) > 1e-3
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(images), expected, rtol=0, atol=1e-6)


# Neither jax nor this package can be imported there.
_RUN_ONNX = """
import sys
for name in ("vvt_jax", "flax", "jax"):
    sys.modules[name] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(["logits"], {"images": np.load(sys.argv[2])})[0])
"""


@pytest.mark.slow
def test_an_onnx_runtime_gives_the_same_logits(folder, tmp_path):
    file, images, logits = (tmp_path / name for name in ("model.onnx", "images.npy", "logits.npy"))
    command = [sys.executable, "-m", "vvt_jax.export", folder, f"--out={file}", "--batch=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "takes float32[2,32,48,3] on onnx;" in done.stdout
    said = json.loads((tmp_path / "model.onnx.json").read_text())
    assert said["platforms"] == ["onnx"]
    assert {key: said[key] for key in _CARD} == _CARD

    given = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    np.save(images, given)
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ONNX, file, images, logits], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model, variables, _ = load_pretrained(folder)
    expected = jax.jit(model.apply, compiler_options=_QUICK_COMPILE)(variables, given)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(np.load(logits), expected, rtol=0, atol=1e-5)


def test_what_onnx_can_not_be_given_is_a_sentence(folder, tmp_path, capsys, monkeypatch):
    out = f"--out={tmp_path / 'x.onnx'}"
    assert "in numbers" in _exit(capsys, folder, out, "--batch=symbolic")
    assert "in numbers" in _exit(capsys, folder, out, "--size=symbolic")
    assert "--platforms is for StableHLO" in _exit(capsys, folder, out, "--platforms=cpu")
    assert "--set dtype=float32" in _exit(capsys, folder, out, "--set", "dtype=bfloat16")
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert "pip install 'vvt-jax[onnx]'" in _exit(capsys, folder, out)
    assert list(tmp_path.iterdir()) == []


def _exit(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        export.main([str(a) for a in arguments])
    assert ended.value.code not in (None, 0)
    message = str(ended.value.code)
    if message == "2":  # argparse says it itself
        message = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in message
    assert "\n" not in message
    return message


def test_bad_commands_are_sentences_and_write_nothing(folder, tmp_path, capsys):
    out = f"--out={tmp_path / 'x'}"
    assert "--out" in _exit(capsys, folder)
    assert "--batch=0" in _exit(capsys, folder, out, "--batch=0")
    assert "--batch=many" in _exit(capsys, folder, out, "--batch=many")
    assert "--batch=99999" in _exit(capsys, folder, out, "--batch=99999")
    for size in ("16", "x", "", "32x", "32x32x32", "64x16", "-64", "9" * 30, "symbolicx32"):
        assert f"--size={size}" in _exit(capsys, folder, out, f"--size={size}")
    assert "'gpu'" in _exit(capsys, folder, out, "--platforms=cpu,gpu")
    assert "''" in _exit(capsys, folder, out, "--platforms=")
    assert "is not a model folder" in _exit(capsys, tmp_path / "none", out)
    assert "no field 'x'" in _exit(capsys, folder, out, "--set", "x=1")
    assert "is a folder" in _exit(capsys, folder, f"--out={tmp_path}", "--force")
    assert "no folder" in _exit(capsys, folder, f"--out={tmp_path / 'none' / 'x'}")
    assert list(tmp_path.iterdir()) == []
