"""How the documentation is built: `sphinx-build -W -b html docs OUT`, offline, in seconds.

Pages are Markdown (MyST). The notebooks are copied in and shown without being run: tests run them. Docstrings
are written as plain text with indented code; `as_rst` turns them into what Sphinx reads.
"""

import re
import shutil
import textwrap
from pathlib import Path

import jaxllm

ROOT = Path(__file__).resolve().parent.parent

project = "jaxllm"
version = release = jaxllm.__version__
html_show_copyright = html_show_sphinx = False

extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "index"
exclude_patterns = ["_build"]
suppress_warnings = ["toc.empty_glob"]  # results/ may be empty

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # no script from elsewhere

# The theme of the documentation of jax, flax and optax: text in the middle, nothing that moves.
html_theme = "sphinx_book_theme"
html_title = "jaxllm"
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search already
    "extra_footer": "jaxllm, Apache-2.0",
    "footer_content_items": ["extra-footer"],
}
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

CODE = re.compile(r"`([^`]+)`")
COLUMNS = re.compile(r"\S {3,}\S")  # an aligned listing, whose lines must stay lines
ARGUMENT = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)")
ITEM = re.compile(r"(- |\d\. )")


def prose(line: str) -> str:
    """A line of text: `code` as code, and what reStructuredText would take for markup as itself."""
    pieces = CODE.split(line)
    text = [re.sub(r"([\\*|_])", r"\\\1", piece) for piece in pieces[::2]]
    code = [f"``{piece}``" for piece in pieces[1::2]] + [""]
    return "".join(a + b for a, b in zip(text, code, strict=True))


def paragraph_as_rst(lines: list[str]) -> list[str]:
    """One paragraph of a docstring: code, a listing in columns, items, arguments, or sentences."""
    in_columns = sum(bool(COLUMNS.search(line)) for line in lines) > len(lines) / 2
    if in_columns or all(line.startswith("    ") for line in lines):
        indented = textwrap.indent(textwrap.dedent("\n".join(lines)), "   ").splitlines()
        language = "text" if in_columns else "python"
        return [f".. code-block:: {language}", "   :force:", "", *indented, ""]
    out: list[str] = []
    arguments = bool(ARGUMENT.match(lines[0]))  # until a sentence about errors
    for line in lines:
        arguments = arguments and not line.startswith("Raises")
        if ITEM.match(line):
            out.append(prose(line))
        elif arguments and (found := ARGUMENT.match(line)):
            out.append(f"- ``{found[1]}``: {prose(found[2])}")
        elif arguments or (line.startswith("  ") and out and out[-1].startswith(("- ", "  "))):
            out.append(f"  {prose(line.strip())}")
        elif line.startswith("  "):
            out += ["", f"- {prose(line.strip())}"]  # the first of some indented cases
        else:
            out += [*([""] if out and out[-1].startswith(("- ", "  ")) else []), prose(line)]
    return [*out, ""]


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of this house as reStructuredText."""
    text = CODE.sub(lambda code: re.sub(r"\s*\n\s*", " ", code[0]), "\n".join(lines))
    text = re.sub(r"(?m)^(\S.*)\n(?= {4}\S)", r"\1\n\n", text)  # code right below a sentence
    paragraphs = (paragraph.strip("\n").splitlines() for paragraph in re.split(r"\n\s*\n", text))
    return [line for some in paragraphs if some for line in paragraph_as_rst(some)]


def convert_docstring(app, what, name, thing, options, lines):
    """Sphinx's hook: `lines` are changed in place."""
    lines[:] = as_rst(lines)


def convert_signature(app, what, name, thing, options, signature, returns):
    """Sphinx's hook: arrays by their public name."""
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returns))


def setup(app):
    """Called by Sphinx."""
    shown = Path(__file__).parent / "notebooks"
    shutil.rmtree(shown, ignore_errors=True)
    shutil.copytree(ROOT / "notebooks", shown, ignore=shutil.ignore_patterns(".*"))
    app.connect("autodoc-process-docstring", convert_docstring)
    app.connect("autodoc-process-signature", convert_signature)
