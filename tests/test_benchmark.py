"""The benchmark: what it prints and writes, and guards of what does not depend on the clock."""

import json
import os

import pytest

from tests import fork_server
from vvt_jax import benchmark
from vvt_jax.costs.program import Program, Setting
from vvt_jax.costs.targets import target_devices
from vvt_jax.system.errors import UserError

_SMALL = ["--model=vvt_nano", "--size=32x64", "--batch=2", "--seconds=0.1"]


def _run(*flags, devices=1, anew=False):
    environment = {**os.environ}
    environment.pop("XLA_FLAGS", None)
    if devices:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return fork_server.run(["-m", "vvt_jax.benchmark", *flags], environment, anew=anew)


def test_forward_as_a_table_and_json(tmp_path, capsys):
    benchmark.main([*_SMALL, "--layers", f"--json={tmp_path / 'r.json'}"])
    out = capsys.readouterr().out
    for words in ("vvt_nano 32x64 batch 2 forward", "images/s, median", "share", "temporaries"):
        assert words in out
    assert "stage4/blocks/feed_forward/depthwise" in out
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["parameters"] == 298_032
    assert result["multiply_adds"] == sum(layer["published"] for layer in result["layers"])
    assert result["rounds"] >= 5
    assert result["quartiles"][0] <= result["images_per_second"] <= result["quartiles"][1]
    rate = 2 * result["multiply_adds"] * result["images_per_second"] / result["matmul_flops"]
    assert result["share"] == pytest.approx(rate)


@pytest.mark.slow
def test_train_step_counts_three_forward_passes(capsys, tmp_path):
    benchmark.main([*_SMALL, "--compare", "train=False", "train=True", f"--json={tmp_path / 'r'}"])
    out = capsys.readouterr().out
    assert "ratio" in out
    forward, train = json.loads((tmp_path / "r").read_text())
    assert train["multiply_adds"] == 3 * forward["multiply_adds"]
    assert train["images_per_second"] < forward["images_per_second"]


@pytest.mark.slow
def test_comparison_prints_ratios_and_takes_fields_and_forms(capsys):
    compared = ["attention=softmax", "depths=(1,1,1,2) form.attention=concatenated size=32"]
    benchmark.main([*_SMALL, "--no-run", "--compare", *compared])
    lines = capsys.readouterr().out.splitlines()
    assert "attention=softmax" in lines[0]
    assert lines[0].endswith("ratio")
    assert "vvt_nano 32x32" in lines[0]
    assert any("shift, concatenated, kept" in line for line in lines)
    assert not any("images/s" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=vvt_huge"], "Unknown model 'vvt_huge'"),
        (["--set", "dephts=3"], "A model has no field 'dephts'; did you mean 'depths'"),
        (["--set", "depths"], "'depths' is no setting: it has to be name=value"),
        (["--set", "form.depthwise=dense"], "Unknown form 'dense'"),
        (["--set", "form.pooling=max"], "pooling"),
        (["--size=big"], "The size 'big' is not understood"),
        (["--size=16"], "at least 32 pixels"),
        (["--mesh=rows:2"], "The mesh 'rows:2' is not understood"),
        (["--mesh=data:0"], "config.mesh"),
        (["--batch=0"], "batch"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(flags, words):
    with pytest.raises(UserError) as refused:
        benchmark.main(["--model=vvt_nano", "--size=32", "--no-run", *flags])
    assert words in str(refused.value)


@pytest.mark.parametrize("text", ["train=false", "train=False", "train=FALSE"])
def test_false_does_not_train(text):
    assert Setting(train=True).changed(text).train is False
    assert Setting().changed("train=true").train is True


@pytest.mark.parametrize(
    "text", ["train=no", "train=0", "train=", "batch=x", "batch=1.5", "batch="]
)
def test_a_setting_of_another_kind_is_refused(text):
    with pytest.raises(UserError, match="is not understood"):
        Setting().changed(text)


def test_the_command_exits_with_the_sentence():
    done = _run("--model=vvt_huge", anew=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Unknown model 'vvt_huge'")
    assert "Traceback" not in done.stderr


def test_a_target_without_its_compiler_says_what_to_install():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'vvt-jax\[tpu\]'"):
            target_devices("v5e:2x2")
    else:
        with pytest.raises(UserError, match="v0:9x9"):
            target_devices("v0:9x9")


# What does not depend on the clock


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_temporaries_and_donation_of_the_train_step():
    """vvt_tiny at batch 4 and 224 pixels, as measured, ±10 %."""
    program = Program(Setting("vvt_tiny", batch=4, train=True, fields={"drop_path_rate": 0.1}))
    described = program.describe()
    assert described["temporary_bytes"] == pytest.approx(757e6, rel=0.1)
    memory = program.compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * 4 * described["parameters"], "the state is not donated"


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("size", "batch", "expected"), [(224, 8, 246e6), (1024, 1, 632e6)])
def test_temporaries_of_the_forward_pass(size, batch, expected):
    program = Program(Setting("vvt_tiny", height=size, width=size, batch=batch))
    assert program.describe()["temporary_bytes"] == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bands", "permutes"),
    [
        (1, 4 * 2 + 4),  # two a depthwise convolution and one a patch embedding
        (4, 4 * 2 + 4),  # two a feed-forward network, of maps before they widen
    ],
)
def test_rows_over_devices_trade_halos_and_small_sums_alone(tmp_path, bands, permutes):
    flags = [
        "--model=vvt_nano",
        "--size=256",
        "--mesh=spatial:8",
        "--set",
        f"ffn_bands={bands}",
        "--no-run",
    ]
    done = _run(*flags, f"--json={tmp_path / 'r'}", devices=None)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "r").read_text())
    assert result["forms"] == {
        "depthwise": "grouped",
        "attention": "concatenated",
        "gelu": "recomputed",
    }
    assert set(result["collectives"]) == {"collective-permute", "all-reduce"}
    assert result["collectives"]["collective-permute"]["count"] == permutes


@pytest.mark.slow
def test_fsdp_spreads_what_a_training_step_takes(tmp_path):
    flags = ["--model=vvt_nano", "--size=64", "--batch=8", "--train", "--mesh=fsdp:8", "--no-run"]
    done = _run(*flags, f"--json={tmp_path / 'r'}", devices=None)
    assert done.returncode == 0, done.stderr
    assert "rematerialization" not in done.stderr, "XLA gathers what it can't lay out otherwise"
    (result,) = json.loads((tmp_path / "r").read_text())
    state = 3 * 4 * result["parameters"]  # with two moments
    batch = 8 * (64 * 64 * 3 + 4)
    assert (state + batch) / 8 <= result["argument_bytes"] <= 1.05 * (state + batch) / 8
