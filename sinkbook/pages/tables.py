"""Tables as HTML."""


def scrolling(table: str) -> str:
    """A table in a box that those without a pointer can scroll as well."""
    return (
        f'<div class="sinkbook-scroll" role="group" aria-label="Table" tabindex="0">{table}</div>'
    )
