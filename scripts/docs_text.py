"""reStructuredText mathematics in docstrings as mkdocs sets it."""

from __future__ import annotations

import re
import textwrap

_ROLE = re.compile(r":math:`([^`]+)`", re.DOTALL)
_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *(?=\n\1 )))*)", re.MULTILINE)
_OBJECT = re.compile(r":(?:class|func|meth|attr|mod):`~?([^`]+)`")


def to_markdown(text: str) -> str:
    r"""Return ``text`` with roles and directives of mathematics as \(...\) and \[...\], and names as code."""

    def block(match: re.Match[str]) -> str:
        indent, formula = match.groups()
        lines = textwrap.dedent(formula.strip("\n")).strip()
        lines = " ".join(line.strip() for line in lines.splitlines())
        return f"\n{indent}\\[{lines}\\]\n"

    text = _BLOCK.sub(block, text)
    text = _ROLE.sub(lambda match: rf"\({' '.join(match[1].split())}\)", text)
    return _OBJECT.sub(lambda match: f"`{match[1].removeprefix('toreq.')}`", text)
