#!/usr/bin/env bash
# Wheel and sdist, built in a clean environment; each is installed alone, and probes a model.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
rm -rf build/dist build/dist-tried
"${PYTHON:-python3}" -m venv build/dist-tried/builder
build/dist-tried/builder/bin/pip install --quiet build
build/dist-tried/builder/bin/python -m build --outdir build/dist .
for made in build/dist/*.whl build/dist/*.tar.gz; do
  place=build/dist-tried/${made##*.}
  "${PYTHON:-python3}" -m venv "$place"
  "$place/bin/pip" install --quiet --constraint constraints.txt torch
  "$place/bin/pip" install --quiet --constraint constraints.txt "$made"
  (
    cd "$place"   # where no copy of the repository is in the way
    bin/sinkbook --version
    bin/python -c "import sinkbook; assert '$root/sinkbook' not in sinkbook.__file__"
    bin/sinkbook probe smollm2-135m --json > probe.json
    bin/python -c "import json; assert json.load(open('probe.json'))"
    bin/sinkbook claims > claims.txt && test -s claims.txt
  )
  echo "$made: installed and tried"
done
