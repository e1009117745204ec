"""A checkpoint's folder, whoever made it: nothing in it is run, what it names is checked, damage is named."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tiny
from safetensors.torch import load_file, save_file

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import ModelError
from kalm_rag.models import files

Change = Callable[[Path], None]
SHARDS = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def load(folder: Path) -> Reranker:
    return Reranker.from_pretrained(str(folder), device="cpu")


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def put(name: str, *path: str, value: object) -> Change:
    """A change of one value in a JSON file, at a path of keys."""

    def change(folder: Path) -> None:
        def inner(content: dict[str, Any]) -> None:
            for key in path[:-1]:
                content = content[key]
            content[path[-1]] = value

        edit(folder / name, inner)

    return change


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def halve(name: str) -> Change:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def reweigh(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """A change of the tensors in the weights' file."""

    def inner(folder: Path) -> None:
        weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return inner


@pytest.mark.parametrize("kind", ["config", "tokenizer", "known model"])
def test_code_in_a_folder_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`auto_map` made transformers ask "run the custom code?" on stdin, and a "y" there ran the folder's file."""
    mark = folder.parent / "was_run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n")
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *prompt: asked.append(prompt) or "y")
    if kind == "tokenizer":
        own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        edit(folder / "tokenizer_config.json", lambda content: content.update(own))
    else:
        own = {"auto_map": {"AutoConfig": "evil.Evil"}} | ({"model_type": "evil"} if kind == "config" else {})
        edit(folder / "config.json", lambda content: content.update(own))
    if kind == "config":
        with pytest.raises(ModelError, match=r"'evil' checkpoint; wanted 't5gemma2'.*never run"):
            load(folder)
    elif kind == "tokenizer":
        with pytest.raises(ModelError, match=r"tokenizer_config\.json names code \(auto_map\), which is never run"):
            load(folder)
    else:
        with load(folder) as engine:  # the folder is sound without its code, which is left alone
            assert engine.rank("a", ["b"])
    assert not asked
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../model.safetensors", "/tmp/model.safetensors", "gone.safetensors"]
)
def test_an_index_names_safetensors_of_its_folder_or_is_refused(tmp_path: Path, name: str) -> None:
    """`model.safetensors.index.json` could name a pickle, which was then read, or a file of another folder."""
    folder = save_tiny(tmp_path / "sharded", max_shard_size="10KB")
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    edit(folder / SHARDS, lambda content: content["weight_map"].update({"lm_head.out_proj.weight": name}))
    with pytest.raises(ModelError, match=rf"index\.json names '{name}'; wanted \.safetensors files of this folder"):
        load(folder)


def test_files_elsewhere_are_not_read_as_the_tokenizer(folder: Path) -> None:
    """`tokenizer_file` in tokenizer_config.json led to a file that neither the folder nor the fingerprint holds."""
    put("tokenizer_config.json", "tokenizer_file", value=str(folder.parent / "other.json"))(folder)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json names tokenizer_file .*Drop it"):
        load(folder)


TEXT = ("encoder", "text_config")
CHANGES_A_STATE: dict[str, Change] = {
    "window": put("config.json", *TEXT, "sliding_window", value=8),
    "eps": put("config.json", *TEXT, "rms_norm_eps", value=0.5),
    "end of image": put("config.json", "encoder", "eoi_token_index", value=1),
    "merges": put("tokenizer.json", "model", "merges", value=[]),
    "pad": put("tokenizer_config.json", "pad_token", value="<eos>"),
    "weights": reweigh(lambda weights: weights["model.encoder.norm.weight"].add_(0.5)),
}


@pytest.mark.parametrize("change", CHANGES_A_STATE.values(), ids=CHANGES_A_STATE)
def test_whatever_changes_a_state_is_in_the_fingerprint(folder: Path, change: Change) -> None:
    """A folder was named by its weights alone: another tokenizer or config under them read the old states."""
    with load(folder) as engine:
        before = engine.info.fingerprint
    change(folder)
    with load(folder) as engine:
        assert engine.info.fingerprint != before


def test_what_changes_no_state_is_not_in_the_fingerprint(folder: Path, tiny: Reranker) -> None:
    put("config.json", "transformers_version", value="9.9")(folder)
    put("config.json", "decoder", "final_logit_softcapping", value=3.0)(folder)
    write("generation_config.json", b"{}")(folder)
    write("README.md", b"about")(folder)
    with load(folder) as engine:
        assert engine.info.fingerprint == tiny.info.fingerprint


def test_files_are_hashed_once_and_again_when_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    plain = Path.open

    def counting(self: Path, *args: Any, **kwargs: Any) -> Any:
        read.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    weights = folder / "model.safetensors"
    first = files.digest_file(weights)
    assert files.digest_file(weights) == first
    assert len(read) == 1
    weights.write_bytes(weights.read_bytes() + b" ")
    assert files.digest_file(weights) != first


JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
SPOILT: dict[str, Callable[[str], Change]] = {
    "empty": lambda name: write(name, b""),
    "cut": halve,
    "binary": lambda name: write(name, bytes(range(256))),
    "a list": lambda name: write(name, b"[]"),
    "too deep": lambda name: write(name, b"[" * 100_000),
}
DAMAGE: dict[str, tuple[Change, str]] = {
    **{f"{name} {kind}": (spoil(name), name) for name in JSON_FILES for kind, spoil in SPOILT.items()},
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no readable config\.json: there is no such file"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "a folder for weights": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()) and None,
        "no .safetensors file",
    ),
    "empty weights": (write("model.safetensors", b""), r"model\.safetensors can't be used.*could not be loaded"),
    "cut weights": (halve("model.safetensors"), "could not be loaded"),
    "layers gone": (
        reweigh(lambda weights: [weights.pop(name) for name in list(weights) if "decoder.layers.2" in name]),
        "weights of 2 decoder layers; its config.json says 3",
    ),
    "more layers than told": (
        lambda folder: edit(
            folder / "config.json",
            lambda content: content["decoder"].update(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        ),
        r"of 3 decoder layers; its config\.json says 2",
    ),
    "no scale": (put("config.json", "decoder", "query_pre_attn_scalar", value=-1), "query_pre_attn_scalar -1"),
    "endless layers": (put("config.json", "decoder", "num_hidden_layers", value=10**9), "config"),
    "a shape": (reweigh(lambda weights: weights.update({"model.encoder.norm.weight": torch.ones(3)})), "don't fit"),
    "integers": (
        reweigh(lambda weights: weights.update({"model.encoder.norm.weight": torch.ones(16, dtype=torch.int8)})),
        "as torch.int8; wanted unquantised",
    ),
    "width": (put("config.json", *TEXT, "hidden_size", value="16"), "config.json can't be used"),
    "no width": (put("config.json", "decoder", "hidden_size", value=0), "config"),
    "heads": (put("config.json", "decoder", "num_attention_heads", value=-1), "config"),
    "window": (put("config.json", *TEXT, "sliding_window", value=None), "config.json"),
    "half": (put("config.json", "encoder", value=[]), r"config\.json has no encoder with text_config"),
    "vocabulary": (put("config.json", *TEXT, "vocab_size", value=4), "config"),
    "quantised": (put("config.json", "quantization_config", value={"quant_method": "gptq"}), "quantization_config"),
    "tokens the model hasn't got": (
        put("tokenizer.json", "model", "vocab", "<new>", value=9999),
        r"tokenizer\.json gives ids up to 9999; config\.json says 272",
    ),
    "a prefix that ends the process": (
        put("tokenizer.json", "model", "continuing_subword_prefix", value="##"),
        r"tokenizer\.json says continuing_subword_prefix",
    ),
    "no turns": (
        lambda folder: [
            (folder / name).write_text((folder / name).read_text().replace("<start_of_turn>", "<turn>"))
            for name in ("tokenizer.json", "tokenizer_config.json")
        ]
        and None,
        r"tokenizer\.json can't be used.*no token <start_of_turn>",
    ),
    "no vocabulary": (put("tokenizer.json", "model", "vocab", value={}), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), DAMAGE.values(), ids=DAMAGE)
def test_broken_folders_are_named(folder: Path, change: Change, match: str) -> None:
    """10 of 25 broken folders ended in an exception of transformers, tokenizers or safetensors."""
    change(folder)
    with pytest.raises(ModelError, match=rf"(?s){match}.*(Fetch|Take|Save)"):
        load(folder)
