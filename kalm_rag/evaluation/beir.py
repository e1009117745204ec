"""Reading collections in BEIR format: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``.

Shared by training and evaluation. Knows no model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kalm_rag.errors import InputError

POOLED = "pooled"

OWN_TASK = "instruction.txt"
"""File in a BEIR folder with the task its queries are meant under (BIRCO's sets have one)."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """One set to measure on."""

    folder: Path  # BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv
    split: str = "test"  # which judgements; queries without a relevant passage are left out
    pooled: bool = False  # rank only the passages that a query's judgements name, instead of what is retrieved

    @classmethod
    def parse(cls, text: str, *, split: str = "test", pooled: bool = False) -> EvalSet:
        """Read ``FOLDER``, ``FOLDER:SPLIT`` or ``FOLDER:SPLIT:pooled``; the arguments are for what it leaves open.

        Raises:
            InputError: If there is more behind the folder than that.

        Example:
            >>> EvalSet.parse("data/selqa:test:pooled").pooled
            True
        """
        folder, *rest = [text] if Path(text).is_dir() else text.split(":")
        if not folder or len(rest) > 2 or rest[1:] not in ([], [POOLED]):
            raise InputError(f"data is {text!r}; wanted FOLDER, FOLDER:SPLIT or FOLDER:SPLIT:{POOLED}.")
        return cls(folder=Path(folder), split=rest[0] if rest and rest[0] else split, pooled=pooled or len(rest) > 1)

    @property
    def name(self) -> str:
        """Folder name and split, for tables."""
        return f"{self.folder.resolve().name} {self.split}" + (f" ({POOLED})" if self.pooled else "")

    @property
    def own_task(self) -> str | None:
        """The task that the folder brings along in ``instruction.txt``, or None."""
        path = Path(self.folder) / OWN_TASK
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Collection:
    """One BEIR folder with the judgements of one split."""

    name: str  # the folder's
    split: str  # of the judgements
    doc_ids: list[str]  # ids of the passages, in file order
    passages: list[str]  # their texts: title, a space, text, stripped
    queries: dict[str, str]  # texts by query id; only queries with a positive judgement, in the order of the judgements
    qrels: dict[str, dict[str, int]]  # grades by passage id of each query id (0 is judged and not relevant)

    def only(self, query_ids: Iterable[str], texts: Mapping[str, str] | None = None) -> Collection:
        """The same passages with some of the queries, in the order given; `texts` replace those of some of them."""
        queries = {query_id: (texts or {}).get(query_id, self.queries[query_id]) for query_id in query_ids}
        return replace(self, queries=queries, qrels={query_id: self.qrels[query_id] for query_id in queries})


def check_collection(folder: Path, split: str) -> None:
    """Refuse what is no BEIR folder or lacks a split, before anything is read or loaded.

    Raises:
        InputError: Naming what is missing; of splits, those found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; wanted a BEIR folder (corpus.jsonl, queries.jsonl, qrels/).")
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not (folder / name).is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "an empty folder"
            raise InputError(f"{folder} has no {name}; found {found}. Wanted a BEIR folder.")
    judgements = folder / "qrels" / f"{split}.tsv"
    if not judgements.is_file():
        splits = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv")))
        raise InputError(f"{folder} has no split {split!r} (qrels/{split}.tsv); found {splits or 'none'}.")


def load_collection(folder: Path, split: str) -> Collection:
    """Read one BEIR folder with the judgements in ``qrels/<split>.tsv``.

    Raises:
        InputError: If the folder, a file in it, or the split is missing (the message lists the splits found), a line
            can't be read, or no judged query is in ``queries.jsonl``.
    """
    check_collection(folder, split)
    folder = Path(folder)
    judgements = folder / "qrels" / f"{split}.tsv"
    doc_ids, passages = [], []
    for row in _rows(folder / "corpus.jsonl"):
        doc_ids.append(str(row["_id"]))
        passages.append(f"{row.get('title') or ''} {row.get('text') or ''}".strip())
    texts = {str(row["_id"]): str(row["text"]) for row in _rows(folder / "queries.jsonl")}
    qrels = _read_qrels(judgements)
    queries = {qid: texts[qid] for qid, grades in qrels.items() if qid in texts and max(grades.values()) > 0}
    if not queries:
        raise InputError(f"{judgements} judges no query of queries.jsonl as relevant; nothing to measure.")
    whole = Collection(name=folder.name, split=split, doc_ids=doc_ids, passages=passages, queries=queries, qrels=qrels)
    return whole.only(queries)


def read_instructions(folder: Path) -> dict[str, tuple[str, str]]:
    """Instruction and query by query id, where a folder has ``instructions.jsonl``; else empty.

    Each line has ``_id``, ``instruction`` and ``query``; the text in ``queries.jsonl`` is then both in one.

    Raises:
        InputError: If a line can't be read.
    """
    path = Path(folder) / "instructions.jsonl"
    if not path.is_file():
        return {}
    rows = _rows(path, "instruction", "query")
    return {str(row["_id"]): (str(row["instruction"]), str(row["query"])) for row in rows}


def _rows(path: Path, *wanted: str) -> Iterator[dict[str, object]]:
    fields = ("_id", *wanted)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                _ = [row[field] for field in fields]
            except (ValueError, KeyError, TypeError) as err:
                raise InputError(
                    f"{path}:{number} is not a JSON object with an {', '.join(fields)}: {line[:60]!r}."
                ) from err
            yield row


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with path.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if number == 1 and row[:1] == ["query-id"]:
                continue
            try:
                query_id, doc_id, score = row
                qrels.setdefault(query_id, {})[doc_id] = int(score)
            except ValueError as err:
                raise InputError(f"{path}:{number} is not 'query-id, corpus-id, score': {row!r}.") from err
    return qrels
