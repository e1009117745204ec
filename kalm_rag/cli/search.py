"""The commands that ask: query, rank. Thin; all work is done by the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding

from kalm_rag.checks import check_count, check_cut, check_query
from kalm_rag.cli.opening import Database, Embedder, FetchK, Name, TopN, open_index
from kalm_rag.cli.terminal import (
    DAILY,
    AsJson,
    Model,
    System,
    Task,
    Threshold,
    err,
    errors,
    out,
    print_json,
    shorten,
    shown,
    stages,
    working,
)
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.engine.relevance import Ranked
    from kalm_rag.index.results import Hit, QueryResult

app = typer.Typer()

Full = Annotated[bool, typer.Option("--full", help="Show whole passages, not their beginnings.")]
_BEGINNING = 220
"""Characters of a passage shown without --full."""


@app.command(rich_help_panel=DAILY)
def query(
    text: Annotated[str, typer.Argument(metavar="QUESTION", help="What to search for.")],
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    embedder: Embedder = None,
    system: System = None,
    task: Task = None,
    top_n: TopN = 5,
    fetch_k: FetchK = 50,
    ratio: Annotated[
        int | None, typer.Option(help="Tokens per state, a multiple of the stored ratio.", show_default="as stored")
    ] = None,
    threshold: Threshold = None,
    full: Full = False,
    as_json: AsJson = False,
) -> None:
    """Search by vector, rerank with the decoder, show where each hit came from."""
    with errors():
        check_query(text)
        check_cut(top_n, threshold)
        check_count(fetch_k, "fetch_k")
        with open_index(db, collection, model=model, embedder=embedder, create=False) as index:
            steer = Instructions(system=system, task=task)
            result = index.query(
                text, top_n=None, fetch_k=fetch_k, instructions=steer, ratio=ratio, threshold=threshold
            )
        if as_json:
            print_json(_result_dict(result, top_n))
        else:
            print_result(result, top_n, full=full)


@app.command(rich_help_panel=DAILY)
def rank(
    text: Annotated[str, typer.Argument(metavar="QUESTION", help="What to search for.")],
    passages: Annotated[
        list[str] | None, typer.Argument(metavar="PASSAGE", help="Passages; none reads one per line of stdin.")
    ] = None,
    model: Annotated[str, typer.Option(help="pico, nano, small, large, a repository id or a folder.")] = "pico",
    system: System = None,
    task: Task = None,
    top_n: Annotated[int | None, typer.Option("--top-n", help="Passages to show.", show_default="all")] = None,
    threshold: Threshold = None,
    max_passage_tokens: Annotated[
        int | None, typer.Option(help="Where passages are cut.", show_default="the model's")
    ] = None,
    full: Full = False,
    as_json: AsJson = False,
) -> None:
    """Order passages by relevance, without any database."""
    with errors():
        check_query(text)
        check_cut(top_n, threshold)
        texts = passages if passages else _read_lines()
        with working("loading the model ..."):
            from kalm_rag.engine.reranker import Reranker

            engine = Reranker.from_pretrained(model, max_passage_tokens=max_passage_tokens)
        places: dict[str, list[int]] = {}
        for position, passage in enumerate(texts):
            places.setdefault(passage, []).append(position)
        with engine:
            steer = Instructions(system=system, task=task)
            ranking = engine.rank(text, list(places), top_n=top_n, threshold=threshold, instructions=steer)
        distinct = list(places.items())
        ranked = [(one, *distinct[one.index]) for one in ranking]
        if as_json:
            print_json([asdict(one) | {"index": at[0], "also": at[1:], "text": passage} for one, passage, at in ranked])
        else:
            _print_ranking(ranked, full=full)


def _print_ranking(ranked: Sequence[tuple[Ranked, str, list[int]]], *, full: bool) -> None:
    for place, (one, passage, at) in enumerate(ranked, 1):
        name = f"passage{'s' * (len(at) > 1)} {', '.join(str(position + 1) for position in at)}"
        figures = f"P(yes) {one.probability:.3f}, margin {one.margin:+.2f}"
        out.print(f"[bold]{place}. {name}[/bold]  {figures}", soft_wrap=True)
        _print_passage(passage, full=full)
    if not ranked:
        out.print("no passage reaches the threshold")


def print_result(result: QueryResult, top_n: int, *, full: bool = False) -> None:
    """Show the best hits: equal texts once, with all places they stand in."""
    for place, (hit, *twins) in enumerate(_distinct(result.hits)[:top_n], 1):
        told = "not scored" if hit.probability is None else f"P(yes) {hit.probability:.3f}"
        part = ", read only in part" if hit.truncated else ""
        figures = f"{told}, was {hit.retrieval_rank} {_move(hit.retrieval_rank - place)}{part}"
        out.print(f"[bold]{place}. {shown(_where(hit))}[/bold]  {figures}", soft_wrap=True)
        for twin in twins:
            out.print(f"   also {shown(_where(twin))}", soft_wrap=True)
        _print_passage(hit.text or "", full=full)
    if not result.hits:
        found = result.candidates
        out.print(f"none of {found} candidates reaches the threshold" if found else "the collection holds no record")
    out.print(
        f"[dim]{result.candidates} candidates: {result.from_store} from the store, {result.encoded} encoded now"
        + (f", {result.unscored} unscored" if result.unscored else "")
        + f"; seconds: {stages(result.seconds)}[/dim]",
        soft_wrap=not out.is_terminal,
    )


def _distinct(hits: Sequence[Hit]) -> list[list[Hit]]:
    """Hits of one text together, in the order of the best; hits without text stand alone."""
    groups: dict[tuple[str, bool], list[Hit]] = {}
    for hit in hits:
        groups.setdefault((hit.id, False) if hit.text is None else (hit.text, True), []).append(hit)
    return list(groups.values())


def _result_dict(result: QueryResult, top_n: int) -> dict[str, Any]:
    """The result for JSON: each text once, its other places under ``also``."""
    hits = [
        asdict(hit) | {"also": [{"id": twin.id, "metadata": dict(twin.metadata)} for twin in twins]}
        for hit, *twins in _distinct(result.hits)[:top_n]
    ]
    return result.to_dict() | {"hits": hits}


def _where(hit: Hit) -> str:
    """The record's id, and the document's name where the id does not begin with it."""
    source = str(hit.metadata.get("source", ""))
    return hit.id if hit.id.startswith(source) else f"{source} ({hit.id})"


def _move(places: int) -> str:
    up, down = ("up ", "down ") if out.options.ascii_only else ("↑", "↓")
    return f"[green]{up}{places}[/green]" if places > 0 else f"[red]{down}{-places}[/red]" if places < 0 else "="


def _print_passage(text: str, *, full: bool) -> None:
    text = shown(text if full else shorten(text, _BEGINNING))
    out.print(Padding(text, (0, 0, 0, 3)) if out.is_terminal else f"   {text}", soft_wrap=not out.is_terminal)


def _read_lines() -> list[str]:
    """Passages from stdin; InputError if there are none."""
    if sys.stdin.isatty():
        err.print("Type passages, one per line; end with Ctrl-D (Windows: Ctrl-Z, Enter).")
    texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise InputError(
            "no passages were given; wanted them as arguments or one per line of stdin: "
            "kalm-rag rank QUESTION < passages.txt"
        )
    return texts
