"""The command: what it prints and writes, and one sentence for whatever input is bad."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest

import vvt_jax
from tests import fork_server
from tests.conftest import draw_variables
from vvt_jax import predict
from vvt_jax.data import overlay
from vvt_jax.data.image_files import SUFFIXES
from vvt_jax.data.preprocess import to_rgb
from vvt_jax.data.sources import open_source
from vvt_jax.inference import explain

_KINDS = ", ".join(suffix[1:] for suffix in SUFFIXES)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten digits, five of them in sub-folders; their names begin with what they are."""
    folder = tmp_path_factory.mktemp("images")
    digits = open_source("digits", "test")
    for i in range(10):
        example = digits.examples[i]
        place = folder / ("" if i < 5 else f"more/{i % 2}")
        place.mkdir(parents=True, exist_ok=True)
        picture = PIL.Image.fromarray(example["image"][..., 0])
        picture.save(place / f"{example['label']}_{i}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("not looked at")
    return folder


@pytest.fixture
def command(digits_folder, monkeypatch, capsys):
    """Runs the command in this process: exit status, standard output and error."""

    def run(*arguments, model=digits_folder, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            predict.main([f"--model={model}", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return run


def test_a_table_of_files_folders_and_patterns(command, images):
    first = min(images.glob("*_0.png"))
    status, out, err = command("--top=2", first, images / "more", f"{images}/*_[1-4].png")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    names = [line for line in lines if not line.startswith(" ")]
    assert len(names) == 1 + 5 + 4
    assert names[0] == str(first)
    assert names[1:6] == sorted(map(str, images.glob("more/*/*.png")))
    for name, best, second in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        share, label = best.split()
        assert label == Path(name).name[0]
        assert float(share.rstrip("%")) > float(second.split()[0].rstrip("%"))


def test_json_and_csv_say_what_the_predictor_says(command, images, predictor):
    files = sorted(map(str, images.rglob("[0-9]*.png")))
    expected = predictor(files, top=3)
    status, out, _ = command("--top=3", "--format=json", *files)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["image"] for line in lines] == files
    for line, prediction in zip(lines, expected, strict=True):
        assert tuple(line["labels"]) == prediction.labels
        assert tuple(line["names"]) == prediction.names
        np.testing.assert_allclose(line["probabilities"], prediction.probabilities, rtol=1e-4)
    status, out, _ = command("--top=3", "--format=csv", *files)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0
    assert list(rows[0]) == ["image", "rank", "label", "name", "probability"]
    assert [row["image"] for row in rows] == [name for name in files for _ in range(3)]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * len(files)
    assert [int(row["label"]) for row in rows] == [x for p in expected for x in p.labels]


def test_a_list_on_standard_input_and_what_is_broken_in_it(command, images, tmp_path):
    sound = sorted(map(str, images.glob("more/*/*.png")))
    (tmp_path / "cut.png").write_bytes(Path(sound[0]).read_bytes()[:60])
    listed = [sound[0], str(tmp_path / "cut.png"), "", "/nowhere/x.png", sound[1]]
    status, out, err = command("--format=json", "-", stdin="\n".join(listed).encode() + b"\r\n")
    assert status == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == sound[:2]
    complaints = sorted(err.splitlines())
    assert len(complaints) == 2
    assert complaints[0] == "error: /nowhere/x.png does not exist."
    assert complaints[1].startswith(f"error: {tmp_path}/cut.png can't be decoded: ")


def test_other_names_for_the_classes(command, images, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"number {i} ☃\n" for i in range(10)), encoding="utf-8")
    status, out, _ = command(f"--labels={labels}", "--top=1", "--format=json", images)
    assert status == 0
    for line in map(json.loads, out.splitlines()):
        assert line["names"] == [f"number {Path(line['image']).name[0]} ☃"]


def test_heat_maps_are_named_after_their_images(command, images, tmp_path, predictor):
    other = tmp_path / "other"
    other.mkdir()
    first = min(images.glob("*_0.png"))
    shutil.copy(first, other)
    out = tmp_path / "deep" / "heat"
    given = (first, other / first.name, images, f"--heatmap={out}", "--top=1")
    status, _, err = command(*given)
    assert (status, err) == (0, "")
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    expected = [
        f"{first.name}-2.png",
        *(f"{p.relative_to(images)}.png" for p in images.rglob("[0-9]*.png")),
    ]
    assert written == sorted(expected)
    maps = explain.class_maps(predictor, first)
    overlay = explain.overlay(predictor.pixels(first)[0], maps[0])
    with PIL.Image.open(out / f"{first.name}.png") as picture:
        difference = np.asarray(picture).astype(int) - np.asarray(overlay)
    assert np.abs(difference).max() <= 1

    (out / f"{first.name}.png").write_text("mine")
    status, printed, err = command(*given)
    assert (status, printed) == (1, "")
    assert err.startswith(f"error: {out / first.name}.png exists: ")
    assert "--force" in err
    assert (out / f"{first.name}.png").read_text() == "mine"
    status, _, _ = command(images, f"--heatmap={out}", "--force")
    assert status == 0
    with PIL.Image.open(out / f"{first.name}.png") as picture:
        assert picture.size == (224, 224)
    assert not list(out.rglob("*.tmp"))


def test_an_image_is_never_written_over(command, images, tmp_path):
    first = min(images.glob("*_0.png"))
    shutil.copy(first, tmp_path / "a.png")
    shutil.copy(first, tmp_path / "a.png.png")
    before = (tmp_path / "a.png.png").read_bytes()
    given = (tmp_path / "a.png", tmp_path / "a.png.png", f"--heatmap={tmp_path}", "--force")
    status, _, err = command(*given)
    assert status == 1
    assert f"{tmp_path}/a.png.png is an image to be read: give another --heatmap." in err
    assert (tmp_path / "a.png.png").read_bytes() == before


@pytest.fixture(scope="module")
def segmenter_folder(tmp_path_factory):
    """A small segmenter that nobody trained."""
    model = vvt_jax.create_segmenter(
        "vvt_nano",
        num_classes=3,
        head_channels=8,
        depths=(1, 1, 1, 1),
        embed_dims=(8, 8, 16, 16),
        num_heads=(1, 1, 2, 2),
    )
    variables = draw_variables(model)
    record = {
        "size": [32, 32],
        "crop_fraction": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    }
    folder = tmp_path_factory.mktemp("segmenter") / "model"
    card = {"preprocessing": record, "class_names": ["sky", "road", "tree"]}
    vvt_jax.save_pretrained(folder, model, variables, card)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three of one size, one of them lying on its side, and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        pixels = random.integers(0, 256, (5, 7, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        picture, exif = PIL.Image.fromarray(pixels), PIL.Image.Exif()
        if name == "b":
            exif[PIL.ExifTags.Base.Orientation] = 6
        picture.save(folder / f"{name}.png", exif=exif)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


@pytest.mark.slow
def test_a_segmenter_labels_every_pixel(command, photos, segmenter_folder, tmp_path):
    out = tmp_path / "masks"
    given = (photos, f"--masks={out}", "--format=json", "--top=3")
    status, printed, err = command(*given, model=segmenter_folder)
    assert status == 1
    assert err.startswith(f"error: {photos}/broken.png can't be decoded: ")
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.png", "c.png"]
    assert len(list(out.iterdir())) == 6
    model, variables, card = vvt_jax.load_pretrained(segmenter_folder)
    for line in lines:
        assert sum(line["shares"]) == pytest.approx(1)
        with PIL.Image.open(line["image"]) as picture:
            upright = to_rgb(PIL.ImageOps.exif_transpose(picture))
        classes = vvt_jax.segment.segment_image(model, variables, card, upright)
        name = Path(line["image"]).name
        with PIL.Image.open(out / f"{name}.mask.png") as mask:
            found = np.asarray(mask)
        assert found.shape == ((56, 40) if name == "b.png" else (40, 56))
        assert (found == classes).mean() > 0.99  # but for rounding, at borders between classes
        with PIL.Image.open(out / f"{name}.overlay.png") as tinted:
            np.testing.assert_array_equal(tinted, overlay.draw_overlay(upright, found, 3))
        for label, class_name, share in zip(
            line["labels"], line["names"], line["shares"], strict=True
        ):
            assert class_name == card["class_names"][label]
            assert share == pytest.approx((found == label).mean())


def test_shares_of_pixels_as_a_table_and_as_csv(command, photos, segmenter_folder):
    status, printed, err = command(photos / "a.png", "--top=1", model=segmenter_folder)
    assert (status, err) == (0, "")
    assert [line.split()[-1] for line in printed.splitlines()][1] in ("sky", "road", "tree")
    _, printed, _ = command(photos / "a.png", "--format=csv", model=segmenter_folder)
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert list(rows[0]) == ["image", "rank", "label", "name", "share"]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("flag", "segments", "told"),
    [
        ("--masks", False, "The model classifies images, not pixels: --masks is for a segmenter"),
        ("--heatmap", True, "The model labels pixels: in place of --heatmap and --stage, --masks="),
    ],
)
def test_pictures_of_another_kind_of_model_are_refused(
    command, photos, digits_folder, segmenter_folder, tmp_path, flag, segments, told
):
    model = segmenter_folder if segments else digits_folder
    status, printed, err = command(photos / "a.png", f"{flag}={tmp_path / 'out'}", model=model)
    assert (status, printed) == (1, "")
    assert told in err


# Bad input. Each of these is told before jax is even imported.


def _label_files(folder):
    """Name, content and what is said of it."""
    return {
        "missing": (None, "it can't be read (No such file or directory)"),
        "empty": (b"", "it is empty"),
        "truncated": (b"zero\none\ntw\xe2\x98", "it is not UTF-8 text"),
        "wrong type": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "it is not UTF-8 text"),
        "hostile": (b"zero\n\x1b[2Jone\n", "line 2 is no name"),
        "oversized": (
            b"x\n" * 2**21 + b"x",
            "it can't be read (it has 4194305 bytes, and a file of its kind has at most 4194304)",
        ),
        "blank": (b"zero\n\none\n", "line 2 is no name"),
    }


@pytest.mark.parametrize("kind", list(_label_files(None)))
def test_a_bad_label_file_is_told(command, images, tmp_path, kind):
    content, words = _label_files(tmp_path)[kind]
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content)
    status, out, err = command(f"--labels={path}", images)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {path} ")
    assert err.endswith(f": {words}.\n")


def test_a_label_file_for_other_classes_is_told(command, images, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    status, out, err = command(f"--labels={tmp_path / 'labels.txt'}", images)
    assert (status, out) == (1, "")
    assert err.startswith("error: 2 class names ")
    assert "10 classes" in err


def test_every_kind_of_bad_image_is_told_and_the_rest_goes_on(command, images, tmp_path):
    sound = min(images.glob("*_0.png"))
    content = sound.read_bytes()
    files = {
        "empty.png": b"",
        "truncated.png": content[: len(content) // 2],
        "wrong_type.png": b"GIF89a" + bytes(100),
        "text.jpg": b"no image at all",
        "hostile.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n",
        "flipped.png": content[:40] + bytes([content[40] ^ 255]) + content[41:],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    PIL.Image.new("1", (20_000, 20_000)).save(tmp_path / "oversized.png")
    PIL.Image.new("L", (300_000, 1)).save(tmp_path / "line.png")
    PIL.Image.fromarray(np.zeros((40, 40), np.float32)).save(tmp_path / "float.webp", "TIFF")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "line\nbreak.png").write_bytes(b"")
    bad = sorted(tmp_path.iterdir())
    before = {path: path.read_bytes() for path in bad if path.is_file()}
    status, out, err = command("--format=json", "--top=1", *bad, "/nowhere.png", sound)
    assert status == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(sound)]
    complaints = err.splitlines()
    assert len(complaints) == len(bad) + 1
    for path in bad:
        told = str(path).replace("\n", "\\n")
        (complaint,) = (line for line in complaints if line.startswith(f"error: {told} "))
        assert complaint.endswith(".")
    assert {path: path.read_bytes() for path in before} == before


def test_folders_are_searched_as_training_searches_them(tmp_path):
    for name in ("photos/a.jpg", "elsewhere/b.PNG", "photos/c.avif", "photos/@eaDir/a.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")
    root = tmp_path / "photos"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked" / "back").symlink_to(root)
    complaints = []
    found = list(predict.find_images([str(root)], complaints.append))
    assert [image.name for image in found] == ["a.jpg", "c.avif", "linked/b.PNG"]
    assert [image.path for image in found] == [str(root / image.name) for image in found]
    assert not complaints


def test_a_list_of_labels_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "labels.txt").write_text("\ufeffcat\ndog\n", encoding="utf-8")
    assert predict.read_labels(tmp_path / "labels.txt") == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["missing", "empty", "wrong type", "no match"])
def test_a_bad_folder_is_told(command, images, tmp_path, kind):
    if kind == "wrong type":
        (tmp_path / "notes.txt").write_text("no image")
    given, words = {
        "missing": (f"{tmp_path}/nowhere/", "does not exist."),
        "empty": (f"{tmp_path}", f"has no images ({_KINDS})."),
        "wrong type": (f"{tmp_path}", f"has no images ({_KINDS})."),
        "no match": (f"{tmp_path}/*.png", "matches nothing."),
    }[kind]
    assert command(given) == (1, "", f"error: {given} {words}\n")


def test_an_empty_list_is_told(command):
    told = "error: The list on standard input names no images.\n"
    assert command("-", stdin=b"") == (1, "", told)
    assert command("-", stdin=b"\n\n") == (1, "", told)


def test_hostile_lists_are_told(command):
    status, out, err = command("-", stdin=b"a\0b.png\n\xff\xfe.png\n" + b"x" * 5000 + b"\n")
    assert (status, out) == (1, "")
    *complaints, last = err.splitlines()
    assert complaints == [
        f"error: {name} does not exist."
        for name in (r"a\x00b.png", r"\udcff\udcfe.png", "x" * 5000)
    ]
    assert last.startswith("error: The list on standard input ")


@pytest.mark.parametrize("kind", ["wrong type", "below a file", "too long", "no space in name"])
def test_a_bad_folder_for_heat_maps_is_told(command, images, tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    out = {
        "wrong type": tmp_path / "file",
        "below a file": tmp_path / "file" / "heat",
        "too long": tmp_path / ("x" * 300),
        "no space in name": Path("/proc/heat"),
    }[kind]
    status, printed, err = command(images, f"--heatmap={out}")
    assert (status, printed) == (1, "")
    assert err.startswith(f"error: --heatmap={out} can't be a folder: ")
    assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--top=0", "'0' is no number from 1 to 999999"),
        ("--top=-1", "'-1' is no number"),
        ("--top=many", "'many' is no number"),
        ("--batch=", "'' is no number"),
        ("--batch=1e9", "'1e9' is no number"),
        ("--batch=99999999999", "'99999999999' is no number"),
        ("--format=xml", "invalid choice: 'xml'"),
        ("--stage=5", "invalid choice: 5"),
        ("--stage=x", "invalid int value: 'x'"),
        ("--tops=1", "unrecognized arguments: --tops=1"),
        ("--force=yes", "ignored explicit argument 'yes'"),
    ],
)
def test_a_bad_flag_is_told(command, images, flag, words):
    status, out, err = command(flag, images)
    assert (status, out) == (2, "")
    assert words in err.splitlines()[-1]


def test_without_images_or_a_model_it_says_so(command, capsys):
    status, _, err = command()
    assert (status, err.splitlines()[-1]) == (
        2, "python -m vvt_jax.predict: error: the following arguments are required: images",
    )  # fmt: skip
    with pytest.raises(SystemExit):
        predict.main(["x.png"])
    assert "required: --model" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "wrong type"])
def test_a_bad_model_is_told(command, images, digits_folder, tmp_path, kind):
    model = tmp_path / "model"
    if kind == "empty":
        model.mkdir()
    elif kind == "truncated":
        shutil.copytree(digits_folder, model)
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
    elif kind == "wrong type":
        model.write_text("a file")
    status, out, err = command(images, model=model)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert str(model) in err
    assert err.count("\n") == 1


def test_what_may_not_be_read_or_written_is_told(
    images, digits_folder, tmp_path, run_under_permissions
):
    shutil.copytree(digits_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").chmod(0)
    sound = shutil.copy(min(images.glob("*_0.png")), tmp_path / "sound.png")
    shutil.copy(sound, tmp_path / "locked.png")
    (tmp_path / "locked.png").chmod(0)
    (tmp_path / "locked").mkdir(mode=0)
    (tmp_path / "labels.txt").write_text("x\n" * 10)
    (tmp_path / "labels.txt").chmod(0)
    (tmp_path / "heat").mkdir(mode=0o555)
    done = run_under_permissions(
        """
        import sys
        from vvt_jax import predict

        folder, model = sys.argv[1:]
        model, sound = f"--model={model}", f"{folder}/sound.png"
        for given in (
            [model, sound, f"--labels={folder}/labels.txt"],
            [model, sound, f"--heatmap={folder}/heat"],
            [model, sound, f"--heatmap={folder}/heat/deep"],
            [f"--model={folder}/model", sound],
            [model, "--top=1", f"{folder}/locked.png", f"{folder}/locked", sound],
        ):
            try:
                predict.main(given)
            except SystemExit as ended:
                print("status", ended.code)
        """,
        str(tmp_path),
        str(digits_folder),
    )
    (tmp_path / "locked").chmod(0o700)  # for who tidies up
    assert done.returncode == 0, done.stderr
    *refused, name, best, last = done.stdout.splitlines()
    assert [*refused, last] == ["status 1"] * 5
    assert name == str(sound)
    assert best.endswith("%  7")
    expected = [
        f"error: {tmp_path}/labels.txt is no file of class names: it can't be read "
        "(Permission denied).",
        f"error: --heatmap={tmp_path}/heat can't be a folder: Permission denied.",
        f"error: --heatmap={tmp_path}/heat/deep can't be a folder: Permission denied.",
        f"error: {tmp_path}/model is not a model folder: it has no readable config.json "
        "(Permission denied).",
        f"error: {tmp_path}/locked can't be read: Permission denied.",
        f"error: {tmp_path}/locked has no images (jpg, jpeg, jpe, jfif, png, ",
        f"error: {tmp_path}/locked.png can't be read: Permission denied.",
    ]
    for told, beginning in zip(done.stderr.splitlines(), expected, strict=True):
        assert told.startswith(beginning)


def _process(*arguments):
    return fork_server.run(["-m", "vvt_jax.predict", *arguments])


@pytest.mark.slow
def test_as_a_process(digits_folder, images, tmp_path):
    done = _process(f"--model={digits_folder}", "--top=1", images, images / "notes.txt")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 20
    assert done.stderr.startswith(f"error: {images}/notes.txt can't be decoded: ")
    assert done.stderr.count("\n") == 1
    heat = tmp_path / "heat"
    done = _process(f"--model={digits_folder}", images, "--stage=1", f"--heatmap={heat}")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(heat.rglob("*.png"))) == 10
    done = _process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--heatmap DIR" in done.stdout


@pytest.mark.slow
def test_whoever_has_seen_enough_may_leave(digits_folder, images):
    process = subprocess.Popen(
        [sys.executable, "-m", "vvt_jax.predict", f"--model={digits_folder}", str(images)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0
