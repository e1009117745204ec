"""What every store checks of its arguments before anything is read or written; raises InputError by name."""

from __future__ import annotations

import time
from collections.abc import Iterable

from kalm_rag.checks import check_items
from kalm_rag.errors import InputError, StateMismatchError
from kalm_rag.states import Layout
from kalm_rag.store.rows import Reference

MOST_SECONDS = 2**21
"""Bound on waits and ages (24 days): SQLite counts milliseconds in 32 bits."""

DAMAGED_ROW = "row:"
"""How `StateStore.verify` names a row whose key can't be trusted; a number or record id follows."""

DAMAGED_INDEX = "index"
"""How `StateStore.verify` names references, or a store's own index, that disagree with what they are about."""


def is_row_name(name: str) -> bool:
    """Whether a name of `StateStore.verify` is that of a row, not a key."""
    return name.startswith(DAMAGED_ROW)


def check_keys(keys: Iterable[str]) -> list[str]:
    """Read keys of any iterable; each must be 64 lower-case hex digits."""
    read = check_items(keys, "keys")
    for key in read:
        if not (isinstance(key, str) and len(key) == 64 and not key.strip("0123456789abcdef")):
            raise InputError(f"state key is {key!r}; wanted a sha256 in hex (64 digits). Use passage_key(text).")
    return read


def check_names(names: Iterable[str]) -> list[str]:
    """Read names for `StateStore.discard`, each once: keys, and what `StateStore.verify` gives."""
    read = check_items(names, "names")
    check_keys(n for n in read if not (isinstance(n, str) and (n == DAMAGED_INDEX or is_row_name(n))))
    return list(dict.fromkeys(read))


def check_ids(ids: Iterable[str], what: str = "ids") -> list[str]:
    """Read ids of any iterable, each once; what is no text (a UUID, say) or no valid Unicode can't be written."""
    read = check_items(ids, what)
    one = what.removesuffix("s")
    for value in read:
        if not isinstance(value, str):
            raise InputError(f"{one} is {value!r}; wanted text. Use str(collection.id) for Chroma's.")
        try:
            value.encode()
        except UnicodeEncodeError as err:
            raise InputError(
                f"{one} {value!r} is not valid Unicode (lone surrogate). Repair it before storing."
            ) from err
    return list(dict.fromkeys(read))


def check_seconds(seconds: object, name: str) -> None:
    """Refuse what is no span of time below `MOST_SECONDS`."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < MOST_SECONDS:
        raise InputError(f"{name} is {seconds!r}; wanted seconds, 0 or more and below {MOST_SECONDS}.")


def check_put(references: Iterable[Reference], scope: str, wait: float | None) -> list[Reference]:
    """Read references of any iterable, and check what else `StateStore.put_many` takes."""
    read = check_items(references, "references", "a list of Reference")
    for reference in read:
        if not isinstance(reference, Reference):
            raise InputError(f"references holds a {type(reference).__name__}; wanted Reference(...).")
        check_ids((reference.collection_id, reference.record_id))
        check_keys([reference.key])
    check_ids([scope], "scope")
    if wait is not None:
        check_seconds(wait, "wait")
    return read


def check_sweep(
    live_collections: Iterable[str] | None, scopes: Iterable[str], younger_than: float
) -> tuple[set[str] | None, set[str], float]:
    """Read the arguments of `StateStore.gc`; the last becomes the unix seconds up to which what was written may go."""
    check_seconds(younger_than, "younger_than")
    live = None if live_collections is None else set(check_ids(live_collections, "live_collections"))
    before = time.time() - younger_than if younger_than else 2.0**53  # 0: also what a clock that is ahead wrote
    return live, set(check_ids(scopes, "scopes")), before


def check_store(store: object) -> None:
    """Refuse what holds no states.

    Raises:
        InputError: If it is neither None nor a `StateStore`.
    """
    if store is not None and not (callable(getattr(store, "get_many", None)) and hasattr(store, "layout")):
        raise InputError(f"store is {type(store).__name__}; wanted a StateStore, as open_store(...) gives, or None.")


def check_same_layout(stored: Layout, wanted: Layout, where: str) -> None:
    """Refuse to open a namespace under another layout than the one it was made with (StateMismatchError)."""
    if stored != wanted:
        raise StateMismatchError(
            f"{where} holds states of model {stored.fingerprint} as {_describe(stored)}; asked for "
            f"{_describe(wanted)}. Open it with what is stored (stored_layout tells), or index again in another folder."
        )


def _describe(layout: Layout) -> str:
    kept = " with token ids" if layout.keeps_token_ids else ""
    return f"ratio {layout.ratio}, codec {layout.codec.value}, width {layout.hidden_size}, {layout.state_dtype}{kept}"
