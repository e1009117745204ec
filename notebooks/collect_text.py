"""Free text that anyone can train on: Debian's documentation and package descriptions, as BEIR folders.

Two collections come out: ``debian-docs`` (a heading, and the section under it) and ``debian-packages`` (a package's
one-line description, and its long one), which pico is trained on beside public sets. Run it as

    python notebooks/collect_text.py FOLDER_OF_UNPACKED_PACKAGES --out FOLDER [--descriptions Translation-en] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from kalm_rag.errors import InputError, MissingDependencyError

logger = logging.getLogger(__name__)

LENGTHS = (60, 120, 180)
"""Words that a section is cut to, one of these at random: passages come in all lengths."""

TITLED = 0.35
"""Share of sections that keep their heading: a heading is mostly not to be found in its passage word by word."""

MOST_OF_ONE = 1100
"""Sections taken from one package, so that no manual outweighs the rest."""

_MINOR = re.compile(r"-(dev|doc|dbg|data|common|dbgsym|l10n.*)$|^(lib|golang|node-|ruby-|python3-|r-cran|fonts|task)")
_TRANSLATED = re.compile(r"/[a-z]{2}-[A-Z]{2}/|\.(ar|cs|da|de|el|es|fa|fr|hr|it|ja|ko|nb|nl|pl|pt|ro|ru|sv|tr|vi|zh)\b")

Pair = tuple[str, str, str]
"""A query, and the title and text of the passage that answers it."""


def collect_text(packages: Path, out: Path, *, descriptions: Path | None = None, seed: int = 0) -> list[Path]:
    """Write the collections.

    Args:
        packages: Folder with one folder a package, each the unpacked package (``dpkg -x PACKAGE.deb FOLDER/PACKAGE``).
        out: Where the BEIR folders go; both are written anew.
        descriptions: Debian's ``Translation-en``, as text; None leaves package descriptions out.
        seed: Fixes what is drawn.

    Returns:
        The folders written.

    Raises:
        InputError: If `packages` holds no documentation, or `descriptions` no description.
        MissingDependencyError: If beautifulsoup4 is not installed.
    """
    rng = random.Random(seed)
    written = [_write(out / "debian-docs", _draw_sections(Path(packages), rng))]
    if descriptions is not None:
        text = Path(descriptions).read_text(encoding="utf-8", errors="replace")
        written.append(_write(out / "debian-packages", _draw_descriptions(text, rng)))
    return written


def _draw_descriptions(text: str, rng: random.Random, most: int = 6000) -> list[Pair]:
    """One-line and long descriptions, mostly of packages that people install by name."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for block in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)", block, re.M)
        found = re.search(r"^Description(?:-en)?: (.*)\n((?: .*\n?)*)", block, re.M)
        if name is None or found is None or (_MINOR.search(name[1]) and rng.random() < 0.8):
            continue
        lines = [line for line in found[2].split("\n") if line.strip() != "."]
        short, words = found[1].strip(), " ".join(lines).split()
        if len(words) < 20 or len(short.split()) < 3 or {short, " ".join(words[:12])} & seen:
            continue
        seen |= {short, " ".join(words[:12])}
        pairs.append((short, "", " ".join(words[:200])))
    if not pairs:
        raise InputError("no package description was found; wanted Debian's Translation-en, unpacked to text.")
    rng.shuffle(pairs)
    return pairs[:most]


def _draw_sections(packages: Path, rng: random.Random) -> list[Pair]:
    """Headings and what stands under them, out of HTML and POD files."""
    if not packages.is_dir():
        raise InputError(f"{packages} is not a folder; wanted one with unpacked packages in it.")
    found = (p for p in packages.rglob("*") if p.suffix in (".html", ".pod") and p.is_file())
    files = sorted(p for p in found if not _TRANSLATED.search(str(p)))
    items = [
        (path.relative_to(packages).parts[0], heading, body)
        for path in tqdm(files, desc="documentation", unit="file", mininterval=2.0)
        for heading, body in (_html_sections(path) if path.suffix == ".html" else _pod_sections(path))
    ]
    rng.shuffle(items)
    pairs: list[Pair] = []
    taken: Counter[str] = Counter()
    seen = Counter(heading.lower() for _, heading, _ in items)
    bodies: set[str] = set()
    for package, heading, body in items:
        words = body.split()
        usable = len(words) >= 25 and 2 <= len(heading.split()) <= 25 and seen[heading.lower()] <= 2
        if not usable or body[:60] in bodies or taken[package] >= MOST_OF_ONE:
            continue
        bodies.add(body[:60])
        taken[package] += 1
        title = heading if rng.random() < TITLED else ""
        pairs.append((heading, title, " ".join(words[: rng.choice(LENGTHS)])))
    if not pairs:
        raise InputError(f"{packages} holds no section of .html or .pod documentation to learn from.")
    logger.info("sections by package: %s", dict(taken))
    return pairs


def _html_sections(path: Path) -> Iterator[tuple[str, str]]:
    try:
        from bs4 import BeautifulSoup
    except ImportError as err:
        raise MissingDependencyError(
            "reading HTML needs beautifulsoup4, which is not installed. Install the extra 'files': "
            "pip install 'kalm-rag[files]'."
        ) from err
    soup = BeautifulSoup(path.read_text(encoding="utf-8", errors="replace"), "html.parser")
    for tag in soup(["script", "style", "nav", "pre", "table", "form", "sup"]):
        tag.decompose()
    heading, body = "", list[str]()
    for tag in soup.find_all(["h1", "h2", "h3", "h4", "p", "li", "dt", "dd"]):
        text = " ".join(tag.get_text(" ").split())
        if tag.name.startswith("h"):
            yield heading, " ".join(body)
            heading, body = re.sub(r"[¶#]|^\s*(Chapter )?[\d.]+\s*", "", text).strip(), []
        elif tag.find(["p", "li", "dd"]) is None and len(text.split()) > 3:
            body.append(text)
    yield heading, " ".join(body)


def _pod_sections(path: Path) -> Iterator[tuple[str, str]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    for part in re.split(r"^=head[1-4] ", text, flags=re.M)[1:]:
        heading, _, rest = part.partition("\n")
        lines = [line for line in rest.split("\n") if not line.startswith((" ", "\t", "="))]  # no code, no commands
        yield _plain_pod(heading), _plain_pod(" ".join(lines))


def _plain_pod(text: str) -> str:
    return " ".join(re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", text).split())


def _write(folder: Path, pairs: Sequence[Pair]) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = [{"_id": f"d{i}", "title": title, "text": text} for i, (_, title, text) in enumerate(pairs)]
    queries = [{"_id": f"q{i}", "text": query} for i, (query, _, _) in enumerate(pairs)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(pairs)))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    return folder


def main() -> None:
    """Read the command line and write the collections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("packages", type=Path, help="folder with one folder per package: dpkg -x NAME.deb FOLDER/NAME")
    parser.add_argument("--out", type=Path, required=True, help="where the BEIR folders go")
    parser.add_argument("--descriptions", type=Path, help="Debian's Translation-en, unpacked to text")
    parser.add_argument("--seed", type=int, default=0, help="fixes what is drawn")
    given = parser.parse_args()
    for folder in collect_text(given.packages, given.out, descriptions=given.descriptions, seed=given.seed):
        print(f"wrote {folder}")


if __name__ == "__main__":
    main()
