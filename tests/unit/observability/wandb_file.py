"""Reads a .wandb file by its layout: wandb itself no longer ships a reader in Python."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def wandb_records(path: Path, killed: bool = False) -> Iterator[Any]:
    """The records of a .wandb file: 7-byte header, 32 KiB blocks, chunks `<IHB` (crc32, length, type).

    `killed`: its writer was, and the last record may be torn, which is left out then.
    """
    block, chunk_header = 32 * 1024, struct.Struct("<IHB")
    content = path.read_bytes()
    assert struct.unpack("<4sHB", content[:7]) == (b":W&B", 0xBEE1, 0)
    position, pending = 7, b""
    while position < len(content):
        left_in_block = block - position % block
        if left_in_block < chunk_header.size:
            position += left_in_block
            continue
        checksum, length, kind = chunk_header.unpack_from(content, position)
        position += chunk_header.size
        data = content[position : position + length]
        position += length
        if killed and position > len(content):
            return
        assert zlib.crc32(bytes([kind]) + data) == checksum
        pending += data
        if kind in (1, 4):  # whole, or last; 2 is first, 3 is middle
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(pending)
            yield record
            pending = b""
    assert killed or pending == b""


def history(record: Any) -> dict[str, Any]:
    """A history record as metric name -> value; an image's fields stand below "NAME/"."""
    items = record.history.item
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
