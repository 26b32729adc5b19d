"""What `mkdocs build` does besides: pages from outside docs/, the notebook as a page, and formulas as MathML.

Nothing here needs a network or JavaScript, neither while the site is built nor while it is read.
"""

from __future__ import annotations

import base64
import html
import importlib
import inspect
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown.extensions.toc import slugify
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages that lie elsewhere in the repository, by their place in the site.
OUTSIDE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "studies/README.md": "studies/README.md",
    "studies/results/tables.md": "studies/results/tables.md",
}
# Anchors of the equations, by number.
_MATHEMATICS = (ROOT / "docs/mathematics.md").read_text(encoding="utf-8")
EQUATIONS = {
    title.partition(" ")[0]: slugify(title, "-") for title in re.findall(r"^### (E\d+ .*)$", _MATHEMATICS, re.MULTILINE)
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1[ ]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/, and the notebooks as pages, which bring their pictures."""
    for place, path in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    for file in [each for each in files if each.src_uri.endswith(".ipynb")]:
        text, pictures = as_markdown(Path(file.abs_src_path), posixpath.basename(file.src_uri)[: -len(".ipynb")])
        files.append(File.generated(config, file.src_uri[: -len(".ipynb")] + ".md", content=text))
        for name, content in pictures.items():
            place = posixpath.join(posixpath.dirname(file.src_uri), name)
            files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to where things are in the site; a link to anything that is not in it becomes its text."""
    markdown = re.sub(r"^<!-- signature: (\S+) -->$", lambda match: signature(match[1]), markdown, flags=re.MULTILINE)
    place = page.file.src_uri
    in_repository = OUTSIDE.get(place, f"docs/{place}")
    moved = {path: site for site, path in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), path))
        site = moved.get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if wanted == "README.md":
            site = "index.md"
        if site is None:
            if not (ROOT / wanted).exists():
                return match[0]  # and the build says that it leads nowhere
            return text
        if site.endswith(".ipynb"):
            site = site[: -len(".ipynb")] + ".md"
        relative = posixpath.relpath(site, posixpath.dirname(place) or ".")
        return f"{mark}[{text}]({relative}{hash_}{anchor})"

    return outside_code(markdown, lambda text: _LINK.sub(link, text))


def signature(name: str) -> str:
    """A class with all keywords that it takes in effect, those that it hands on to others as well."""
    module, _, attribute = name.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values()
    lines = [str(each.replace(annotation=each.empty)) for each in parameters]
    lines.insert(next((n for n, each in enumerate(parameters) if each.kind is each.KEYWORD_ONLY), len(lines)), "*")
    return "\n".join(["```python", f"{attribute}(", *(f"    {line}," for line in lines), ")", "```"])


def outside_code(markdown: str, change: Any) -> str:
    """Change everything but blocks and spans of code; a link whose text is code is still a link."""
    blocks: list[str] = []

    def hide(match: re.Match[str]) -> str:
        blocks.append(match[0])
        return f"\x00{len(blocks) - 1}\x00"

    changed = change(_CODE.sub(hide, markdown))
    return re.sub("\x00(\\d+)\x00", lambda match: blocks[int(match[1])], changed)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    r"""Formulas, which the extension arithmatex leaves as \(…\) and \[…\], become MathML, which browsers draw.

    Equations that a docstring cites become links.
    """

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match[2]).strip()
        latex = re.sub(r"\\(log|exp|cos) (?=[\w\\])", r"\\\1\\, ", latex)  # its converter leaves no space there
        display = "block" if match[1].startswith("<div") else "inline"
        return f"{match[1]}{convert(latex[2:-2], display=display)}{match[3]}"

    def citation(match: re.Match[str]) -> str:
        place = posixpath.relpath("mathematics.html", posixpath.dirname(page.file.src_uri) or ".")
        return f'<a href="{place}#{EQUATIONS[match[1]]}">{match[1]}</a>'

    if page.file.src_uri.startswith("api/"):
        content = re.sub(r"\b(E\d+) of docs/mathematics\.md", citation, content)
    return re.sub(r'(<(?:span|div) class="arithmatex">)(.*?)(</(?:span|div)>)', formula, content, flags=re.DOTALL)


def as_markdown(notebook: Path, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page: its texts, its code, and what the code put out; and its pictures, by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{len(pictures)}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{''.join(data.get('text/plain', 'A picture'))}]({picture})")
            elif output.get("name") == "stdout" or "text/plain" in data:  # no progress bars
                printed += "".join(output.get("text", data.get("text/plain", ""))).rstrip() + "\n"
        if printed:
            parts.append(f"```text\n{printed}```")
    return "\n\n".join(parts) + "\n", pictures
