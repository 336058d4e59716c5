"""How parts of a split are cut: quotas, stability, and what runs of before go on with."""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvt_jax.data import splits
from vvt_jax.data.examples import DataError
from vvt_jax.data.sources import open_source

TWO = ("train[:90%]", "train[90%:]")
THREE = ("train[:80%]", "train[80%:90%]", "train[90%:]")


def _listing(counts):
    """Names and classes of a folder with so many files in each class."""
    names = [f"c{label}/{i:04}.png" for label, count in enumerate(counts) for i in range(count)]
    return names, [int(name[1 : name.index("/")]) for name in names]


def _parts(counts, parts, extra=(), cut=None):
    """The part of each file by its name."""
    names, classes = _listing(counts)
    for label, name in extra:
        names.append(f"c{label}/{name}")
        classes.append(label)
    cut = cut or splits.ByHash(parts)
    chosen = {part: [names[i] for i in cut(part, names, classes)] for part in parts}
    assert sorted(name for part in chosen.values() for name in part) == sorted(names)
    return {name: part for part, files in chosen.items() for name in files}


def _count(found, part, label):
    return sum(p == part and name.startswith(f"c{label}/") for name, p in found.items())


def test_each_of_ten_small_classes_is_in_both_parts():
    """Before, one part lacked seven of these classes."""
    found = _parts([10] * 10, TWO)
    assert [_count(found, TWO[1], label) for label in range(10)] == [1] * 10


@pytest.mark.parametrize("parts", [TWO, THREE, ("train[30%:]", "train[:30%]")])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 9, 10, 11, 31, 200])
def test_a_class_is_in_every_part_if_it_has_enough_images(parts, count):
    found = _parts([count, 7], parts)
    sizes = [_count(found, part, 0) for part in parts]
    if count >= len(parts):
        assert min(sizes) >= 1
    if count >= 10 * len(parts):
        shares = {"train[:90%]": 0.9, "train[:80%]": 0.8, "train[30%:]": 0.7}
        assert sizes[0] == round(shares[parts[0]] * count)


def test_a_single_image_goes_where_most_are():
    assert set(_parts([1], TWO).values()) == {"train[:90%]"}
    assert set(_parts([1], ("train[:30%]", "train[30%:]")).values()) == {"train[30%:]"}


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    percent=st.integers(1, 99),
    name=st.text("abcdefgh", min_size=1, max_size=8),
)
def test_an_added_file_moves_one_other_at_most_and_only_in_its_class(counts, percent, name):
    parts = (f"train[:{percent}%]", f"train[{percent}%:]")
    before, after = _parts(counts, parts), _parts(counts, parts, extra=[(0, f"{name}.jpg")])
    moved = [file for file in before if before[file] != after[file]]
    assert len(moved) <= 1
    assert all(file.startswith("c0/") for file in moved)


def test_of_three_parts_an_added_file_moves_one_a_boundary_at_most():
    for count in range(1, 30):
        before = _parts([count], THREE)
        for name in "abcdef":
            after = _parts([count], THREE, extra=[(0, name)])
            assert sum(before[file] != after[file] for file in before) <= 2


def test_counts_are_exact_and_spread_over_the_classes():
    parts = ("train[:60]", "train[60:]")
    found = _parts([40, 40, 20], parts)
    assert list(found.values()).count(parts[0]) == 60
    assert [_count(found, parts[0], label) for label in range(3)] == [24, 24, 12]
    names, classes = _listing([3, 2])
    assert len(splits.ByHash()("train[2:100]", names, classes)) == 3
    assert len(splits.ByHash()("train[:0]", names, classes)) == 0
    assert splits.ByHash()("train[:]", names, classes).tolist() == [0, 1, 2, 3, 4]


def test_the_order_of_files_follows_from_their_names_alone():
    """Written down: a change of the hash would move the examples of everybody's runs."""
    found = _parts([20], TWO)
    assert [name for name, part in found.items() if part == TWO[1]] == [
        "c0/0001.png",
        "c0/0010.png",
    ]
    rng = np.random.default_rng(0)
    names, classes = _listing([30, 12])
    shuffled = rng.permutation(len(names))
    cut = splits.ByHash(TWO)
    there = {names[i] for i in cut(TWO[1], names, classes)}
    again = cut(TWO[1], [names[i] for i in shuffled], [classes[i] for i in shuffled])
    assert {names[shuffled[i]] for i in again} == there


def test_runs_without_a_list_are_cut_as_before():
    names, classes = _listing([6, 6])
    order = np.random.default_rng(0).permutation(12)
    expected = sorted(order[round(0.75 * 12) :].tolist())
    assert splits.at_random("train[75%:]", names, classes).tolist() == expected
    assert splits.at_random("train[9:]", names, classes).tolist() == expected
    # What is listed today and was not listed then changes nothing.
    names += ["c0/nested/0.png", "c1/a.bmp"]
    classes += [0, 1]
    assert splits.at_random("train[75%:]", names, classes).tolist() == expected
    assert splits.at_random("train", names, classes).tolist() == list(range(12))


def test_a_recorded_list_decides():
    names, classes = _listing([5])
    cut = splits.Recorded(["c0/0004.png", "gone.png", "c0/0001.png"], fill=True)
    assert cut("train[:90%]", names, classes).tolist() == [4, 1, 1]
    assert (cut.missing, list(cut.listed)) == (["gone.png"], names)
    cut = splits.Recorded(["c0/0004.png", "c0/0001.png", "gone.png"], fill=True)
    assert cut("train[:90%]", names, classes).tolist() == [4, 1, 4]
    cut = splits.Recorded(["c0/0004.png", "gone.png", "c0/0001.png"], fill=False)
    assert cut("train[90%:]", names, classes).tolist() == [4, 1]
    with pytest.raises(DataError, match="None of the 1 examples that the run recorded"):
        splits.Recorded(["gone.png"], fill=True)("train", names, classes)


def test_many_files_are_cut_quickly():
    names, classes = _listing([1000] * 100)
    assert len(splits.ByHash(TWO)(TWO[1], names, classes)) == 10_000


@pytest.mark.parametrize("kind", ["folder", "folder_segmentation"])
def test_sources_name_their_examples_by_where_they_are_in_the_folder(tmp_path, kind):
    folders = ("cat", "dog") if kind == "folder" else ("images", "masks")
    for folder in folders:
        (tmp_path / folder).mkdir()
        for i in range(4):
            PIL.Image.new("L", (8, 8)).save(tmp_path / folder / f"{i}.png")
    if kind == "folder_segmentation":
        (tmp_path / "classes.txt").write_text("a\nb\n")
    whole = open_source(kind, "train", data_dir=str(tmp_path))
    assert whole.names[0] == f"{folders[0]}/0.png"
    parts = [
        open_source(kind, part, data_dir=str(tmp_path)) for part in ("train[:50%]", "train[50%:]")
    ]
    assert sorted([*parts[0].names, *parts[1].names]) == sorted(whole.names)
    assert [len(part.examples) for part in parts] == [len(part.names) for part in parts]
