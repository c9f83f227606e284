"""The object that a chapter works with, and what a page shows beside its text and figures.

    from sinkbook import book

    chapter = book.chapter(profile, seed)

It knows the profile and the seed, so that sizes follow from it (`experiments.one_layer(chapter)`)
and claims are judged by it (`chapter.check("sink.one-layer", values)`). `sinkbook build` adds the
seconds that the chapter took, and keeps one file a chapter for the status page.
"""

import json
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from html import escape
from pathlib import Path

import pandas as pd
import xarray as xr

from sinkbook.arguments import check_kind
from sinkbook.book import claims
from sinkbook.book.settings import Settings
from sinkbook.files import cache_folder, files_in, reading
from sinkbook.pages.tables import of_rows, scrolling
from sinkbook.provenance import device, of_trainings, repository, versions

Measurement = xr.Dataset | xr.DataArray


@dataclass(frozen=True)
class Chapter(Settings):
    """A chapter being run. Made by `book.chapter`; shown, it is the line of what it runs with."""

    def check(self, claim_id: str, values: Iterable[float]) -> None:
        """Hand in the measurement of a claim, one number a seed: it is judged, shown and kept.

        The text has its verdict, in words, by the role `{glue:text}` and the claim's id. A claim
        that fails is shown as failed and raises nothing: that is a result. An id that is
        not in `book/claims.yml` raises `SinkbookError`.
        """
        verdict = claims.check(claim_id, values, profile=self.profile)
        self.report(**{claim_id: verdict.in_words})

    def report(self, **numbers: float | int | str) -> None:
        """Hand numbers to the text, where a Markdown cell prints one by the role `{glue:text}`.

        Shows nothing itself. Written as scrapbook does, so any reader of executed notebooks finds
        them.
        """
        from IPython.display import display

        kind = "application/papermill.record/"
        for name, number in numbers.items():
            plain = number.item() if hasattr(number, "item") else number
            display(
                {f"{kind}text/plain": repr(plain)},
                raw=True,
                metadata={"scrapbook": {"name": name, "mime_prefix": kind}},
            )

    def record(self, name: str) -> xr.Dataset:
        """The measurements of a record; shows when, on what and by which command it was made.

        Raises `SinkbookError` if there is no such record, or none yet, naming the command.
        """
        from IPython.display import display

        from sinkbook.book import records

        record = records.load(name)
        display(Line(provenance_in_words(record)))
        return record

    def spot_check(self, name: str, training: str) -> "Line":
        """Begin a record's training again, and show that its first steps are those recorded.

        Raises `SinkbookError` if they part by more than rounding does.
        """
        from sinkbook.book.records.spot_checks import spot_check

        return Line(str(spot_check(name, training)))

    def kept(self, name: str, measure: Callable[..., Measurement]) -> Callable[..., Measurement]:
        """`measure`, which reads what the very same call gave when it was kept under `name`.

        Another model, seed or size is measured now. See `records.measured`.
        """
        from sinkbook.book.records import measured

        return measured.kept(name, measure)

    def meet(
        self, measure: Callable[..., Measurement], again: Measurement, stored: Measurement
    ) -> "Line":
        """Show that a part of what `measure`, made by `kept`, gave is the same when made again.

        Both are cut alike. The line says when and on what it was kept. Raises `SinkbookError` if
        they part by more than rounding does.
        """
        from sinkbook.book.records import measured

        text = measured.meet(again, stored)
        if facts := measure.facts:
            made = f"made on {facts['date'][:10]} in {facts['seconds']} seconds"
            text = f"Kept: {made} on {facts['device']}, by: {facts['command']}. {text}"
        return Line(text)

    def line(self, text: str) -> "Line":
        """A sentence in small print."""
        return Line(text)

    def table(self, rows: pd.DataFrame) -> "Table":
        """Rows as a table that fits the page."""
        return Table(rows)

    def attach(self, files: dict[str, bytes]) -> "Attachments":
        """Offer files on the page, by name."""
        return Attachments(files)

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return Facts(self.profile, self.seed)._repr_mimebundle_()


@dataclass(frozen=True)
class Line:
    """A line in small print."""

    text: str

    def _repr_html_(self) -> str:
        return f'<p class="sinkbook-facts">{escape(self.text)}</p>'

    def __repr__(self) -> str:
        return self.text


def provenance_in_words(record: xr.Dataset) -> str:
    """When, on what, in which time and by which command a record was made.

    >>> provenance_in_words(xr.Dataset(attrs={"record": "league", "date": "2026-11-20T10:00:00Z",
    ...     "seconds": 9000, "device": "CPU, 1 thread", "command": "sinkbook record league"}))
    'Record league: made on 2026-11-20 in 2.5 hours on CPU, 1 thread, by: sinkbook record league'
    """
    about = record.attrs
    minutes = about["seconds"] / 60
    time = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
    if "trainings" in about:
        time = of_trainings(about["trainings"], time)
        if about["trainings"] > 1:
            time += ", their times added up,"
    return (
        f"Record {about['record']}: made on {about['date'][:10]} in {time} "
        f"on {about['device']}, by: {about['command']}"
    )


@dataclass(frozen=True)
class Facts:
    """The line on a chapter's page that says what it was run with."""

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
        html = Line(str(self))._repr_html_()
        # The metadata travels with the executed notebook, where the status page finds it.
        return {"text/html": html, "text/plain": str(self)}, {"sinkbook.facts": asdict(self)}


@dataclass(frozen=True)
class Table:
    """Rows that scroll in a box of their own where the page is narrower than they are."""

    rows: pd.DataFrame

    def _repr_html_(self) -> str:
        return scrolling(of_rows(self.rows))

    def __repr__(self) -> str:
        return self.rows.to_string()


@dataclass(frozen=True)
class Attachments:
    """Files that a page offers: as links that need no server, and beside the built page.

    `sinkbook build` finds the files in the metadata of the executed notebook.
    """

    files: dict[str, bytes]

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        encoded = {name: b64encode(content).decode() for name, content in self.files.items()}
        links = [
            f'<a download="{escape(name)}" href="data:application/octet-stream;base64,{text}">'
            f"{escape(name)}</a> ({len(self.files[name]) / 1000:.0f} kB)"
            for name, text in encoded.items()
        ]
        html = f"<p class='sinkbook-attached'>{' · '.join(links)}</p>"
        return {"text/html": html, "text/plain": str(self)}, {"sinkbook.files": encoded}

    def __str__(self) -> str:
        return ", ".join(f"{name} ({len(c) / 1000:.0f} kB)" for name, c in self.files.items())


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
            cells = _cells(record)
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        titles = ("chapter", "run", "seconds", "profile", "seed", "device", "torch", "transformers")
        head = "".join(f"<th>{title}</th>" for title in titles)
        return scrolling(
            f'<table class="sinkbook-status"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table>"
        )

    def __repr__(self) -> str:
        return "\n".join(
            f"{record['chapter']:24} {record['profile']:6} {record['seconds']:6.0f} s"
            for record in self.records
        )


def _cells(record: dict) -> tuple[str, ...]:
    """The row of a chapter's last run."""
    ran_with = record["versions"]
    return (
        record["chapter"],
        record["date"],
        f"{record['seconds']:.0f}",
        record["profile"],
        str(record["seed"]),
        record["device"],
        ran_with["torch"],
        ran_with["transformers"],
    )


def status() -> Status:
    """The last run of every chapter of the book, by `sinkbook build` or `sinkbook run`.

    Raises `SinkbookError` for what was kept of one and cannot be read.
    """
    records = []
    for path in files_in(status_folder(), ".json"):
        with reading(path, "Delete it, and run the chapter again.", named=True):
            records.append(json.loads(path.read_text("utf-8")))
            for cell in _cells(records[-1]):
                check_kind("cell", cell, str)
    if root := repository():  # renamed chapters, and those of another book, have left theirs
        chapters = {path.stem for path in (root / "book").glob("*.ipynb")}
        records = [record for record in records if record["chapter"] in chapters]
    return Status(sorted(records, key=lambda record: record["chapter"]))
