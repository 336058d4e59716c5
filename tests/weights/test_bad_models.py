"""Whatever a model is loaded from × whatever can be wrong with it: one sentence, nothing written.

What else a command is given has its tests beside it: images, folders, label files, output folders
and flags in test_predict.py, hostile pickles in test_torch_files.py, single fields of a folder in
test_pretrained.py.
"""

import json
import os
import pickle
import shutil

import PIL.Image
import pytest

from vvt_jax import predict

DAMAGES = ("missing", "empty", "truncated", "wrong type", "hostile", "oversized")
_PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
_SPARSE = 2**40  # bytes that a file claims to have


class _Runs:
    def __reduce__(self):
        return os.system, ("touch HACKED",)


def _damage_file(path, kind, hostile: bytes):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "oversized":
        os.truncate(path, _SPARSE)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "wrong type": _PNG,
                "hostile": hostile,
            }[kind]
        )


def _damage_card(path, kind):
    config = json.loads(path.read_text())
    record = config["card"]["preprocessing"]
    if kind == "missing":
        del config["card"]
    elif kind == "empty":
        config["card"] = {}
    elif kind == "truncated":
        del record["std"]
    elif kind == "wrong type":
        config["card"] = ["preprocessing", "class_names"]
    elif kind == "hostile":
        record["mean"] = [1e999] * 3
    else:
        record["size"] = [10**6, 10**6]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("part", ["folder", "config.json", "model.safetensors", "card", ".pth"])
def test_a_damaged_model_is_told_in_a_sentence(
    digits_folder, tmp_path, capsys, monkeypatch, part, kind
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(digits_folder, folder)
    given = folder
    if part == "card":
        _damage_card(folder / "config.json", kind)
    elif part == "config.json":
        _damage_file(folder / part, kind, hostile=b'{"a":' * 10**5)
    elif part == "model.safetensors":
        _damage_file(folder / part, kind, hostile=(2**62).to_bytes(8, "little") + b"{}")
    elif part == ".pth":
        given = tmp_path / "model.pth"
        shutil.copy(folder / "model.safetensors", given)  # a stand-in that is damaged, or wrong
        _damage_file(given, kind, hostile=pickle.dumps({"model": _Runs()}))
    else:
        given = {
            "missing": tmp_path / "none",
            "empty": tmp_path / "empty",
            "truncated": folder / "config.json",  # a part of it
            "wrong type": tmp_path / "text",
            "hostile": tmp_path / "loop",
            "oversized": tmp_path / ("x" * 5000),
        }[kind]
        (tmp_path / "empty").mkdir()
        (tmp_path / "text").write_text("no model")
        (tmp_path / "loop").symlink_to("loop")
    PIL.Image.new("L", (8, 8)).save(tmp_path / "image.png")
    before = _listing(tmp_path)

    with pytest.raises(SystemExit) as ended:
        predict.main([f"--model={given}", "image.png", "--heatmap=heat"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert str(given) in err
    assert _listing(tmp_path) == before


def _listing(folder):
    """Names and sizes of all that lies there, but for a folder that was made for pictures."""
    found = sorted(p for p in folder.rglob("*") if p.name != "heat")
    return [(str(p), p.lstat().st_size) for p in found]


def test_names_of_classes_do_not_act_on_a_terminal(digits_folder, tmp_path, capsys):
    shutil.copytree(digits_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["card"]["class_names"] = [f"\x1b[2J\n{i}" for i in range(10)]
    path.write_text(json.dumps(config))
    PIL.Image.new("L", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(SystemExit) as ended:
        predict.main([f"--model={tmp_path / 'model'}", str(tmp_path / "image.png")])
    out, err = capsys.readouterr()
    assert ended.value.code in (None, 0)
    assert err == ""
    assert out.count("\n") == 6
    assert out.replace("\n", "").isprintable()


def test_what_may_not_be_read_is_told(digits_folder, tmp_path, run_under_permissions):
    (tmp_path / "image.png").write_bytes(_PNG)
    locked = []
    for part in ("config.json", "model.safetensors", ""):
        folder = tmp_path / f"without {part or 'all'}"
        shutil.copytree(digits_folder, folder)
        (folder / part).chmod(0)
        locked.append(folder)
    locked.append(tmp_path / "locked.pth")
    locked[-1].write_bytes(_PNG)
    locked[-1].chmod(0)
    code = """
        import sys
        from vvt_jax import predict

        image, *models = sys.argv[1:]
        for model in models:
            try:
                predict.main([f"--model={model}", image])
            except SystemExit as ended:
                print(ended.code)
    """
    done = run_under_permissions(code, tmp_path / "image.png", *locked)
    locked[2].chmod(0o700)  # for who tidies up
    assert done.stdout.split() == ["1"] * 4
    complaints = done.stderr.splitlines()
    assert len(complaints) == 4
    for path, complaint in zip(locked, complaints, strict=True):
        assert complaint.startswith("error: ")
        assert str(path) in complaint
        assert "Permission denied" in complaint
