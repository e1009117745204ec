"""Python code in processes of its own that have the big imports behind them: each import again takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

IMPORTS = ["kalm_rag.index.chroma_index", "kalm_rag.models.t5gemma2.backbone", "kalm_rag.store.sqlite"]
PATHS = [str(Path(__file__).parent), str(Path(__file__).parent / "index")]
"""Where the code finds helpers of tests: `stores`, `toy`."""


def prepared(*modules: str) -> BaseContext:
    """Starts processes, forked from a server that has imported these modules, and those of the first who asked."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTS, *modules])
    return context


class Script:
    """Code that runs as with ``python -c``: it reads `arguments` in ``sys.argv``, prints to `stdout`, can be killed."""

    def __init__(self, code: str, *arguments: object) -> None:
        context = prepared()
        told, stdin = context.Pipe(duplex=False)
        stdout, printed = context.Pipe(duplex=False)
        argv = ["-c", *map(str, arguments)]
        self._process = context.Process(target=_run, args=(code, argv, told, printed), daemon=True)
        self._process.start()
        told.close(), printed.close()  # the process has them: they end when it does
        self.stdin = os.fdopen(os.dup(stdin.fileno()), "w")
        self.stdout = os.fdopen(os.dup(stdout.fileno()))
        stdin.close(), stdout.close()

    def tell(self, line: str) -> None:
        """Write a line that the code reads from ``sys.stdin``."""
        self.stdin.write(line + "\n")
        self.stdin.flush()

    def kill(self) -> str:
        """Kill it with SIGKILL, and give what it has printed that nobody has read."""
        self._process.kill()
        self._process.join()
        return self._rest()

    def finish(self) -> str:
        """Wait for its end, which is no failure, and give what it has printed that nobody has read."""
        rest = self._rest()
        self._process.join(300)
        assert self._process.exitcode == 0, rest  # the traceback is on stderr
        return rest

    def _rest(self) -> str:
        with self.stdin, self.stdout:
            return self.stdout.read()


def _run(code: str, argv: list[str], told: Connection, printed: Connection) -> None:
    sys.path[:0] = PATHS
    sys.argv = argv
    with open(told.fileno(), closefd=False) as sys.stdin, open(printed.fileno(), "w", closefd=False) as sys.stdout:
        exec(code, {"__name__": "__main__"})
