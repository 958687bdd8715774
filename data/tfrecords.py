"""Reads TFRecord files and what TensorFlow Datasets leaves on disk, without TensorFlow.

The framing (length, CRC32C of the length, record, CRC32C of the record) is read here because the tfrecord package, which
brings the protocol buffer's definition, passes over both checksums.
"""

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dataset import InputError, optional


def masked_crc(record: bytes) -> int:
    """TFRecord's checksum: CRC32C, rotated and offset."""
    (crc32c,) = optional("crc32c")
    crc = crc32c.crc32c(record)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file, compressed by gzip or not.

    Raises InputError, naming file and record, where the file is cut short or a checksum does not match, and for a file
    without records.
    """
    index = 0
    with path.open("rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if compressed else path.open("rb") as file:
        while True:
            try:
                header = file.read(12)
                if not header:
                    break
                if len(header) < 12 or masked_crc(header[:8]) != struct.unpack("<I", header[8:])[0]:
                    raise EOFError("its length is wrong")
                length = struct.unpack("<Q", header[:8])[0]
                record, checksum = file.read(length), file.read(4)
                if len(checksum) < 4 or masked_crc(record) != struct.unpack("<I", checksum)[0]:
                    raise EOFError("its checksum is wrong")
            except (EOFError, OSError, zlib.error) as error:
                raise InputError(f"{path} is damaged or cut short at record {index}: {error}") from None
            yield record
            index += 1
    if index == 0:
        raise InputError(f"{path} is damaged or cut short: it holds no episode")


def read_example(record: bytes, where: str) -> dict[str, Any]:
    """The features of a tf.train.Example: lists of bytes, or arrays of float32 or int64, all flat.

    Raises InputError, naming `where`, if the record is something else.
    """
    messages, example_pb2 = optional("google.protobuf.message", "tfrecord.example_pb2")
    try:
        example = example_pb2.Example.FromString(record)
    except messages.DecodeError:
        raise InputError(f"{where}: the record is not a tf.train.Example") from None
    features: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            features[name] = list(feature.bytes_list.value)
        elif kind == "float_list":
            features[name] = np.array(feature.float_list.value, np.float32)
        else:
            features[name] = np.array(feature.int64_list.value, np.int64)
    return features


def dataset_info(folder: Path) -> dict[str, Any]:
    """What TensorFlow Datasets says of a folder of its own; empty for others. Raises InputError if it is damaged."""
    try:
        return dict(json.loads((folder / "dataset_info.json").read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / 'dataset_info.json'} is damaged: {error}") from None


def find_prepared(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The features of `steps` and the record files, in order, of a dataset that TensorFlow Datasets prepared.

    folder: the one that holds features.json, or one above it that holds a single such dataset. Raises InputError if
    there is none, several, or if files of it are missing.
    """
    found = sorted(folder.rglob("features.json")) if folder.is_dir() else []
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(found)} datasets of TensorFlow Datasets (features.json), not one")
    try:
        features = json.loads(found[0].read_text())["featuresDict"]["features"]
        steps = features["steps"]["sequence"]["feature"]["featuresDict"]["features"]
        steps = {name: dict(feature) for name, feature in steps.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{found[0]} does not describe episodes of steps (RLDS): {error!r}") from None
    files = sorted(found[0].parent.glob("*.tfrecord-?????-of-?????"))
    for file in files:
        for i in range(int(file.name[-5:])):
            if not (shard := file.with_name(f"{file.name[:-14]}{i:05d}{file.name[-9:]}")).is_file():
                raise InputError(f"{shard} is missing, or no file")
    if not files:
        raise InputError(f"{found[0].parent} holds no record files (*.tfrecord-00000-of-00001)")
    return steps, files


def step_arrays(example: dict[str, Any], names: tuple[str, ...], steps: dict[str, Any], where: str) -> dict[str, NDArray]:
    """Features of all the steps of an episode, [L, ...] each: those that are named, is_first, is_last and is_terminal.

    steps: what find_prepared says of them. Raises InputError if one is not as it says, or if they are no whole episode.
    """
    arrays = {}
    for name in (*names, "is_first", "is_last", "is_terminal"):
        try:
            tensor = steps[name]["tensor"]
            shape = [int(size) for size in tensor["shape"].get("dimensions", [])]
            stored = np.asarray(example[f"steps/{name}"]).reshape(-1, *shape)
            arrays[name] = stored.astype(np.dtype(tensor["dtype"]))
            if not np.array_equal(arrays[name], stored, equal_nan=True):
                raise ValueError(f"it is no {tensor['dtype']}")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: steps/{name} is missing, or not as features.json says: {error}") from None
    last = len(arrays["is_last"]) - 1
    flags = [np.flatnonzero(arrays[name]).tolist() for name in ("is_first", "is_last")]
    if flags != [[0], [last]] or any(len(array) != last + 1 for array in arrays.values()):
        raise InputError(f"{where}: is_first and is_last do not mark one whole episode")
    return arrays
