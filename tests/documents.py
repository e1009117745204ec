"""A small folder of documents of every kind that is read, for tests."""

from __future__ import annotations

from pathlib import Path


def one_page_pdf(text: str) -> bytes:
    """The smallest PDF with a line of text: catalog, pages, page, content, font, and the offsets of each."""
    content = f"BT /F1 12 Tf 10 50 Td ({text}) Tj ET"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 99]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(content)}>>stream\n{content}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body, offsets = "%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj{one}endobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    end = f"xref\n0 6\n0000000000 65535 f \n{table}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF"
    return (body + end).encode()


def write_documents(root: Path) -> Path:
    """Ten documents, one of them empty, beside a hidden folder and a picture."""
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "hidden.txt").write_text("never read")
    for number in range(6):
        (root / f"note{number}.txt").write_text(f"Note {number} is about subject {number}.")
    (root / "long.md").write_text("\n\n".join(f"Paragraph {i}. " + "word " * 60 for i in range(8)))
    (root / "page.html").write_text("<html><script>no()</script><body><h1>Title</h1><p>Body text</p></body></html>")
    (root / "sub" / "paper.pdf").write_bytes(one_page_pdf("Hello from a PDF"))
    (root / "empty.txt").write_text("")
    (root / "image.png").write_bytes(b"\x89PNG")
    return root
