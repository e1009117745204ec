"""From names to loaded models: one spelling of a device, a revision only where it means something, one copy of each."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, ModelError
from kalm_rag.models import registry
from kalm_rag.models.devices import parse_device, parse_devices
from kalm_rag.models.registry import CHECKPOINTS
from kalm_rag.states import check_dtype


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("current_device", 1), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was loaded, without loading it."""
    loaded: list[tuple[Any, ...]] = []
    monkeypatch.setattr(registry, "_load", lambda *asked: (loaded.append(asked), SimpleNamespace())[1])
    return loaded


def lend(name: str, **changes: Any) -> registry.Lease:
    return registry.acquire(
        name, **{"revision": None, "device": torch.device("cpu"), "dtype": torch.float32, **changes}
    )


def test_cpu_and_cpu_0_are_one_device(pico: Reranker) -> None:
    """``cpu:0`` loaded a second copy of a model that ``cpu`` had loaded."""
    assert parse_device("cpu:0") == parse_device(torch.device("cpu", 0)) == torch.device("cpu")
    assert parse_devices("cpu:0,cpu") == [torch.device("cpu")] * 2
    with Reranker.from_pretrained("pico", device="cpu:0") as engine:
        assert engine.backbone is pico.backbone


@pytest.mark.usefixtures("two_gpus")
def test_cuda_is_the_device_that_torch_takes() -> None:
    """``cuda`` and ``cuda:0`` loaded a model twice, and a device that isn't there failed in torch's words."""
    assert parse_device(None) == parse_device("cuda") == parse_device("cuda:1") == torch.device("cuda", 1)
    assert parse_devices("cuda:0,cuda") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(InputError, match="device is 'cuda:2', but this torch sees 2 CUDA devices, numbered from 0"):
        parse_device("cuda:2")


@pytest.mark.parametrize(
    "device", ["gpu", "", "cpu:", 1.5, object()], ids=["gpu", "empty", "no-index", "number", "object"]
)
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(InputError, match="device is "):
        parse_device(device)


@pytest.mark.parametrize("devices", [5, {"cpu": 0}, b"cpu"], ids=str)
def test_what_is_no_list_of_devices(devices: list[str]) -> None:
    with pytest.raises(InputError, match=r"device is .*; wanted a device or a list of them"):
        parse_devices(devices)


def test_a_revision_of_a_folder_is_refused(tiny_folder: Path, tiny: Reranker) -> None:
    """It was taken, meant nothing, and loaded the same folder a second time."""
    before = len(registry._slots)
    with pytest.raises(InputError, match=r"revision 'main' was given for the folder .*; leave it out"):
        Reranker.from_pretrained(str(tiny_folder), device="cpu", revision="main")
    with pytest.raises(InputError, match="which is as it is; leave it out"):
        registry.find_checkpoint(str(tiny_folder), "main")
    assert len(registry._slots) == before


def test_a_revision_of_pico_is_refused_shipped_or_trained(pico: Reranker, tmp_path: Path) -> None:
    """A folder of trained weights took a revision too, and loaded another copy for it."""
    pico.backbone.save(tmp_path)  # type: ignore[attr-defined]
    for name in ("pico", str(tmp_path)):
        with pytest.raises(InputError, match=r"revision 'v2' was given for .*; leave it out"):
            Reranker.from_pretrained(name, device="cpu", revision="v2")


@pytest.mark.parametrize("revision", ["", 3, b"main"], ids=str)
def test_what_is_no_revision(revision: str) -> None:
    with pytest.raises(InputError, match="wanted a commit, tag or branch"):
        lend("owner/name", revision=revision)


def test_the_pinned_revision_said_or_left_out_is_one_model(loads: list[tuple[Any, ...]]) -> None:
    first, second = lend("nano"), lend("nano", revision=CHECKPOINTS["nano"].revision)
    assert first.backbone is second.backbone
    assert len(loads) == 1
    for lease in (first, second):
        lease.release()


def test_a_folder_is_one_model_however_it_is_written(
    loads: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``~/model`` was taken for a model's name, and not found."""
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    leases = [lend(name) for name in ("model", f".{os.sep}model", "~/model", str(tmp_path / "model"))]
    assert len(loads) == 1
    for lease in leases:
        lease.release()


@pytest.mark.parametrize("name", ["a" * 5000, "\0", "~nobody-here-by-this-name/model"], ids=["long", "nul", "user"])
def test_names_that_no_file_system_takes(name: str) -> None:
    """A name of 5,000 characters came back as an OSError of the file system."""
    with pytest.raises(ModelError, match=r"no model named .{1,120}, and no such folder"):
        Reranker.from_pretrained(name)


def test_a_folder_may_be_a_path(tiny_folder: Path, tiny: Reranker) -> None:
    with Reranker.from_pretrained(tiny_folder, device="cpu") as engine:
        assert engine.backbone is tiny.backbone
    with pytest.raises(InputError, match="name is 5; wanted a model name, repository id or folder"):
        Reranker.from_pretrained(5)  # type: ignore[arg-type]


def test_dtypes_have_one_table() -> None:
    assert check_dtype("fp32") is check_dtype("float32") is check_dtype(torch.float32) is check_dtype(None)
    assert check_dtype("bf16") is check_dtype("bfloat16") is check_dtype(None, torch.bfloat16)
    for dtype in ("fp16", "float16", torch.float16):
        with pytest.raises(InputError, match=r"dtype is float16; .*Use float32 or bfloat16"):
            check_dtype(dtype)
    for unknown in ("int8", "half", torch.int8, 3):
        with pytest.raises(InputError, match=r"dtype is .*; wanted 'fp32' or 'bf16'"):
            check_dtype(unknown)  # type: ignore[arg-type]
