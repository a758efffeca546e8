"""Reads the tensor names and shapes of weight files from their headers: milliseconds for any size. Pure.

The format of safetensors: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, data
offsets), then the data, without a gap. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_HEADER_BYTES = 100_000_000  # limit of the format
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8)
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS |= dict.fromkeys(("I32", "U32", "F32"), 32)
BITS |= dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
LFS_POINTER = b"version https://git-lfs"


class BrokenFile(ValueError):
    """A file that is not valid for its name; the message names it."""


@dataclass(frozen=True)
class TensorHead:
    dtype: str  # "BF16"
    shape: tuple[int, ...]
    file: str


def read_weight_heads(folder: Path) -> dict[str, TensorHead] | None:
    """All tensors of the folder's safetensors files; None for pickled weights, which have no header.

    Raises `BrokenFile`.
    """
    if (folder / SINGLE).is_file():
        return read_heads(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder, INDEX)
    if (folder / PICKLED).is_file():
        _check_pickled(folder / PICKLED)
        return None
    if (folder / PICKLED_INDEX).is_file():
        for name in sorted(set(_weight_map(folder, PICKLED_INDEX).values())):
            _check_pickled(_shard(folder, name, PICKLED_INDEX))
        return None
    loose = sorted(file.name for file in folder.glob("*.safetensors"))
    if loose:
        raise BrokenFile(f"{INDEX} is missing, which says what is in {', '.join(loose[:3])}")
    raise BrokenFile(f"no weights: neither {SINGLE} nor {INDEX}")


def _read_shards(folder: Path, index: str) -> dict[str, TensorHead]:
    places = _weight_map(folder, index)
    heads: dict[str, TensorHead] = {}
    for name in sorted(set(places.values())):
        heads |= read_heads(_shard(folder, name, index))
    absent = [tensor for tensor, file in places.items() if tensor not in heads or heads[tensor].file != file]
    if absent:
        raise BrokenFile(f"{index} promises {absent[0]} in {places[absent[0]]}, which does not hold it")
    return heads


def _shard(folder: Path, name: str, index: str) -> Path:
    if Path(name).name != name:
        raise BrokenFile(f"{index} names the file {name!r}, which is not in the folder itself")
    if not (folder / name).is_file():
        raise BrokenFile(f"{name} is missing, which {index} names")
    return folder / name


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise BrokenFile(f"{index} has no weight_map of tensors and files")
    return places


def read_heads(file: Path) -> dict[str, TensorHead]:
    """The tensors of one safetensors file. Raises `BrokenFile` if it is truncated or not safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            _refuse_pointer(file, start + stream.read(len(LFS_POINTER) - 8))
            if len(start) < 8:
                raise BrokenFile(
                    f"{file.name} has {size} bytes; it is {'empty' if not size else 'cut short'}"
                )
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES:
                raise BrokenFile(f"{file.name} is no safetensors file (a header of {length:,} bytes)")
            if 8 + length > size:
                raise BrokenFile(f"{file.name} is cut short within its header ({size:,} bytes)")
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise BrokenFile(f"{file.name} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{file.name} is no safetensors file (its header is no JSON)") from error
    if not isinstance(header, dict):
        raise BrokenFile(f"{file.name} is no safetensors file (its header is no object)")
    header.pop("__metadata__", None)
    return _checked_heads(file, header, size - 8 - length)


def _checked_heads(file: Path, header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorHead]:
    heads: dict[str, TensorHead] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            bits = BITS[dtype] * math.prod(shape)
            fits = 0 <= begin <= end and all(isinstance(n, int) and n >= 0 for n in shape)
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenFile(
                f"{file.name}: the header's entry of {name} cannot be read: {entry!r:.100}"
            ) from error
        if not fits or 8 * (end - begin) != bits:
            raise BrokenFile(f"{file.name}: {name} is {dtype} {list(shape)} but has {end - begin} bytes")
        heads[name] = TensorHead(dtype, shape, file.name)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise BrokenFile(
                f"{file.name}: its tensors overlap, or leave a gap, at byte {begin:,} of the data"
            )
        position = end
    if position != data_bytes:
        what = "cut short" if position > data_bytes else "longer than its header says"
        raise BrokenFile(f"{file.name} is {what}: {data_bytes:,} bytes of data, {position:,} by its header")
    return heads


def _check_pickled(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    _refuse_pointer(file, start)
    if not start.startswith((b"PK", b"\x80")):
        raise BrokenFile(f"{file.name} is {'empty' if not start else 'no file that torch has saved'}")


def _refuse_pointer(file: Path, start: bytes) -> None:
    if start.startswith(LFS_POINTER[:24]):
        raise BrokenFile(f"{file.name} is a pointer of Git LFS, not the file itself (git lfs pull gets it)")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `BrokenFile` for anything else."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BrokenFile(f"{file.name} cannot be read: {error.strerror}") from error
    _refuse_pointer(file, content)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = "is empty" if not content.strip() else f"is no JSON ({error})"
        raise BrokenFile(f"{file.name} {what}") from error
    if not isinstance(value, dict):
        raise BrokenFile(f"{file.name} holds no object")
    return value
