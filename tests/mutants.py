"""Planted defects that the suite must find, on demand: `make mutants`. A check is useless if no test fails without it.

`python -m tests.mutants s3_sqlite` tries those of files whose path contains that text.

Each mutant replaces a text in a file, runs the tests that should notice, and restores the file. The mutants are in
`mutants_of_stores`, `mutants_of_blobs`, `mutants_of_files`, `mutants_of_packs`
and `mutants_of_app`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .mutants_of_app import APP_MUTANTS
from .mutants_of_blobs import BLOB_MUTANTS
from .mutants_of_files import FILE_MUTANTS
from .mutants_of_packs import PACK_MUTANTS
from .mutants_of_stores import STORE_MUTANTS

ROOT = Path(__file__).parent.parent
MUTANTS = [*STORE_MUTANTS, *BLOB_MUTANTS, *FILE_MUTANTS, *PACK_MUTANTS, *APP_MUTANTS]


def main() -> None:
    survived = 0
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, file, old, new, tests in MUTANTS:
        if wanted not in file:
            continue
        path = ROOT / file
        source = path.read_text()
        if old not in source:
            sys.exit(f"{name}: {old!r} is not in {file} any more; write the mutant again")
        path.write_text(source.replace(old, new))
        try:
            run = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            killed = subprocess.run(run, cwd=ROOT, capture_output=True, check=False).returncode != 0
        finally:
            path.write_text(source)
        survived += not killed
        print(f"{'killed  ' if killed else 'SURVIVED'} {name}", flush=True)
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
