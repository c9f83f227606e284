"""`make bench`: every ratio, printed as it is measured and kept in `build/bench.json`."""

import json
from pathlib import Path

import rich
from rich.table import Table

from benchmarks import probe, training


def main() -> None:
    rows = [row for module in (training, probe) for row in module.ratios()]
    table = Table("ratio", "measured", "bound", "spread", "runs", "holds")
    for row in rows:
        holds = "yes" if row["holds"] else "[red]no[/red]"
        numbers = (f"{row[key]:g}" for key in ("ratio", "bound", "spread", "n"))
        table.add_row(row["name"], *numbers, holds)
    rich.print(table)
    place = Path("build") / "bench.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(rows, indent=2) + "\n")
    print(place)


if __name__ == "__main__":
    main()
