"""The picture of the packages in CONTRIBUTING.md, made from their imports: `python -m tests.house`.

An arrow means "imports from". Arrows that others imply are left out: who imports from `probe` may
import from all that lies below it, too.
"""

import importlib
import re
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- the house: make house -->\n", "<!-- end of the house -->"
GROUND = "ground"  # the modules that lie beside the packages, but for the command line


def house() -> str:
    """A diagram of the packages, and under it what each holds, as Markdown."""
    graph = grimp.build_graph("sinkbook", cache_dir=None)
    rooms: dict[str, set[str]] = {}
    for module in sorted(graph.modules - {"sinkbook"}):
        room, _, name = module.removeprefix("sinkbook.").partition(".")
        if name:
            rooms.setdefault(room, set()).add(name)
        elif not graph.find_children(module):
            rooms.setdefault(room if room == "cli" else GROUND, set()).add(room)
    room_of = {
        f"sinkbook.{m}" if r in (GROUND, "cli") else f"sinkbook.{r}.{m}": r
        for r, held in rooms.items()
        for m in held
    }
    room_of |= {f"sinkbook.{room}": room for room in rooms if room != GROUND}
    below = {room: set() for room in rooms}
    for module, room in room_of.items():
        for imported in graph.find_modules_directly_imported_by(module):
            if room_of.get(imported, room) != room:
                below[room].add(room_of[imported])
    arrows = [
        f"  {room} --> {other}"
        for room, others in sorted(below.items())
        for other in sorted(others)
        if not any(other in _all_below(below, o) for o in others)
    ]
    order = sorted(rooms, key=lambda room: -len(_all_below(below, room)))
    held = [f"| `{room}` | {_said(room)} | {', '.join(sorted(rooms[room]))} |" for room in order]
    return "\n".join(
        [
            "```mermaid",
            "flowchart TD",
            *arrows,
            "```",
            "",
            "| | | modules |",
            "|---|---|---|",
            *held,
            "",
        ]
    )


def _all_below(below: dict[str, set[str]], room: str) -> set[str]:
    """The rooms that one stands on, directly or through others; none stands on itself."""
    found: set[str] = set()
    todo = set(below[room])
    while todo:
        other = todo.pop()
        if other not in found:
            found.add(other)
            todo |= below[other]
    return found


def _said(room: str) -> str:
    """The first sentence of a package's docstring."""
    if room == GROUND:
        return "What all others stand on."
    said = importlib.import_module(f"sinkbook.{room}").__doc__ or ""
    return re.split(r"(?<=\.)\s", said.strip(), maxsplit=1)[0].replace("\n", " ")


def page(text: str) -> str:
    """The text of CONTRIBUTING.md with the picture as it should be."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + house() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
