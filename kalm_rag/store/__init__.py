"""Where encoded passages are kept, and how a store is found from what the caller has."""

from __future__ import annotations

from kalm_rag.store.base import GRACE_SECONDS, GcReport, StateStore, StoreStats
from kalm_rag.store.opening import FILE_NAME, collection_layouts, open_store, stored_layout, sweep_folder
from kalm_rag.store.rows import Fetched, Reference

__all__ = [
    "FILE_NAME",
    "GRACE_SECONDS",
    "Fetched",
    "GcReport",
    "Reference",
    "StateStore",
    "StoreStats",
    "collection_layouts",
    "open_store",
    "stored_layout",
    "sweep_folder",
]
