"""What the tests of faults share: pictures, a run that nothing disturbs, and the counts."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.faults.harness import ROOT, Faulty, lines, saved_state

RESULTS = ROOT / "experiments" / "faults" / "results.json"


@pytest.fixture(scope="session")
def full(request):
    return request.config.getoption("--full")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.passed = report.passed
    return report


@pytest.fixture
def results(full, request):
    """What a test counts, by the name of the fault; the full form keeps it in `RESULTS`, where the
    counts of tests that were run before stand. A test that fails takes its older counts back."""
    counted: dict[str, dict] = {}
    yield counted
    if not full:
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    tests, name = kept.setdefault("tests", {}), request.node.name
    for fault in tests.pop(name, {}).get("faults", ()):
        kept.pop(fault, None)
    tests[name] = {"passed": getattr(request.node, "passed", False), "faults": sorted(counted)}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(kept | counted, indent=2, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of small pictures in two classes; every twentieth to train on has blue in it."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("validation", 8)):
        for index in range(count):
            folder = root / split / ("bright" if index % 2 else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(128, size=(16, 16, 3), dtype=np.uint8) + 127 * (index % 2)
            pixels = pixels.astype(np.uint8)
            pixels[..., 2] = 255 if split == "train" and index % 20 == 7 else 0
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def faulty(images, compilation_cache, full):
    return Faulty(images, compilation_cache, steps=200 if full else 100)


@pytest.fixture(scope="session")
def straight(faulty, tmp_path_factory):
    """A run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("straight")
    done = faulty(workdir)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(workdir)] == list(range(1, faulty.steps + 1))
    assert 0 < lines(workdir)[-1]["train/skipped"] < faulty.steps / 2
    return workdir


@pytest.fixture(scope="session")
def differences(straight, read_metrics):
    """What of a run is not to the bit as in the one that nothing disturbed."""
    arrays = jax.tree.leaves_with_path(saved_state(straight))

    def find(workdir) -> list[str]:
        found = [] if read_metrics(workdir) == read_metrics(straight) else ["metrics.jsonl"]
        for (path, one), other in zip(arrays, jax.tree.leaves(saved_state(workdir)), strict=True):
            if one.dtype != other.dtype or not np.array_equal(one, other):
                found.append(jax.tree_util.keystr(path))
        for name in ("config.json", "model/config.json", "model/model.safetensors"):
            if (workdir / name).read_bytes() != (straight / name).read_bytes():
                found.append(name)
        return found

    return find
