"""A cold start imports only the modules that it uses. The benchmarks measure its duration."""

from __future__ import annotations

import json
import os
import subprocess
import sys

HEAVY = (
    *("boto3", "botocore", "pulumi", "psycopg", "redis", "aio_pika"),
    *("uvicorn", "uvloop", "httptools", "cyclopts", "rich", "ministack", "httpx", "fastapi_offline", "jsonpatch"),
    *("unittest", "pdb", "sqlite3", "multiprocessing", "app.cli", "app.dev.local_s3"),
)


def imported(statement: str) -> set[str]:
    outputs = {"version": 1, "storage": "s3-sqlite", "bucket": "b", "auth": {"mode": "none"}}
    environment = {"PATH": os.environ["PATH"], "CRUDSTACK_OUTPUTS": json.dumps(outputs)}
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_handler_imports_no_unused_heavy_module():
    modules = imported("import app.handler")
    assert {"app.handler", "fastapi", "mangum", "obstore", "apsw"} <= modules
    assert not modules & set(HEAVY)


def test_the_engine_on_disk_does_not_load_the_modules_of_s3():
    modules = imported("from app.autocrud import AutoCRUD")
    assert "app.autocrud.core" in modules
    assert not modules & {*HEAVY, "obstore", "mangum", "app.autocrud.resource_manager.backends.s3.object_store"}
