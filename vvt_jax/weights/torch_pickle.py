"""The pickles in .pth files, read without being executed."""

import dataclasses
import math
import os
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from vvt_jax.weights.checks import WeightsError
from vvt_jax.weights.torch_zip import ZIP_ERRORS, open_zip, shown

_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_ORDERED_DICT = "collections.OrderedDict"
_NAMESPACE = "argparse.Namespace"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_KNOWN = {_ORDERED_DICT, _NAMESPACE, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in _DTYPES)}
_MOST_WORK = 2**19  # operations of a pickle plus elements that they copy; vvt_large's has 2**17
_MOST_AXES, _LONGEST_AXIS = 8, 2**31
_LONGEST_KEY = 64  # characters of a storage's key; PyTorch's keys are consecutive numbers


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor whose data has not been read yet.

    Attributes:
        shape: the shape as in PyTorch.
        read: a function that reads and returns the array, in the dtype of the file.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Name:
    """The name of a class or function, which is never looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    entry: str
    length: int


class _Mark:
    pass


class PickleReader:
    """An interpreter of the pickle operations that torch.save writes, limited to plain values."""

    def __init__(
        self,
        path: str | os.PathLike,
        folder: str,
        sizes: Mapping[str, int],
        byte_order: Literal["<", ">"],
    ):
        self._path, self._folder, self._sizes = path, folder, sizes
        self._byte_order = byte_order
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._work = 0

    def run(self, program: bytes) -> Any:
        try:
            for operation, argument, _ in pickletools.genops(program):
                self._count_work(1)
                if operation.name != "STOP":  # always the last operation
                    self._step(operation.name, argument)
            (result,) = self._stack
            return result
        except WeightsError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise WeightsError(f"{self._path} is damaged: its pickle makes no sense.") from error

    def _count_work(self, elements: int) -> None:
        """Stop a program that repeats long values, since a few bytes of it could run for hours."""
        self._work += elements
        if self._work > _MOST_WORK:
            raise WeightsError(f"{self._path} is not a checkpoint: its pickle is far too long.")

    def _refuse(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self._path} is refused, since it holds more than weights, numbers and texts "
            f"({what}); in PyTorch, save the state dict alone."
        )

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_Mark)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "APPEND":
                value = stack.pop()
                self._top(list).append(value)
            case "APPENDS":
                values = self._pop_to_mark()
                self._top(list).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                if f"{module}.{attribute}" not in _KNOWN:
                    raise self._refuse(f"it names {module}.{attribute}"[:100])
                stack.append(_Name(f"{module}.{attribute}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                stack.append(self._make(made, arguments))
            case "BUILD":  # for an OrderedDict, it sets the modules' versions, which are not needed
                state = stack.pop()
                if isinstance(stack[-1], _Namespace):
                    if not isinstance(state, dict):  # its keys were checked in _set_items
                        raise TypeError
                    self._count_work(len(state))
                    stack[-1].update(state)
                else:
                    self._top(dict)
            case _:
                raise self._refuse(f"it has the operation {name}")

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TypeError
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self._stack.pop()) is not _Mark:
            values.append(value)
        return values[::-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            target[key] = value

    def _storage(self, reference: Any) -> _Storage:
        kind, name, key, _, length = reference
        if kind != "storage" or not isinstance(name, _Name) or not _is_count(length):
            raise ValueError
        # A short string only: formatting nested tuples could take forever
        if not isinstance(key, str) or len(key) > _LONGEST_KEY:
            raise ValueError
        dtype = np.dtype(_DTYPES[name.name.removeprefix("torch.")])
        entry = f"{self._folder}data/{key}"
        if self._sizes.get(entry) != length * dtype.itemsize:
            raise WeightsError(
                f"{self._path} is damaged: it says that {shown(entry)} has "
                f"{length * dtype.itemsize} bytes, and it has {self._sizes.get(entry, 'none')}."
            )
        return _Storage(dtype, entry, length)

    def _make(self, made: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise TypeError
        match made:
            case _Name(name=name) if name == _ORDERED_DICT and not arguments:
                return {}
            case _Name(name=name) if name == _ORDERED_DICT:
                (pairs,) = arguments
                self._count_work(len(pairs))
                return dict(_pairs(pairs))
            case _Name(name=name) if name == _NAMESPACE and not arguments:
                return _Namespace()
            case _Name(name=name) if name == _TENSOR:
                return self._tensor(*arguments[:4])
            case _Name(name=name) if name == _PARAMETER and isinstance(arguments[0], Tensor):
                return arguments[0]
        raise self._refuse("it calls something")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        if not isinstance(storage, _Storage) or not len(shape) == len(strides) <= _MOST_AXES:
            raise ValueError
        # Copies: the pickle may have other references, and change the lists after the checks
        shape, strides = tuple(shape), tuple(strides)
        if not all(map(_is_count, (offset, *shape, *strides))) or max(shape, default=0) > (
            _LONGEST_AXIS
        ):
            raise ValueError
        if not math.prod(shape):
            # NumPy can't create such an empty array
            if math.prod(n or 1 for n in shape) > _LONGEST_AXIS:
                raise ValueError
            return Tensor(shape, lambda: np.empty(shape, storage.dtype))
        # The stride of an axis with one element is never used, so it may have any value
        strides = tuple(step if n > 1 else 0 for n, step in zip(shape, strides, strict=True))
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # A shape with more elements than the storage would repeat some of them
        if last >= storage.length or math.prod(shape) > storage.length:
            raise WeightsError(f"{self._path} is damaged: a tensor reaches beyond its bytes.")
        return Tensor(shape, lambda: self._read(storage, offset, shape, strides))

    def _read(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> np.ndarray:
        try:
            with open_zip(self._path) as archive:
                content = archive.read(storage.entry)  # also verifies the checksum
        except ZIP_ERRORS as error:
            reason = shown(str(error).rstrip(".")) or type(error).__name__
            raise WeightsError(f"{self._path} is damaged: {reason}.") from error
        # Don't rely on the zip directory: as_strided would read memory beyond the array
        size = storage.dtype.itemsize
        if len(content) != storage.length * size:
            raise WeightsError(
                f"{self._path} is damaged: {shown(storage.entry)} has {len(content)} bytes, and "
                f"it should have {storage.length * size}."
            )
        flat = np.frombuffer(content, storage.dtype.newbyteorder(self._byte_order))
        steps = [step * size for step in strides]
        view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
        # A view of a small part would keep the whole storage in memory
        return view if view.size == flat.size else np.array(view)


class _Namespace(dict):
    """The attributes of an `argparse.Namespace`."""


def _pairs(pairs: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in pairs:
        _check_key(key)
        yield key, value


def _check_key(key: Any) -> None:
    """Refuse keys that are not plain, or are long numbers.

    Hashing nested tuples could take forever, and long numbers can be chosen to have equal hashes.
    """
    if not isinstance(key, str | int | float | None):
        raise TypeError
    if isinstance(key, int) and abs(key) >= 2**60:
        raise ValueError


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
