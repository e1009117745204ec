"""What a companion collection holds: its name, its marks, and the records for states and references.

Pure functions over dicts; never calls chromadb. The store over them is `chroma.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import StoreFormatError
from kalm_rag.states import Layout
from kalm_rag.store.rows import Reference, StoredRow

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

SCHEMA_VERSION = 1
BODY_BYTES = 8 << 20
"""Bytes of one call. Servers refuse bodies from 45 MB on (measured), proxies before them often far smaller ones."""

CHECKSUM_KEY = "kalm_checksum"
FIELDS = ("fingerprint", "hidden_size", "ratio", "codec", "state_dtype", "format")
Record = tuple[str, dict[str, "str | int"]]


def companion_name(name: str, fingerprint: str) -> str:
    """Name of the companion collection of a collection (or of all, with "") for one model."""
    return f"{name[:400]}-kalm-states-{fingerprint[:16]}".lstrip("-")  # Chroma takes 512 characters


def write_marks(layout: Layout) -> dict[str, str | int]:
    """Metadata of a new companion collection: what it is, and the layout of its states."""
    fields = dict(zip(FIELDS, layout.fields, strict=True))
    return {"kalm_schema": SCHEMA_VERSION, "kalm_layout": json.dumps(fields), CHECKSUM_KEY: layout.checksum}


def is_companion(metadata: Mapping[str, Any] | None) -> bool:
    """Whether a collection of this metadata holds states, and no records of anybody's."""
    return "kalm_schema" in (metadata if metadata is not None else {})


def read_marks(collection: Collection) -> Layout:
    """Read back what `write_marks` wrote; StoreFormatError if it is no companion, damaged, or of a newer release."""
    marks = collection.metadata if collection.metadata is not None else {}
    version = marks.get("kalm_schema", 0)
    if isinstance(version, int) and version > SCHEMA_VERSION:  # first: a newer layout may not be readable at all
        raise StoreFormatError(
            f"companion collection {collection.name} was written by a newer kalm_rag (schema {version}; this one reads "
            f"up to {SCHEMA_VERSION}). Upgrade kalm_rag."
        )
    try:
        fields = json.loads(marks["kalm_layout"])
        layout = Layout.of([fields[name] for name in FIELDS])
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise StoreFormatError(
            f"collection {collection.name} is not a kalm_rag state store, or is damaged (metadata {marks!r}). Nothing "
            f"was changed. Rename it, or delete it and backfill: states are rebuilt from the texts."
        ) from err
    if marks.get(CHECKSUM_KEY, layout.checksum) != layout.checksum:  # earlier releases write none
        raise StoreFormatError(
            f"companion collection {collection.name} is damaged: its layout doesn't match its checksum (metadata "
            f"{marks!r}). Delete it and backfill: states are rebuilt from the texts."
        )
    return layout


def state_record(row: StoredRow, created: int) -> Record:
    """Record of one passage's states, stored at `created` (unix seconds): id and metadata."""
    text = base64.b64encode(row.payload).decode("ascii")
    fields: dict[str, str | int] = {"kind": "state", "tokens": row.tokens, "found": row.total_tokens, "payload": text}
    return "s:" + row.key, {**fields, "checksum": row.checksum, "created": created}


def read_row(record_id: str, fields: dict[str, Any]) -> StoredRow:
    """Read a state record, trusting nothing: `damage` judges the row."""
    try:
        payload = base64.b64decode(fields.get("payload", ""), validate=True)
    except (binascii.Error, TypeError, ValueError):
        payload = b""  # of no legal length: `damage` reports it
    return StoredRow(
        record_id[2:], fields.get("tokens", 0), fields.get("found", 0), fields.get("checksum", -1), payload
    )


def reference_id(collection_id: str, record_id: str) -> str:
    """Id of a reference's record; ids of callers can be anything, and would clash between collections."""
    return "r:" + hashlib.sha256(f"{collection_id}\0{record_id}".encode()).hexdigest()


def reference_record(own_id: str, reference: Reference, scope: str, created: int) -> Record:
    """Record of one reference: id and metadata. An upsert without a scope leaves the one that is there."""
    fields: dict[str, str | int] = {"kind": "reference", "collection_id": reference.collection_id}
    fields |= {"scope": scope} if scope else {}
    return own_id, {**fields, "record_id": reference.record_id, "key": reference.key, "created": created}


def read_reference(fields: dict[str, Any]) -> Reference:
    """Read a reference record; StoreFormatError if a field is missing."""
    try:
        return Reference(collection_id=fields["collection_id"], record_id=fields["record_id"], key=fields["key"])
    except KeyError as err:
        raise StoreFormatError(f"a reference record lacks {err}: {fields!r}. Delete the companion, backfill.") from err


def of_collection(collection_id: str) -> dict[str, Any]:
    """Filter for the references of one collection."""
    return {"$and": [{"kind": "reference"}, {"collection_id": collection_id}]}


def is_state_id(record_id: str) -> bool:
    """Whether a state's record has an id that a key makes."""
    return len(record_id) == 66 and record_id.startswith("s:") and not record_id[2:].strip("0123456789abcdef")


def is_reference(record_id: str, fields: dict[str, Any]) -> bool:
    """Whether a reference's record is whole: fields of the right kind, under the id that they make."""
    values = [fields.get(name) for name in ("collection_id", "record_id", "key")]
    if not all(isinstance(value, str) for value in values) or not is_state_id(f"s:{values[2]}"):
        return False
    return record_id == reference_id(str(values[0]), str(values[1]))


def batches(records: Iterable[Record], most: int) -> Iterator[list[Record]]:
    """Cut records into calls of at most `most` records and `BODY_BYTES`."""
    batch: list[Record] = []
    size = 0
    for record in records:
        own = sum(len(str(value).encode()) for value in record[1].values()) + 300
        if batch and (len(batch) >= most or size + own > BODY_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += own
    if batch:
        yield batch
