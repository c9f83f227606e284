"""Advice fits the place where it is read: arguments in Python, options on the command line."""

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

from sinkbook import cli
from sinkbook.errors import SinkbookError

PACKAGE = Path(__file__).resolve().parents[2] / "sinkbook"
COMMANDS = "|".join(get_command(cli.app).commands)


def raised(path: Path) -> list[str]:
    """The messages that a module raises, with … for what it fills in."""
    calls = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error")
    ]
    return [re.sub(r"\{[^{}]*\}", "…", call) for call in calls]


def test_no_message_raised_below_the_command_line_names_an_option():
    """A whole command, such as `sinkbook fetch NAME --accept-license`, can be run from anywhere."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "cli.py":
            alone = [re.sub(rf"sinkbook ({COMMANDS})\b[^.;]*", "", text) for text in raised(path)]
            found += [f"{path.name}: {text}" for text in alone if re.search(r"--[a-z]", text)]
    assert found == []


@pytest.mark.parametrize(
    ("raised", "printed"),
    [
        ("Ask for `length=48` at most.", "Ask for --length 48 at most."),
        (
            "If you trust it, add `trust_remote_code=True`.",
            "If you trust it, add --trust-remote-code.",
        ),
        ("Ask for a smaller `length`.", "Ask for a smaller --length."),
        ("Write it as `random_queries=9`.", "Write it as `random_queries=9`."),
        ("Give a list: `model`.", "Give a list: `model`."),
    ],
)
def test_the_command_line_says_options_where_python_says_arguments(
    monkeypatch, capsys, raised, printed
):
    def fails(*_, **__):
        raise SinkbookError(raised)

    monkeypatch.setattr("sinkbook.data.corpora.fetch", fails)
    monkeypatch.setattr("sys.argv", ["sinkbook", "fetch", "prose-en"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"sinkbook: {printed}\n"
