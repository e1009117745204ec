"""The page at ``/``: in a real Chromium where there is one, driven as people do, and what it is allowed to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import httpx
import pytest
from serving import IDS, PLAIN, QUERY, TEXTS, running

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.serve.door import Door

PAGE = files("kalm_rag.serve").joinpath("page.html").read_text(encoding="utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = {
    "<script>window.hacked = 1</script>": "France <script>window.hacked = 2</script> has a capital.</style>",
    "\"'><img src=x onerror=window.hacked=3>": "\"'><img src=x onerror=window.hacked=4> France's capital? ${alert(1)}",
    "astral": "🥐🥖🧀 Croissants come from Vienna. Paris is a city in France, and its capital. 🥐 " * 4,
}


# Without a browser


def test_the_page_is_held_to_itself(url: str) -> None:
    """It fetches nothing from elsewhere, and the policy lets nothing but its own script run."""
    answer = PLAIN.get(f"{url}/")
    assert (answer.status_code, answer.text) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert not {"'unsafe-inline'", "'unsafe-eval'"} & {word for told in policy.values() for word in told.split()}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert set(re.findall(r"https?://[^\"' ]*", PAGE)) == {"http://www.w3.org/2000/svg"}, "a name, and no address"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage|sessionStorage", PAGE)


def test_explaining_is_that_of_the_engine(client: httpx.Client, pico: Reranker) -> None:
    documents = [{"id": "paris"}, TEXTS[3]]
    answer = client.post("/v1/explain", json={"query": QUERY, "instruction": "Find the city.", "documents": documents})
    assert answer.status_code == 200, answer.text
    for one, text in zip(answer.json()["results"], (TEXTS[1], TEXTS[3]), strict=True):
        told = pico.explain(QUERY, text, instructions="Find the city.")
        assert (one["text"], one["probability"]) == (text, pytest.approx(told.probability))
        assert [(span["start"], span["end"]) for span in one["spans"]] == [
            (span.start, span.end) for span in told.spans
        ]
        assert [span["weight"] for span in one["spans"]] == [pytest.approx(span.weight) for span in told.spans]
    many = client.post("/v1/explain", json={"query": QUERY, "documents": ["text"] * 21})
    assert (many.status_code, many.json()["field"]) == (422, "documents")
    unknown = client.post("/v1/explain", json={"query": QUERY, "documents": [{"id": "nobody"}]})
    assert (unknown.status_code, unknown.json()["field"]) == (422, "documents[0]")


# In Chromium


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, pico: Reranker) -> Iterator[ChromaIndex]:
    opened = ChromaIndex.open(tmp_path_factory.mktemp("page") / "db", model=pico)
    opened.add([*IDS, *HOSTILE], [*TEXTS, *HOSTILE.values()])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright (extra 'test')")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has none
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def origin(index: ChromaIndex) -> Iterator[str]:
    with running(Door(index)) as address:
        yield address


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens the page of a server; whatever it then asks for, complains of or runs that it should not is an error."""
    contexts: list[Any] = []
    seen: list[str] = []
    wrong: list[str] = []

    def opened(address: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(f"{address}/")
        page.address = address
        return page

    yield opened
    hosts = {re.match(r"[a-z]+://[^/]*|data:", one)[0] for one in seen}
    assert hosts - {"data:"} == {context.pages[0].address for context in contexts}
    assert [line for line in wrong if not re.search("status of 4(01|04|22)", line)] == []
    for context in contexts:
        assert context.cookies() == []
        context.close()


def ask(page: Any, question: str = QUERY) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()
    settled(page)


def settled(page: Any) -> None:
    """Until ranked and explained."""
    page.locator("#ask:not([aria-busy])").wait_for()
    page.locator("#board li").first.wait_for()


def order(page: Any, column: str) -> list[str]:
    return page.get_by_role("region", name=column, exact=True).locator(".id").all_text_contents()


def texts(page: Any, column: str) -> list[str]:
    found = page.get_by_role("region", name=column, exact=True).locator(".text").all_text_contents()
    return [text.strip() for text in found]


def test_ask_and_see_what_moves(visit: Any, origin: str, index: ChromaIndex) -> None:
    page = visit(origin)
    page.get_by_text("7 passages, model pico").wait_for()
    ask(page)
    plain = index.query(QUERY, top_n=None).hits
    assert order(page, "Instruction A") == [hit.id for hit in plain]
    assert order(page, "Search") == [hit.id for hit in sorted(plain, key=lambda hit: hit.retrieval_rank)]
    first = page.get_by_role("region", name="Instruction A").get_by_role("listitem").first
    assert f"P(yes) {plain[0].probability:.3f}" in first.inner_text()
    assert first.locator("mark").count() > 0

    told = "Look for borders."
    page.get_by_role("textbox", name="Instruction A").fill(told)
    page.get_by_role("button", name="Ask").click()
    settled(page)
    steered = index.query(QUERY, top_n=None, instructions=told).hits
    assert [hit.id for hit in steered] != [hit.id for hit in plain], "or nothing can be seen"
    assert order(page, "Instruction A") == [hit.id for hit in steered]
    for place, hit in enumerate(steered, 1):
        move = page.get_by_role("region", name="Instruction A").locator(".move").nth(place - 1).text_content()
        gone = hit.retrieval_rank - place
        assert move.startswith(
            f"▲ {gone}up {gone}, was" if gone > 0 else f"▼ {-gone}down" if gone < 0 else "=not moved"
        )
    assert page.get_by_role("status").text_content() == f"7 passages ranked. First under A: {steered[0].id}."


def test_instructions_side_by_side(visit: Any, origin: str, index: ChromaIndex) -> None:
    page = visit(origin)
    another = page.get_by_role("button", name="Compare another instruction")
    told = ["", "Look for borders.", "Find the city."]
    for letter, one in list(zip("ABC", told, strict=True))[1:]:
        another.click()
        field = page.get_by_role("textbox", name=f"Instruction {letter}")
        assert field.evaluate("one => one === document.activeElement")
        field.fill(one)
    assert another.is_disabled(), "three are what fits"
    ask(page)
    for letter, one in zip("ABC", told, strict=True):
        wanted = index.query(QUERY, top_n=None, instructions=one or None).hits
        assert order(page, f"Instruction {letter}") == [hit.id for hit in wanted]
    assert page.locator("#lines path").count() == 21, "from each passage to itself in the next of four columns"
    rows = page.get_by_role("table", name="Time").get_by_role("row").all_text_contents()
    assert len(rows) == 4
    assert all(stage in rows[0] for stage in ("embed", "search", "fetch", "score", "together"))
    assert rows[1].endswith("ms70"), "7 from stored states, none encoded now"
    page.get_by_role("button", name="Remove instruction B").click()
    assert page.get_by_role("textbox", name="Instruction B").input_value() == "Find the city."


def test_passages_are_text_and_never_markup(visit: Any, origin: str) -> None:
    page = visit(origin)
    ask(page)
    column = page.get_by_role("region", name="Instruction A")
    cards = {card.locator(".id").text_content(): card for card in column.get_by_role("listitem").all()}
    for name, text in HOSTILE.items():
        more = cards[name].get_by_role("button")
        if more.count():
            more.click()
        assert cards[name].locator(".text").text_content().strip() == text.strip()
    marks = column.locator("mark").all_text_contents()
    assert any("Paris" in one or "capital" in one for one in marks)
    assert page.locator("#board script, #board img, #board style, #board iframe").count() == 0
    assert page.evaluate("window.hacked") is None


def test_keyboard_alone(visit: Any, origin: str) -> None:
    page = visit(origin)
    press, active = page.keyboard.press, "document.activeElement"

    def focused() -> str:
        return page.evaluate(f"{active}.id || {active}.className")

    press("Tab")
    assert focused() == "question"
    page.keyboard.type(QUERY)
    reached = []
    for _ in range(4):
        press("Tab")
        reached.append(focused())
    assert reached[:3] == ["instruction-A", "ask", "another"]
    press("Shift+Tab")
    press("Shift+Tab")
    assert page.evaluate(f"getComputedStyle({active}).outlineStyle") == "solid", "it can be seen"
    press("Enter")
    settled(page)
    page.get_by_role("button", name="Whole passage of astral").wait_for()
    for _ in range(12):
        press("Tab")
        if focused() == "more":
            break
    assert page.evaluate(f"{active}.getAttribute('aria-expanded')") == "false"
    press("Enter")
    assert page.evaluate(f"{active}.getAttribute('aria-expanded')") == "true"
    assert page.locator("#board .on .id").all_text_contents() == ["astral", "astral"], "in both columns"


def test_passages_by_hand(visit: Any, origin: str, index: ChromaIndex) -> None:
    page = visit(origin)
    page.get_by_text("Add passages by hand").click()
    page.get_by_label("Passages, with an empty line").fill("Bees make\nhoney.\n\n\n<b>Wax</b> is made by bees.\n")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_text("2 passages added, 0 there already.").first.wait_for()
    page.get_by_text("9 passages, model pico").wait_for()
    ask(page, "What do bees make?")
    assert sorted(texts(page, "Instruction A")[:2]) == ["<b>Wax</b> is made by bees.", "Bees make\nhoney."]
    for text in ("Bees make", "<b>Wax</b>"):
        page.get_by_role("button", name=f"Remove {text}").click()
        page.get_by_role("button", name=f"Remove {text}").wait_for(state="detached")
    page.get_by_text("7 passages, model pico").wait_for()
    assert len(index) == 7


def test_a_server_without_a_collection(visit: Any, pico: Reranker) -> None:
    with running(Door()) as address:
        page = visit(address)
        page.get_by_text("No collection is served").wait_for()
        page.get_by_label("Passages, with an empty line").fill("\n\n".join(TEXTS))
        page.get_by_role("button", name="Add", exact=True).click()
        ask(page)
        shown = page.get_by_role("region", name="Instruction A").locator(".text").all_text_contents()
        assert [one.strip() for one in shown] == [TEXTS[one.index] for one in pico.rank(QUERY, TEXTS)]
        assert [
            one.strip() for one in page.get_by_role("region", name="As given").locator(".text").all_text_contents()
        ] == TEXTS


def test_the_key_is_asked_for_and_not_kept(visit: Any, pico: Reranker) -> None:
    index = ChromaIndex.open(model=pico)
    index.add(IDS, TEXTS)
    with running(Door(index), key="s3cret") as address:
        page = visit(address)
        field = page.get_by_label("API key of this server")
        field.wait_for()
        for key, hidden in (("wrong", False), ("s3cret", True)):
            field.fill(key)
            page.get_by_role("button", name="Use this key").click()
            page.get_by_text("4 passages, model pico" if hidden else "This server wants an API key.").wait_for()
            assert (field.input_value(), field.is_hidden()) == ("", hidden)
            assert page.get_by_role("alert").is_hidden() == hidden, "or it says that the key was wrong"
        ask(page)
        assert order(page, "Instruction A")[0] == "paris"
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        page.reload()
        field.wait_for()


def test_what_goes_wrong_is_said(visit: Any, pico: Reranker) -> None:
    index = ChromaIndex.open(model=pico)
    with running(Door(index), max_characters=50) as address:
        page = visit(address)
        page.get_by_label("Question").fill("why " * 20)
        page.get_by_role("button", name="Ask").click()
        alert = page.get_by_role("alert")
        alert.get_by_text("query has 80 characters; this server takes at most 50.").wait_for()
        page.get_by_label("Question").fill("Why?")
        page.get_by_role("button", name="Ask").click()
        alert.wait_for(state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read(visit: Any, origin: str, width: int, scheme: str) -> None:
    """Nothing is cut at the side, and words stand out from what is behind them (WCAG's 4.5)."""
    page = visit(origin, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    page.get_by_role("button", name="Compare another instruction").click()
    page.get_by_role("textbox", name="Instruction B").fill("Look for borders.")
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#lines").is_visible() == (width == 1280)
    for name in ("body", ".soft", ".move.up", ".move.down", "button.main", ".more", ".retrieval .text"):
        ratio = page.locator(name).first.evaluate(CONTRAST)
        assert ratio >= 4.5, f"{name}: {ratio:.2f}"
    assert page.locator("#another").evaluate("one => getComputedStyle(one).transitionDuration") == "0s"


CONTRAST = """one => {
  const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => rgb(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  let behind = one;
  while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor].map(light);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
