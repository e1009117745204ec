"""Frameworks' own suites: no sockets, and coroutine tests run here without a change of the global asyncio mode."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run coroutine tests of this folder, whether pytest-asyncio is there or not."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


@pytest.fixture(autouse=True)
def _no_sockets() -> Iterator[None]:
    pytest_socket = pytest.importorskip("pytest_socket", reason="pytest-socket is not installed (extra 'dev')")
    pytest_socket.disable_socket(allow_unix_socket=True)  # event loops talk to themselves over one
    yield
    pytest_socket.enable_socket()
