"""`mkdocs.yml`: what mkdocstrings must know of our docstrings: an example stands in the text, and is fenced here."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).*)*", re.MULTILINE)


class Fenced(griffe.Extension):
    """Puts every example into a fence, which Markdown would take for a quotation."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that is read."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
