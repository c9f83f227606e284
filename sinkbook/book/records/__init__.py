"""Records: measurements of trainings too long for a page, kept with their provenance."""

from sinkbook.book.records.kept import (
    NAMES,
    about,
    load,
    paper_olmo,
    paper_one_layer,
    path_of,
    run_of,
)

__all__ = ["NAMES", "about", "load", "paper_olmo", "paper_one_layer", "path_of", "run_of"]
