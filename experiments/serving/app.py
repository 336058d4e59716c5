"""A page where a user drops an image and sees its classes and where the model sees them.

    pip install -e '.[serve]'
    python -m experiments.serving.app --model=experiments/weights/digits

`POST /predict` takes the bytes of an image (see `vvt_jax.data.image_files`) and answers with JSON:
`{"classes": [{"name": ..., "probability": ...}, ...], "heatmap": "data:image/png;base64,..."}`, or
`{"error": "One sentence."}` with a status of 400 and more. An image stays in memory: nothing of a
request is written to a disk, and no path of one is looked up there.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vvt_jax.data.image_files import FORMATS, decode
from vvt_jax.inference import explain
from vvt_jax.inference.predictor import Predictor
from vvt_jax.system.errors import UserError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    sys.exit("error: The page needs starlette and uvicorn: pip install 'vvt_jax[serve]'.")

HERE = Path(__file__).parent
MOST_BYTES = 8 * 2**20  # of a request
MOST_PIXELS = 2**25  # of an image once decoded, 100 MB
LARGE_PIXELS = 2**22  # an image of more is decoded while no other large one is, in seconds
SECONDS = 30.0  # for the body of a request to arrive
IDLE_SECONDS = 5.0  # without a byte of it; also for the headers of a request to arrive
MOST_WAITING = {False: 16, True: 4}  # small and large images that have arrived
MOST_BUFFERED = 2**27  # bytes of images that are arriving
MOST_CONNECTIONS = 256
CLASSES = 5
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data: blob:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_BUSY = "Too many images are waiting: try again in a moment."
_PAGES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def create_app(
    predictor: Predictor,
    *,
    most_bytes: int = MOST_BYTES,
    seconds: float = SECONDS,
    idle_seconds: float = IDLE_SECONDS,
) -> Starlette:
    """The application, for any ASGI server; its process refuses images of over `MOST_PIXELS`.

    The server has to limit its connections and how long headers may take, as `server_config` does.

    Args:
        predictor: with a classifier; `batch_size=1` answers soonest.
        most_bytes: of a request's body.
        seconds: that a body may take to arrive.
        idle_seconds: that may pass without any byte of it.
    """
    predictor.check_classifier()
    explain.check_matplotlib()
    PIL.Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # Pillow warns from there on
    warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
    class_map = explain.class_map_of(explain.default_stage(predictor))
    predictor.run(class_map, np.zeros((1, *predictor.size, 3), np.uint8))  # compiled before it asks
    turn = asyncio.Lock()  # one image at a time: each already uses all cores
    large = asyncio.Lock()  # so that small images go past a large one that is being decoded
    waiting = {False: 0, True: 0}  # small and large images
    buffered = 0

    def read_pixels(body: bytes) -> np.ndarray:
        return predictor.pixels(decode(io.BytesIO(body), "The image", upright=True))

    def answer(pixels: np.ndarray) -> dict[str, Any]:
        logits, maps = predictor.run(class_map, pixels)
        prediction = predictor.describe(logits[0], CLASSES)
        picture = io.BytesIO()
        explain.overlay(pixels[0], maps[0]).save(picture, "PNG")
        encoded = base64.b64encode(picture.getvalue()).decode()
        pairs = zip(prediction.names, prediction.probabilities, strict=True)
        return {
            "classes": [{"name": name, "probability": share} for name, share in pairs],
            "heatmap": f"data:image/png;base64,{encoded}",
        }

    async def predict(request: Request) -> Response:
        body = await receive(request)
        is_large = await run_in_threadpool(_is_large, body)
        # Only now, so that uploads that never end lock nobody out
        if waiting[is_large] >= MOST_WAITING[is_large]:
            raise HTTPException(503, _BUSY)
        waiting[is_large] += 1
        try:
            async with large if is_large else contextlib.nullcontext():
                pixels = await run_in_threadpool(read_pixels, body)
            async with turn:
                return JSONResponse(await run_in_threadpool(answer, pixels), headers=_HEADERS)
        except ValueError as error:  # what it is about an image that can't be used
            raise HTTPException(400, _sentence(error)) from error
        finally:
            waiting[is_large] -= 1

    async def receive(request: Request) -> bytes:
        """The body; refused as soon as it is too long, whatever its header says."""
        nonlocal buffered
        body = bytearray()
        chunks = request.stream()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    async with asyncio.timeout(min(seconds, idle_seconds)):
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    body += chunk
                    buffered += len(chunk)
                    if len(body) > most_bytes:
                        raise HTTPException(
                            413,
                            f"The image is larger than {most_bytes / 2**20:g} MB: send a smaller "
                            "one.",
                        )
                    if buffered > MOST_BUFFERED:
                        raise HTTPException(503, _BUSY)
        except TimeoutError as error:
            raise HTTPException(408, "The image took too long to arrive.") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The image did not arrive whole.") from error
        finally:
            buffered -= len(body)
        if not body:
            raise HTTPException(400, "There is no image in the request.")
        return bytes(body)

    routes = [Route("/predict", predict, methods=["POST"])]
    for path, name in _PAGES.items():
        routes.append(Route(path, _page(HERE / name)))
    handlers: dict[Any, Any] = {HTTPException: _refuse, Exception: _apologise}
    return Starlette(routes=routes, exception_handlers=handlers)


class _LimitedProtocol(H11Protocol):
    """uvicorn's protocol, which closes a connection whose headers take too long to arrive, and
    answers only so many connections at once."""

    header_seconds = IDLE_SECONDS
    most_connections = MOST_CONNECTIONS
    _refused = False
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        if len(self.connections) >= self.most_connections:
            self._refused, self.transport = True, transport
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n")
            transport.close()
            return
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        if not self._refused:
            super().connection_lost(exc)

    def _set_deadline(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._clear_deadline()  # all headers are there
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def server_config(
    app: Starlette,
    *,
    header_seconds: float = IDLE_SECONDS,
    most_connections: int = MOST_CONNECTIONS,
    **options: Any,
) -> uvicorn.Config:
    """uvicorn's configuration, with limits for connections.

    Args:
        app: the application.
        header_seconds: that the headers of a request may take to arrive.
        most_connections: that are open at once.
        **options: uvicorn's own.
    """
    limits = {"header_seconds": header_seconds, "most_connections": most_connections}
    protocol = type("LimitedProtocol", (_LimitedProtocol,), limits)
    return uvicorn.Config(app, http=protocol, **options)


def _is_large(body: bytes) -> bool:
    """By the image's header; what has none is refused soon."""
    try:
        with PIL.Image.open(io.BytesIO(body), formats=FORMATS) as image:
            return image.width * image.height > LARGE_PIXELS
    except Exception:  # Pillow's decoders raise whatever they stumble over
        return False


def _sentence(error: ValueError) -> str:
    cause = error.__cause__
    if isinstance(cause, PIL.UnidentifiedImageError):  # its text tells an address in memory
        return "This is not an image of a format that is read here."
    if isinstance(cause, PIL.Image.DecompressionBombWarning | PIL.Image.DecompressionBombError):
        return (
            f"The image has more than {MOST_PIXELS / 1e6:.0f} million pixels: send a smaller one."
        )
    return str(error)


def _page(path: Path) -> Any:
    content, kind = path.read_bytes(), _KINDS[path.suffix]

    async def page(_: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return page


async def _refuse(_: Request, error: HTTPException) -> Response:
    told = {404: "There is no such page.", 405: "This page is not asked for in that way."}
    sentence = told.get(error.status_code, error.detail)
    headers = {**_HEADERS, **(error.headers or {})}
    if error.status_code in (408, 413, 503):
        headers["Connection"] = "close"  # the rest of the body is not wanted
    return JSONResponse({"error": sentence}, error.status_code, headers)


async def _apologise(_: Request, error: Exception) -> Response:
    del error  # the server logs it
    return JSONResponse({"error": "Something went wrong here; it is logged."}, 500, _HEADERS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.serving.app",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model folder, or published weights")
    parser.add_argument("--name", help="of the model, for weights that don't say it")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free")
    options = parser.parse_args(arguments)
    try:
        app = create_app(Predictor(options.model, options.name, batch_size=1))
    except UserError as error:
        sys.exit(f"error: {error}")
    uvicorn.Server(server_config(app, host=options.host, port=options.port)).run()


if __name__ == "__main__":
    main()
