"""Reads TFRecord files and what TensorFlow Datasets leaves on disk, without TensorFlow.

The framing (length, CRC32C of the length, record, CRC32C of the record) is read here because the tfrecord package, which
brings the protocol buffer's definition, passes over both checksums.
"""

import gzip
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dataset import InputError
from data.rl_unplugged import dataset_info

try:
    import crc32c
    from google.protobuf.message import DecodeError
    from tfrecord import example_pb2
except ImportError:
    raise InputError("reading TFRecord files needs two more packages: pip install -e '.[formats]'") from None

LARGEST = 2**31 - 1  # bytes of a record; a protocol buffer has no more


def masked_crc(record: bytes) -> int:
    """TFRecord's checksum: CRC32C, rotated and offset."""
    crc = crc32c.crc32c(record)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def shard_length(path: Path) -> int | None:
    """How many records a file of TensorFlow Datasets has to have; None where dataset_info.json beside it says nothing.

    Raises InputError if dataset_info.json is damaged.
    """
    name = re.search(r"-(?P<split>\w+)\.tfrecord-(?P<shard>\d{5})-of-\d{5}$", path.name)
    try:
        lengths = {split["name"]: split.get("shardLengths") for split in dataset_info(path.parent).get("splits", ())}
        known = name is not None and lengths.get(name["split"])
        return int(known[int(name["shard"])]) if name and known else None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path.parent / 'dataset_info.json'} does not fit {path.name}: {error!r}") from None


def read_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file, compressed by gzip or not.

    Raises InputError, naming file and record, where the file is cut short or a checksum does not match. A cut between two
    records is seen where TensorFlow Datasets has written how many there are.
    """
    index, expected = 0, shard_length(path)
    with path.open("rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if compressed else path.open("rb") as file:
        while True:
            try:
                header = file.read(12)
                if not header:
                    break
                if len(header) < 12 or masked_crc(header[:8]) != struct.unpack("<I", header[8:])[0]:
                    raise InputError(f"{path} is damaged or cut short at record {index}")
                length = struct.unpack("<Q", header[:8])[0]
                if length > LARGEST:
                    raise InputError(f"{path} is damaged at record {index}: it would have {length} bytes")
                record, checksum = file.read(length), file.read(4)
            except (EOFError, OSError, zlib.error) as error:
                raise InputError(f"{path} is damaged or cut short at record {index}: {error}") from None
            if len(record) < length or len(checksum) < 4 or masked_crc(record) != struct.unpack("<I", checksum)[0]:
                raise InputError(f"{path} is damaged or cut short at record {index}")
            yield record
            index += 1
    if expected not in (None, index):
        found = f"it holds {index or 'no'} episodes, but dataset_info.json says {expected}"
        raise InputError(f"{path} is damaged or cut short: {found}")


def read_example(record: bytes, where: str) -> dict[str, Any]:
    """The features of a tf.train.Example: lists of bytes, or arrays of float32 or int64, all flat.

    Raises InputError, naming `where`, if the record is something else.
    """
    try:
        example = example_pb2.Example.FromString(record)
    except DecodeError:
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
        count = int(file.name[-5:])
        for i in range(count):
            shard = file.with_name(f"{file.name[:-15]}-{i:05d}-of-{count:05d}")
            if not shard.is_file():
                raise InputError(f"{shard} is missing, or no file")
    if not files:
        raise InputError(f"{found[0].parent} holds no record files (*.tfrecord-00000-of-00001)")
    return steps, files


def step_arrays(example: dict[str, Any], names: tuple[str, ...], steps: dict[str, Any], where: str) -> dict[str, NDArray]:
    """Features of all the steps of an episode, [L, ...] each: those that are named, is_first, is_last and is_terminal.

    steps: what find_prepared says of them. Raises InputError if one is missing or encoded, or if they are no whole episode.
    """
    arrays = {}
    for name in (*names, "is_first", "is_last", "is_terminal"):
        try:
            tensor = steps[name]["tensor"]
            shape = [int(size) for size in tensor["shape"].get("dimensions", [])]
            if tensor.get("encoding", "none") != "none":
                raise InputError(f"{where}: steps/{name} is encoded as {tensor['encoding']}, which is not read here")
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
