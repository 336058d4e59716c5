"""The page, over real sockets: classes and heat maps, and one sentence for what can't be used."""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
import warnings

import numpy as np
import PIL.Image
import pytest

from vvt_jax.data.image_files import decode
from vvt_jax.data.sources import open_source

uvicorn = pytest.importorskip("uvicorn")
MOST_BYTES = 2**15


class _Page:
    """A running server, and requests to it."""

    def __init__(self, host, port):
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}/"

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def send(self, raw):
        """Bytes as they are, and no end of them; the status and the JSON of the answer."""
        with socket.create_connection((self.host, self.port), timeout=120) as connection:
            connection.sendall(raw)
            with contextlib.closing(http.client.HTTPResponse(connection)) as response:
                response.begin()
                return response.status, json.loads(response.read())


def _serve(app):
    """A server in a thread, and what ends it."""
    from experiments.serving.app import server_config

    config = server_config(
        app,
        header_seconds=1.0,
        most_connections=40,
        host="127.0.0.1",
        port=0,
        log_level="error",
        lifespan="off",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()

    def stop():
        server.should_exit = True
        thread.join()

    return _Page(*address), stop


@pytest.fixture(scope="module")
def page(predictor):
    from experiments.serving.app import create_app

    pixels = PIL.Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        app = create_app(predictor, most_bytes=MOST_BYTES, seconds=2.0)
        page, stop = _serve(app)
        yield page
        stop()
    PIL.Image.MAX_IMAGE_PIXELS = pixels


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def digit():
    example = open_source("digits", "test").examples[0]
    return _png(PIL.Image.fromarray(example["image"][..., 0])), example


def _refusal(page, body, **headers):
    status, given, content = page.request("POST", "/predict", body, **headers)
    assert given["content-type"] == "application/json"
    answer = json.loads(content)
    assert list(answer) == ["error"]
    assert answer["error"].endswith(".")
    assert "0x" not in answer["error"]
    return status, answer["error"]


@pytest.mark.slow
def test_an_image_gets_its_classes_and_a_heat_map(page, predictor, digit):
    from vvt_jax.inference import explain

    content, example = digit
    status, headers, body = page.request("POST", "/predict", content)
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    answer = json.loads(body)
    (prediction,) = predictor(example["image"])
    assert [c["name"] for c in answer["classes"]] == list(prediction.names)
    shares = [c["probability"] for c in answer["classes"]]
    np.testing.assert_allclose(shares, prediction.probabilities, rtol=1e-4)
    kind, _, encoded = answer["heatmap"].partition(",")
    assert kind == "data:image/png;base64"
    with PIL.Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        shown = np.asarray(picture).astype(int)
    expected = explain.overlay(
        predictor.pixels(example["image"])[0], explain.class_maps(predictor, example["image"])[0]
    )
    assert np.abs(shown - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css"])
def test_the_pages_parts_are_there(page, path):
    status, headers, body = page.request("GET", path)
    assert status == 200
    assert body
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["/app.py", "/../app.py", "/..%2f..%2fpyproject.toml", "//etc/passwd", "/page.html", "/%00"],
)
def test_no_path_reaches_the_disk(page, path):
    status, _, body = page.request("GET", path)
    assert (status, json.loads(body)) == (404, {"error": "There is no such page."})


def test_other_methods_are_refused(page):
    for method, path in (("GET", "/predict"), ("PUT", "/predict"), ("POST", "/")):
        status, _, body = page.request(method, path)
        assert status == 405
        assert list(json.loads(body)) == ["error"]


def test_what_is_no_image_is_refused(page, digit):
    content, _ = digit
    other = io.BytesIO()
    PIL.Image.new("RGB", (32, 32)).save(other, "PCX")
    no_image = (400, "This is not an image of a format that is read here.")
    assert _refusal(page, b"no image") == no_image
    assert _refusal(page, other.getvalue()) == no_image
    assert _refusal(page, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == no_image
    status, told = _refusal(page, b"")
    assert status == 400
    assert "no image" in told
    status, told = _refusal(page, content[:80])
    assert status == 400
    assert told.startswith("The image can't be decoded: ")


def test_bombs_are_refused(page):
    many = _png(PIL.Image.new("1", (6_000, 6_000)))
    assert len(many) < MOST_BYTES
    sentence = "The image has more than 34 million pixels: send a smaller one."
    assert _refusal(page, many) == (400, sentence)
    line = _png(PIL.Image.new("1", (200_000, 1)))
    status, told = _refusal(page, line)
    assert status == 400
    assert "too long and narrow" in told


def test_a_large_request_is_refused_whatever_it_says(page):
    sentence = "The image is larger than 0.03125 MB: send a smaller one."
    assert _refusal(page, bytes(MOST_BYTES + 1)) == (413, sentence)
    assert _refusal(page, iter([bytes(5_000)] * 7)) == (413, sentence)  # chunked, without a length
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    # it is refused before the rest comes
    assert page.send(head + bytes(MOST_BYTES + 1)) == (413, {"error": sentence})
    # what goes beyond the length that it says is no part of it
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 8\r\n\r\n"
    status, told = page.send(head + b"no image" + bytes(100))
    assert status == 400
    assert "not an image" in told["error"]


def test_a_request_that_never_ends_is_given_up(page):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc"
    status, told = page.send(head)
    assert status == 408
    assert "too long" in told["error"]


def _closed(connection):
    """Whether the server closes it within three seconds; what it sends before is let pass."""
    connection.settimeout(3)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_headers_that_never_end_are_given_up(page):
    starts = [b"", b"GET", b"POST /predict HTTP/1.1\r\nHost: x\r\n"]
    answered = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        connections = []
        for start in (*starts, answered):
            connection = socket.create_connection((page.host, page.port))
            connections.append(stack.enter_context(connection))
            connection.sendall(start)
        connections[-1].recv(1)
        connections[-1].sendall(b"GET / HT")  # the next request of the same connection
        assert [_closed(connection) for connection in connections] == [True] * 4


def test_connections_are_limited(page):
    with contextlib.ExitStack() as stack:
        for _ in range(39):
            stack.enter_context(socket.create_connection((page.host, page.port)))
        last = stack.enter_context(socket.create_connection((page.host, page.port)))
        more = stack.enter_context(socket.create_connection((page.host, page.port)))
        assert b" 503 " in more.recv(100)
        last.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 200 " in last.recv(100)


def test_idle_uploads_lock_nobody_out(page, digit):
    content, _ = digit
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc"
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            idle = stack.enter_context(socket.create_connection((page.host, page.port)))
            idle.sendall(head)
        assert page.request("POST", "/predict", content)[0] == 200


def test_a_small_image_goes_past_a_large_one(page, digit, monkeypatch):
    content, _ = digit
    large = _png(PIL.Image.new("1", (2_100, 2_100)))
    assert len(large) < MOST_BYTES
    begun, end = threading.Event(), threading.Event()

    def slow_decode(file, *arguments, **options):
        image = decode(file, *arguments, **options)
        if image.width == 2_100:
            begun.set()
            assert end.wait(60)
        return image

    monkeypatch.setattr("experiments.serving.app.decode", slow_decode)
    answers = []
    ask = threading.Thread(
        target=lambda: answers.append(page.request("POST", "/predict", large)[0])
    )
    ask.start()
    try:
        assert begun.wait(60)
        assert page.request("POST", "/predict", content)[0] == 200
        assert not answers
    finally:
        end.set()
        ask.join()
    assert answers == [200]


def test_it_goes_on_after_all_that(page, digit):
    content, example = digit
    status, _, body = page.request("POST", "/predict", content)
    assert status == 200
    assert json.loads(body)["classes"][0]["name"] == str(example["label"])
