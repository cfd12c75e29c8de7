"""HTML out of plain values: whatever is not markup already is escaped, so that no name of a study or value of a
setting can become part of the page.

Tables scroll inside of their own box, which the keyboard reaches too; page.js makes buttons of the headings of those
that can be sorted. Without it they are complete, in the order in which they were written.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune.report.figures import Picture

HERE = Path(__file__).resolve().parent
VOID = {"img", "meta", "link"}
# The page may load nothing at all; what is inlined is all there is.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Html(str):
    """Text that is markup already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children are escaped unless they are Html; `class_` is class, `aria_label` is aria-label; an
    attribute that is None is left out, one that is True has no value."""
    named = "".join(f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
                    for key, value in attributes.items() if value is not None)
    if name in VOID:
        return Html(f"<{name}{named}>")
    return Html(f"<{name}{named}>{join(children)}</{name}>")


def join(children: Sequence[Any]) -> Html:
    return Html("".join(escape(child) for child in children))


def escape(value: Any) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


@dataclass
class Cell:
    """Text, or markup, and what a sorted table compares; None: comes last."""

    text: Any
    key: float | str | None = None


def number(value: float | None, form: str = "{:g}") -> Cell:
    return Cell("–", None) if value is None else Cell(form.format(value), value)


def table(name: str, caption: Any, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]],
          marked: Sequence[int] = (), sortable: bool = True) -> Html:
    """`columns`: (heading, "text" or "number"); cells are Cell, or plain text. The first of a row is its heading;
    `marked` rows stand out."""
    heads = [tag("th", title, scope="col", class_=kind if kind == "number" else None) for title, kind in columns]
    lines = []
    for i, row in enumerate(rows):
        cells = [cell if isinstance(cell, Cell) else Cell(cell, str(cell)) for cell in row]
        lines.append(tag("tr", *(tag("td" if j else "th", cell.text, scope=None if j else "row",
                                     class_=kind if kind == "number" else None,
                                     data_key="" if cell.key is None else cell.key)
                                 for j, (cell, (_, kind)) in enumerate(zip(cells, columns, strict=True))),
                         class_="marked" if i in marked else None))
    inner = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), aria_labelledby=f"{name}-caption",
                class_="sortable" if sortable and len(rows) > 1 else None)
    return tag("figure", tag("figcaption", caption, id=f"{name}-caption"), _box(name, inner), class_="table")


def _box(name: str, inner: Html) -> Html:
    return tag("div", inner, class_="scroll", role="region", tabindex=0, aria_labelledby=f"{name}-caption")


def picture(name: str, shown: Picture | None) -> Html:
    """The picture itself is in the page. A wide one keeps a readable size and scrolls on a small screen."""
    if shown is None:
        return Html("")
    data = shown.path.read_bytes()
    width, height = (int.from_bytes(data[i:i + 4], "big") for i in (16, 20))
    image = tag("img", src="data:image/png;base64," + base64.b64encode(data).decode(), alt=shown.alt, width=width,
                height=height)
    return tag("figure", _box(name, image) if shown.wide else image,
               tag("figcaption", shown.caption, id=f"{name}-caption"), class_="wide" if shown.wide else "small")


def facts(*pairs: tuple[str, Any]) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


def document(title: str, body: Html) -> str:
    head = join([
        tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"), tag("link", rel="icon", href="data:,"),
        tag("title", title), Html(f"<style>\n{(HERE / 'page.css').read_text()}</style>")])
    script = Html(f"<script>\n{(HERE / 'page.js').read_text()}</script>")
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body, script), lang='en')}\n"
