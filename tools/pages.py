"""`mkdocs.yml`: pages from outside docs/: the README, the stubs' own, the report, and the API of the docstrings."""

import ast
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = re.compile(r"^ *from \._\w+ import \w+ as (\w+)", re.MULTILINE)
TABLE = re.compile(r"^\| \[(`.*`)\]\((.*)\) \| (.*) \|$", re.MULTILINE)
WIDE = ("index.md", "types.md", "errors.md", "recipes/")
HEAD = "# API\n\nEvery public name, in the order in which a training loop meets them."


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and the pictures of the report."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](").replace('src="docs/', 'src="')
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "CHANGELOG.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    files.append(File.generated(config, "api.md", content=api()))
    for path in (ROOT / "examples" / "recipes").glob("*.py"):
        files.append(File.generated(config, f"recipes/{path.stem}.md", content=recipe(path)))
    for path in [*(ROOT / "stubs").glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*/*.*")]:
        if path.suffix in (".md", ".svg"):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """On the site what lies beside docs/ lies within; a wide page has the room of its table of contents too."""
    if page.file.src_uri.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    markdown = re.sub(r"\]\(((?:\.\./)*)\.\./examples/(recipes/\w+)\.py\)", r"](\1\2.md)", markdown)
    markdown = markdown.replace("](reference.md)", "](api.md)")
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown


def recipe(path: pathlib.Path) -> str:
    """A program as a page: its docstring is the prose."""
    text = path.read_text()
    title, _, prose = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")
    code = text.split('"""', 2)[2].strip()
    command = f"python examples/recipes/{path.name}"
    return f"# {title.rstrip('.')}\n\n{prose}\n\n```sh\n{command}\n```\n\n```python\n{code}\n```\n"


def api() -> str:
    """The table of combinators, each with its docstring; then the types and the errors."""
    combinators = (ROOT / "docs" / "combinators.md").read_text()
    public = PUBLIC.findall((ROOT / "flaxsplit" / "__init__.py").read_text())
    lines = [HEAD]
    for names, page, words in TABLE.findall(combinators):
        found = re.findall(r"`(\w+)`", names)
        lines += [
            f"## {names}",
            f"{words[:1].upper()}{words[1:]}. [Its page]({page})",
            *map("::: flaxsplit.{}".format, found),
        ]
        public = [name for name in public if name not in found]
    return "\n\n".join([*lines, "## Types and errors", *map("::: flaxsplit.{}".format, public)])
