"""What every store checks of its arguments before anything is read or written."""

from __future__ import annotations

import time
from collections.abc import Iterable

from kalm_rag.checks import check_items
from kalm_rag.errors import InputError, StateMismatchError
from kalm_rag.states import Layout
from kalm_rag.store.base import Reference

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
    """Read keys of any iterable, and refuse what can't be one.

    Raises:
        InputError: If `keys` is one string, or a key is not 64 lower-case hex digits.
    """
    read = check_items(keys, "keys")
    for key in read:
        if not (isinstance(key, str) and len(key) == 64 and not key.strip("0123456789abcdef")):
            raise InputError(f"state key is {key!r}; wanted a sha256 in hex (64 digits). Use passage_key(text).")
    return read


def check_names(names: Iterable[str]) -> list[str]:
    """Read names for `StateStore.discard`, each once.

    Raises:
        InputError: If one is neither a key nor what `StateStore.verify` gives.
    """
    read = check_items(names, "names")
    check_keys(n for n in read if not (isinstance(n, str) and (n == DAMAGED_INDEX or is_row_name(n))))
    return list(dict.fromkeys(read))


def check_ids(ids: Iterable[str], what: str = "ids") -> list[str]:
    """Read collection or record ids of any iterable, each once, and refuse those that no store can write.

    Args:
        ids: The ids.
        what: The caller's argument, in the plural, as the message names it.

    Raises:
        InputError: If `ids` is one string, or an id is not text (a UUID, say) or holds lone surrogates.
    """
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
    """Refuse what is no span of time.

    Raises:
        InputError: If it is negative, no number, or not below `MOST_SECONDS`.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < MOST_SECONDS:
        raise InputError(f"{name} is {seconds!r}; wanted seconds, 0 or more and below {MOST_SECONDS}.")


def check_put(references: Iterable[Reference], scope: str, wait: float | None) -> list[Reference]:
    """Read references of any iterable, and refuse arguments of `StateStore.put_many` that can't be stored or meant.

    Raises:
        InputError: Naming the id, key, scope or wait.
    """
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
    """Read the arguments of `StateStore.gc`.

    Returns:
        Live collections (None: no references go), scopes, and the unix seconds up to which what was written may go.

    Raises:
        InputError: If ids or scopes are one string or hold what is no text (a UUID), or `younger_than` is negative or
            no number.
    """
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
    """Refuse to open a namespace under another layout than the one it was made with.

    Raises:
        StateMismatchError: Showing both, and what to do.
    """
    if stored != wanted:
        raise StateMismatchError(
            f"{where} holds states of model {stored.fingerprint} as {_describe(stored)}; asked for "
            f"{_describe(wanted)}. Open it with what is stored (stored_layout tells), or index again in another folder."
        )


def _describe(layout: Layout) -> str:
    kept = " with token ids" if layout.keeps_token_ids else ""
    return f"ratio {layout.ratio}, codec {layout.codec.value}, width {layout.hidden_size}, {layout.state_dtype}{kept}"
