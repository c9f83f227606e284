"""Where the book is published: what pages tell search engines, previews and Colab.

The addresses stand in `[project.urls]` of pyproject.toml and nowhere else. As long as they name
`OWNER`, nobody has published this copy, and pages promise no address, no preview and no Colab.
This module is a Sphinx extension, and `python -m sinkbook.pages.publishing FOLDER` writes the
notebooks that Colab opens.
"""

import copy
import json
import shutil
import sys
import tomllib
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from sinkbook.errors import SinkbookError
from sinkbook.files import is_there, reading

PLACEHOLDER = "OWNER"
COLAB, BRANCH = "https://colab.research.google.com", "colab"  # the branch that Colab opens
PREVIEW = Path("book", "images", "probe-smollm2.png")
DESCRIPTION_LENGTH = 200  # characters; more is cut off by those that show it

INSTALL = """\
# This machine knows no sinkbook yet. In a copy of the repository, leave this cell out.
!git clone --quiet --depth 1 {repository} sinkbook-repository
%cd sinkbook-repository
%pip install --quiet --editable '.[book]'"""


def addresses(root: Path) -> dict[str, str]:
    """`[project.urls]` of the repository at `root`: Homepage (of the book) and Repository.

    Empty as long as one of them is a placeholder, and without a pyproject.toml. Raises
    `SinkbookError` for what is no address, and for a file that cannot be read.
    """
    path = root / "pyproject.toml"
    if not is_there(path):
        return {}
    with reading(path, "Put it right, or take it from the repository again."):
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        urls = {**project.get("project", {}).get("urls", {})}
    for name, url in urls.items():
        if urlsplit(url).scheme != "https" or not urlsplit(url).netloc:
            raise SinkbookError(
                f"pyproject.toml: {name} in [project.urls] is {url!r}. Give an address that begins "
                "with https://."
            )
    return {} if any(PLACEHOLDER in url for url in urls.values()) else urls


def for_colab(notebook: dict, repository: str) -> dict:
    """A chapter with a first cell that clones the repository at that address and installs it."""
    made = copy.deepcopy(notebook)
    made["cells"].insert(
        0,
        {
            "cell_type": "code",
            "execution_count": None,
            "id": "install",
            "metadata": {},
            "outputs": [],
            "source": INSTALL.format(repository=repository),
        },
    )
    return made


def write_for_colab(root: Path, folder: Path) -> list[Path]:
    """All chapters as Colab opens them, in `folder`/book. Raises `SinkbookError` without an owner.

    >>> from tempfile import mkdtemp
    >>> root = Path(mkdtemp())
    >>> _ = (root / "pyproject.toml").write_text('''[project.urls]
    ... Repository = "https://github.com/OWNER/sinkbook"''')
    >>> write_for_colab(root, root / "out")
    Traceback (most recent call last):
    sinkbook.errors.SinkbookError: [project.urls] in pyproject.toml names no owner yet...
    """
    repository = addresses(root).get("Repository")
    if repository is None:
        raise SinkbookError(
            "[project.urls] in pyproject.toml names no owner yet. Put a name in the place of "
            f"{PLACEHOLDER}."
        )
    (folder / "book").mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted((root / "book").glob("*.ipynb")):
        made = for_colab(json.loads(path.read_text(encoding="utf-8")), repository)
        written.append(folder / "book" / path.name)
        written[-1].write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return written


# ---------------------------------------------------------------------------------------------
# What Sphinx calls
# ---------------------------------------------------------------------------------------------


def setup(app) -> dict:
    """Tell the theme where the book is published, and each page what it says of itself."""
    app.connect("config-inited", _tell_theme)
    app.connect("html-page-context", _tell_page)
    app.connect("build-finished", _copy_preview)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _tell_theme(app, config) -> None:
    urls = addresses(Path(app.srcdir))
    if not urls:
        return
    config.html_baseurl = urls["Homepage"].rstrip("/") + "/"
    config.html_theme_options = {
        **config.html_theme_options,
        "repository_url": urls["Repository"],
        "repository_branch": BRANCH,
        "launch_buttons": {"colab_url": COLAB},
    }


def _tell_page(app, page: str, template: str, context: dict, doctree) -> None:
    """A description from the first paragraph; where it is published, a picture for previews."""
    said = _first_paragraph(doctree)
    if not said:
        return
    tags = {"name": {"description": said}, "property": {"og:description": said}}
    tags["property"] |= {"og:title": context.get("title", ""), "og:type": "article"}
    if app.config.html_baseurl:
        picture = f"{app.config.html_baseurl}_static/{PREVIEW.name}"
        tags["property"] |= {"og:url": context.get("pageurl") or "", "og:image": picture}
        tags["name"] |= {"twitter:card": "summary_large_image"}
    context["metatags"] = context.get("metatags", "") + "".join(
        f'<meta {kind}="{name}" content="{escape(content)}" />\n'
        for kind, of_kind in tags.items()
        for name, content in of_kind.items()
    )


def _first_paragraph(doctree) -> str:
    """The beginning of a page in plain words, whole words of it, or nothing."""
    if doctree is None:
        return ""
    paragraph = next(iter(doctree.findall(lambda node: node.tagname == "paragraph")), None)
    words = paragraph.astext().split() if paragraph else []
    said = ""
    for word in words:
        if len(said) + 1 + len(word) > DESCRIPTION_LENGTH:
            return f"{said} …"
        said = f"{said} {word}".strip()
    return said


def _copy_preview(app, error: Exception | None) -> None:
    source = Path(app.srcdir) / PREVIEW
    if error is None and app.config.html_baseurl and source.is_file():
        shutil.copy(source, Path(app.outdir) / "_static")


if __name__ == "__main__":
    print("\n".join(map(str, write_for_colab(Path.cwd(), Path(sys.argv[1])))))
