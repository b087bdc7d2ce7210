"""What travels between the server, a site and its worker: facts as JSON and named runs of bytes. Never pickle.

Neither torch nor flwr is needed here, so that a site's Flower process, which lives for one message, starts fast.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from flwr.app import RecordDict

_MAGIC = b"federa1\n"
_LIMIT = 2**24  # bytes of JSON


@dataclass(frozen=True)
class Parcel:
    """facts: JSON values. blobs: name -> bytes, each the content of a safetensors file."""

    facts: dict[str, Any]
    blobs: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all blobs, which is what a round's traffic is counted by; the facts are some kilobytes."""
        return sum(len(blob) for blob in self.blobs.values())

    def write(self, stream: BinaryIO) -> None:
        header = json.dumps([self.facts, {name: len(blob) for name, blob in self.blobs.items()}]).encode()
        stream.write(_MAGIC + struct.pack("<Q", len(header)) + header)
        for blob in self.blobs.values():
            stream.write(blob)
        stream.flush()

    @classmethod
    def read(cls, stream: BinaryIO) -> "Parcel":
        """Raises EOFError where the other side has gone and ValueError for anything that `write` does not write."""
        if _exactly(stream, len(_MAGIC)) != _MAGIC:
            raise ValueError("parcel: must begin as federa's do, got other bytes")
        (length,) = struct.unpack("<Q", _exactly(stream, 8))
        if length > _LIMIT:
            raise ValueError(f"parcel: the header must have at most {_LIMIT} bytes, got {length}")
        match _facts(_exactly(stream, length), list):
            case [dict(facts), dict(sizes)] if all(type(size) is int and size >= 0 for size in sizes.values()):
                pass
            case other:
                raise ValueError(f"parcel: must hold facts and sizes, got {str(other)[:80]}")
        return cls(facts, {name: _exactly(stream, size) for name, size in sizes.items()})

    def to_record(self) -> "RecordDict":
        """As the content of a Flower message: Flower cuts arrays into chunks and sends equal chunks once."""
        from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

        arrays = {name: Array("uint8", (len(blob),), "safetensors", blob) for name, blob in self.blobs.items()}
        return RecordDict({"facts": ConfigRecord({"json": json.dumps(self.facts)}), "blobs": ArrayRecord(arrays)})

    @classmethod
    def from_record(cls, record: "RecordDict") -> "Parcel":
        """Raises ValueError for a message that is not federa's."""
        try:
            text = record["facts"]["json"]
            blobs = {name: array.data for name, array in record["blobs"].items()}
        except (KeyError, TypeError, AttributeError):
            raise ValueError("message: must hold federa's records facts and blobs, got others") from None
        if not isinstance(text, str) or len(text) > _LIMIT:
            raise ValueError(f"message: its facts must be JSON of at most {_LIMIT} characters")
        return cls(_facts(text, dict), blobs)


def _facts(text: str | bytes, kind: type) -> Any:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"facts: must be JSON, got {str(error)[:80]}") from None
    if not isinstance(facts, kind):
        raise ValueError(f"facts: must be a {kind.__name__}, got {type(facts).__name__}")
    return facts


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the other side has closed the connection")
    return content
