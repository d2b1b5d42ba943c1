"""Self-contained HTML pages: inline CSS, pictures as base64, light and dark, no script and nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from toreq.diagnostics.plots import Theme

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c2024; --soft: #5c636b; --line: #d5d9de;
  --panel: #f5f7f9; --accent: #0072B2; --warn: #8a4a00; }
@media (prefers-color-scheme: dark) { :root { --ground: #171a1e; --ink: #e6e9ec; --soft: #a2a9b1; --line: #3a4048;
  --panel: #1f2429; --accent: #56B4E9; --warn: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .4rem 0 .8rem; max-width: 44rem; }
.soft { color: var(--soft); } .warn { color: var(--warn); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--panel); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tbody tr:last-child td { border-bottom: 0; } tr.group td { border-top: 2px solid var(--line); }
td.best { font-weight: 700; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; background: var(--ground); }
figure img { display: block; width: 100%; height: auto; }
figcaption { padding: .5rem .8rem .7rem; font-size: .88rem; color: var(--soft); border-top: 1px solid var(--line); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; margin: 0; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  font-size: .86rem; margin: .4rem 0; }
@media (max-width: 40rem) {
  main { padding: 1rem .8rem 2rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  /* On a phone each row of a table becomes a card: a name beside each figure, nothing off the edge. */
  table.cards thead { display: none; }
  table.cards tr { display: block; padding: .5rem .8rem; border-bottom: 1px solid var(--line); }
  table.cards tr:last-child { border-bottom: 0; } table.cards tr.group td { border-top: 0; }
  table.cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .12rem 0; }
  table.cards td::before { content: attr(data-name); color: var(--soft); }
  table.cards td:first-child { font-weight: 600; }
  table.cards td:first-child::before { content: none; }
}
@media print { .grid { grid-template-columns: 1fr 1fr; } figure { break-inside: avoid; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML document; ``title`` is escaped, the parts of ``body`` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def picture(images: Mapping[Theme, bytes], alt: str, caption: str) -> str:
    """A figure that follows the reader's light or dark preference; ``images`` are PNG bytes by theme."""
    light = _data(images["light"])
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(images["dark"])}">' if "dark" in images else ""
    return (
        f'<figure><picture>{dark}<img src="{light}" alt="{escape(alt, quote=True)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int] = (0,),
    groups: Sequence[int] = (),
) -> str:
    """A table whose rows become cards on a phone; ``text`` columns are set left, ``groups`` rows start with a rule."""

    def kind(index: int) -> str:
        return ' class="text"' if index in text else ""

    head = "".join(f"<th{kind(i)}>{escape(name)}</th>" for i, name in enumerate(columns))
    body = []
    for number, row in enumerate(rows):
        cells = "".join(
            f'<td{kind(i)} data-name="{escape(columns[i], quote=True)}">{escape(cell)}</td>'
            for i, cell in enumerate(row)
        )
        opening = '<tr class="group">' if number in groups else "<tr>"
        body.append(f"{opening}{cells}</tr>")
    return (
        f'<div class="scroll"><table class="cards"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def definitions(entries: Mapping[str, str]) -> str:
    """A list of names and what they mean."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def commands(lines: Sequence[str]) -> str:
    """Shell lines, ready to copy."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"
