"""What makes the book: chapters and how they are run, their claims, sizes, records and pages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinkbook.book.chapters import Chapter


def chapter(profile: str, seed: int = 0) -> "Chapter":
    """The chapter that is being run: its set-up cell begins with it and ends by showing it.

    From here on figures are drawn in the style of the book, and shown as its pages show them.
    Raises `SinkbookError` for a profile that is none.
    """
    from sinkbook.book.chapters import Chapter
    from sinkbook.figures import style, svg

    style.use()
    svg.show_in_notebooks()
    return Chapter(profile, seed)
