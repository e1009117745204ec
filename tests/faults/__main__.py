"""The fault table: ``make faults``, or ``python -m faults [PART ...] [--scale 0.2]`` with ``tests`` on the path.

Each part runs in a process of its own, so that one that hangs is told and the others go on. Exits with 1 on a wrong
score, a lost record, a hang, an exception that is not ours, or a leak.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore::UserWarning")

from faults.table import Bench, Row, print_table

LIMIT = 600.0
"""Seconds after which a part counts as hanging; more with a larger scale."""
PARTS = {
    "kills": ("kills", "kill -9 at each point of add, upsert, delete, gc, backfill, rebuild"),
    "cli": ("kills", "kill -9 at each point of kalm-rag index, with pico"),
    "writers": ("processes", "two processes that add and delete"),
    "reader": ("processes", "a reader beside a process that writes"),
    "collectors": ("processes", "two processes that sweep beside one that adds"),
    "flips": ("damage", "changed bytes in the state store"),
    "full": ("damage", "no room left on the disk"),
    "storms": ("load", "tasks cancelled over aquery, arank and aupsert"),
    "queries": ("load", "3,000 queries: memory, descriptors and threads"),
    "fuzz": ("fuzz", "9,000 inputs that nobody should send"),
    "stuffing": ("stuffing", "passages that repeat the query, under pico (measured, nothing fails)"),
}


def main() -> int:
    """Run the parts that were asked for."""
    told = "\n".join(f"  {name:12}{what}" for name, (_, what) in PARTS.items())
    parser = argparse.ArgumentParser(
        "faults", description=f"parts:\n{told}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many trials")
    parser.add_argument("--data", type=Path, help="BEIR folder with real questions, for the stuffing part")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if options.alone is not None:
        return _alone(options.parts[0], Path(options.alone), options.scale, options.data)
    with tempfile.TemporaryDirectory(prefix="kalm-faults-") as folder:
        from checkpoints import save_tiny

        save_tiny(Path(folder, "tiny"))
        rows = [_run(name, folder, options.scale, options.data) for name in options.parts or PARTS]
    print_table(rows)
    return int(any(row.failed for row in rows))


def _run(name: str, folder: str, scale: float, data: Path | None) -> Row:
    """One part in a process of its own, with all that it starts."""
    print(f"{name}: {PARTS[name][1]} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "faults", name, "--alone", folder, "--scale", str(scale)]
    command += ["--data", str(data)] if data is not None else []
    result, begin = Path(folder, f"{name}.json"), time.monotonic()
    with (
        Path(folder, f"{name}.out").open("w+") as out,
        subprocess.Popen(command, stdout=out, start_new_session=True) as process,
    ):
        try:
            code = process.wait(LIMIT * max(1.0, scale))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = None
    if result.exists():
        import json

        row = Row(**json.loads(result.read_text()))
    else:
        row = Row(part=name)
        row.add("hangs" if code is None else "foreign", "not done in time" if code is None else f"exit code {code}")
    row.seconds = time.monotonic() - begin
    return row


def _alone(name: str, folder: Path, scale: float, data: Path | None) -> int:
    bench = Bench(folder / name, folder / "tiny", scale, Row(part=name), data)
    bench.folder.mkdir()
    getattr(importlib.import_module(f"faults.{PARTS[name][0]}"), name)(bench)
    Path(folder, f"{name}.json").write_text(bench.row.dump())
    return 0


if __name__ == "__main__":
    sys.exit(main())
