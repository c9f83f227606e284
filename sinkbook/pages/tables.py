"""Tables as HTML."""

import re
from xml.etree import ElementTree

import pandas as pd

# One number or several, and units of one sign.
_NUMBERS = re.compile(r"(?:[-−+]?\d[\d.,e%×–−+ -]*)?")


def scrolling(table: str) -> str:
    """A table in a box that those without a pointer can scroll as well."""
    return (
        f'<div class="sinkbook-scroll" role="group" aria-label="Table" tabindex="0">{table}</div>'
    )


def of_rows(rows: pd.DataFrame) -> str:
    """Rows as a table whose columns of numbers are marked as such: a style sheet sets them right.

    >>> of_rows(pd.DataFrame({"height": ["62", ""], "who": ["AdamW", "SGD"]})).count("number")
    3
    >>> rows = pd.DataFrame({"sink": ["0.21"]}, index=pd.Index(["as it is"], name="setting"))
    >>> of_rows(rows).count("<tr>")  # a heading and a row
    2
    """
    if rows.index.nlevels == 1 and rows.columns.nlevels == 1:  # in the row of the other names
        rows = rows.rename_axis(index=None, columns=rows.index.name)
    root = ElementTree.fromstring(rows.to_html(border=0))  # nosec B314: written by pandas
    head = root.findall("./thead/tr")
    for row in head:
        row.attrib.pop("style", None)
    body = [row.findall("td") for row in root.findall("./tbody/tr")]
    for place, column in enumerate(zip(*body, strict=True)):
        if all(_NUMBERS.fullmatch((cell.text or "").strip()) for cell in column):
            headings = [row.findall("th")[place - len(body[0])] for row in head[:1]]
            for cell in (*headings, *column):
                cell.set("class", "number")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
