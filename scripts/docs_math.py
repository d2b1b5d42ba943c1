"""A griffe extension for the API reference: reStructuredText mathematics in docstrings as mkdocs sets it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

# griffe loads this file by its path, so that its neighbours are not found by themselves
sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_text import to_markdown


class Mathematics(griffe.Extension):
    """Converts every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
