"""The costs of programs as tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one column per result, and for two results also their ratio."""
    names = [title_of(result) for result in results]
    rows: list[tuple[str, list[Any], Callable[[Any], str]]] = [
        (label, [result.get(key) for result in results], show)
        for label, key, show in _ROWS
        if any(result.get(key) is not None for result in results)
    ]
    lines = [["", *names, *(["ratio"] if len(results) == 2 else [])]]
    for label, values, show in rows:
        cells = ["unknown" if value is None else show(value) for value in values]
        if len(values) == 2:
            numbers = all(isinstance(v, int | float) for v in values) and values[0]
            cells.append(f"{values[1] / values[0]:.3f}" if numbers else "")
        lines.append([label, *cells])
    kinds = sorted({kind for result in results for kind in result["collectives"]})
    for kind in kinds:
        found = [result["collectives"].get(kind) for result in results]
        cells = [f"{c['count']} of {_bytes(c['bytes'])}" if c else "none" for c in found]
        lines.append([f"{kind}s", *cells, *([""] if len(results) == 2 else [])])
    if any(r["chip_bytes"] for r in results):
        fits = [
            "yes" if r["peak_bytes"] <= r["chip_bytes"] else "NO" if r["chip_bytes"] else "unknown"
            for r in results
        ]
        lines.append(["fits its memory", *fits, *([""] if len(results) == 2 else [])])
    return _align(lines)


def report_layers(result: Mapping[str, Any]) -> str:
    """Return a table of the layers of one result."""
    lines = [["layer", "multiply-adds", "done here", "activations"]]
    for layer in result["layers"]:
        counts = (layer["published"], layer["actual"], layer["activations"])
        lines.append([layer["path"], *(f"{n:,}" for n in counts)])
    sums = (sum(x[k] for x in result["layers"]) for k in ("published", "actual", "activations"))
    return _align([*lines, ["sum", *(f"{n:,}" for n in sums)]])


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _billions(count: float) -> str:
    return f"{count / 1e9:.3f} G"


# The label, the key in a result, and how the value is formatted.
_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("device", "device", str),
    ("devices", "devices", str),
    ("forms", "forms", lambda forms: ", ".join(forms.values())),
    ("parameters", "parameters", "{:,}".format),
    ("multiply-adds an image, published convention", "multiply_adds", _billions),
    ("multiply-adds an image, done here", "multiply_adds_actual", _billions),
    ("activations an image", "activations", lambda n: f"{n / 1e6:.2f} M"),
    ("images/s, median", "images_per_second", "{:.2f}".format),
    ("images/s, quartiles", "quartiles", lambda q: f"{q[0]:.2f} to {q[1]:.2f}"),
    ("matrix product, median", "matmul_flops", lambda n: f"{n / 1e9:.0f} GFLOP/s"),
    ("share of the matrix product's rate", "share", "{:.1%}".format),
    ("rounds", "rounds", str),
    ("compile time", "compile_seconds", "{:.1f} s".format),
    ("temporaries a device", "temporary_bytes", _bytes),
    ("arguments a device", "argument_bytes", _bytes),
    ("peak a device", "peak_bytes", _bytes),
    ("memory of the device", "chip_bytes", _bytes),
    ("floating-point operations a device, compiler's estimate", "flops", _billions),
    ("bytes accessed a device, compiler's estimate", "bytes_accessed", _bytes),
)


def _align(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in lines
    ]
    return "\n".join("  ".join(cells) for cells in padded)


def title_of(result: Mapping[str, Any]) -> str:
    setting = result["setting"]
    words = [
        setting["model"],
        f"{setting['height']}x{setting['width']}",
        f"batch {setting['batch']}",
        "train" if setting["train"] else "forward",
        *(f"{name}={value}" for name, value in setting["fields"].items()),
    ]
    return " ".join(words)
