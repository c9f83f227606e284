"""What a chapter says about itself: the profile, seed, device and versions it ran with.

A chapter's set-up cell ends with `page.facts(profile, seed)`. `sinkbook build` adds the seconds
that the chapter took, and keeps one record a chapter for the status page.
"""

import json
from base64 import b64encode
from dataclasses import dataclass, field
from datetime import date
from html import escape
from pathlib import Path

import pandas as pd

from sinkbook.errors import SinkbookError
from sinkbook.files import cache_folder
from sinkbook.provenance import device, repository, versions

PROFILES = ("quick", "paper")


def check_profile(profile: str) -> str:
    """The profile's name, or an error that names the ones there are.

    >>> check_profile("quick")
    'quick'
    """
    if profile not in PROFILES:
        raise SinkbookError(
            f"no profile named {profile!r}. There are two: quick (minutes on two CPU cores) and "
            "paper (the paper's own sizes, for one GPU)."
        )
    return profile


@dataclass(frozen=True)
class Facts:
    """One line on a chapter's page: what it was run with. Made by `facts`."""

    profile: str
    seed: int
    device: str = field(default_factory=device)
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(default_factory=lambda: date.today().isoformat())

    def __str__(self) -> str:
        return (
            f"profile {self.profile} · seed {self.seed} · {self.device} · "
            f"torch {self.versions['torch']} · transformers {self.versions['transformers']} · "
            f"{self.date}"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        html = f'<p class="sinkbook-facts">{escape(str(self))}</p>'
        # The metadata travels with the executed notebook, where the status page finds it.
        return {"text/html": html, "text/plain": str(self)}, {"sinkbook.facts": vars(self)}


def facts(profile: str, seed: int) -> Facts:
    """The line that ends a chapter's set-up cell; an unknown profile is an error here."""
    return Facts(check_profile(profile), seed)


@dataclass(frozen=True)
class Table:
    """Rows that scroll in a box of their own where the page is narrower than they are."""

    rows: pd.DataFrame

    def _repr_html_(self) -> str:
        return f'<div class="sinkbook-scroll">{self.rows.to_html(border=0)}</div>'

    def __repr__(self) -> str:
        return self.rows.to_string()


@dataclass(frozen=True)
class Attachments:
    """Files that a page offers: as links that need no server, and beside the built page.

    Made by `attach`. `sinkbook build` finds the files in the metadata of the executed notebook.
    """

    files: dict[str, bytes]

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        encoded = {name: b64encode(content).decode() for name, content in self.files.items()}
        links = [
            f'<a download="{escape(name)}" href="data:application/octet-stream;base64,{text}">'
            f"{escape(name)}</a> ({len(self.files[name]) / 1000:.0f} kB)"
            for name, text in encoded.items()
        ]
        html = f"<p>{' · '.join(links)}</p>"
        return {"text/html": html, "text/plain": str(self)}, {"sinkbook.files": encoded}

    def __str__(self) -> str:
        return ", ".join(f"{name} ({len(c) / 1000:.0f} kB)" for name, c in self.files.items())


def attach(files: dict[str, bytes]) -> Attachments:
    """Offer files on the page, by name."""
    return Attachments(files)


def status_folder() -> Path:
    """Where the record of each chapter's last run lies, one JSON file a chapter."""
    return cache_folder() / "chapters"


@dataclass(frozen=True)
class Status:
    """The last run of every chapter, as a table. Made by `status`."""

    records: list[dict]

    def _repr_html_(self) -> str:
        rows = []
        for record in self.records:
            ran_with = record["versions"]
            cells = (
                record["chapter"],
                record["profile"],
                str(record["seed"]),
                f"{record['seconds']:.0f}",
                record["device"],
                ran_with["torch"],
                ran_with["transformers"],
                record["date"],
            )
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        titles = ("chapter", "profile", "seed", "seconds", "device", "torch", "transformers", "run")
        head = "".join(f"<th>{title}</th>" for title in titles)
        return (
            f'<div class="sinkbook-scroll"><table class="sinkbook-status"><thead><tr>{head}</tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    def __repr__(self) -> str:
        return "\n".join(
            f"{record['chapter']:24} {record['profile']:6} {record['seconds']:6.0f} s"
            for record in self.records
        )


def status() -> Status:
    """The last run of every chapter of the book, by `sinkbook build` or `sinkbook run`."""
    records = [json.loads(path.read_text("utf-8")) for path in status_folder().glob("*.json")]
    if root := repository():  # renamed chapters, and those of another book, have left theirs
        chapters = {path.stem for path in (root / "book").glob("*.ipynb")}
        records = [record for record in records if record["chapter"] in chapters]
    return Status(sorted(records, key=lambda record: record["chapter"]))
