"""The folder of a T5Gemma 2 checkpoint, read as data: config, tokenizer, weights, and the digest that names its states.

A folder is not trusted. What would have transformers run code, unpickle or look elsewhere is never followed: code that
``auto_map`` names is not run, weights are safetensors inside the folder, quantised ones and names of files elsewhere
are refused. Each error is a `ModelError` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2Config

from kalm_rag.errors import ModelError
from kalm_rag.models.files import blaming, digest_file, read_object
from kalm_rag.models.t5gemma2.protocol import TextTokens
from kalm_rag.models.t5gemma2.text_model import KEY_MAPPING, T5Gemma2TextReranker

_ADVICE = "Fetch the checkpoint again, or save it with save_pretrained()."
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_NOT_IN_A_STATE = frozenset(
    "_name_or_path architectures auto_map decoder dtype torch_dtype transformers_version vision_config".split()
)
"""Keys of config.json that leave every state of a passage as it is; whatever is not listed counts as changing it."""
_NOT_OURS = frozenset(
    "attn_implementation auto_map output_attentions output_hidden_states return_dict use_cache".split()
)
"""Keys of config.json that tell callers of transformers how to call; we call in one way."""
_IGNORED = re.compile(r"vision_tower|multi_modal_projector")
_ABORTS = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
"""Under a prefix, merges that don't fit it end the whole process inside the tokenizers library: no error to catch."""
_LAYER = re.compile(r"^model\.(encoder|decoder)\.(?:text_model\.)?layers\.(\d+)\.")


def read_config(folder: Path) -> T5Gemma2Config:
    """Read a checkpoint folder's config.

    Args:
        folder: Holds config.json and safetensors.

    Raises:
        ModelError: If the folder is no T5Gemma 2 checkpoint, has no safetensors, or its config can't be used.
    """
    weight_files(folder)
    path = folder / "config.json"
    found = read_object(path, _ADVICE)
    if found.get("model_type") != "t5gemma2":
        raise ModelError(
            f"{folder} is a {found.get('model_type')!r} checkpoint; wanted 't5gemma2' (KaLM-Reranker-V1). "
            f"Code that a folder brings along is never run."
        )
    if found.get("quantization_config") is not None:
        raise ModelError(
            f"{path} says quantization_config; only unquantised weights are read. Take the full checkpoint."
        )
    for part, wanted in (("encoder", "text_config"), ("decoder", "num_hidden_layers")):
        if not isinstance(found.get(part), dict) or wanted not in found[part]:
            raise ModelError(f"{path} has no {part} with {wanted}; wanted both halves of a T5Gemma 2. {_ADVICE}")
    with blaming(path, _ADVICE):
        config = T5Gemma2Config.from_dict(_without(found, _NOT_OURS))
        for half in (config.encoder.text_config, config.decoder):
            for key in ("sliding_window", "query_pre_attn_scalar"):
                if not getattr(half, key) > 0:
                    raise ModelError(f"{path} says {key} {getattr(half, key)!r}; wanted more than 0. {_ADVICE}")
    return config


def read_tokenizer(folder: Path, config: T5Gemma2Config) -> TextTokens:
    """Read a checkpoint folder's tokenizer.

    Args:
        folder: Holds tokenizer.json (or tokenizer.model) and tokenizer_config.json.
        config: Of the same folder.

    Raises:
        ModelError: If its files are missing, can't be used, name code or files elsewhere, or give more ids than the
            model has.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER[:2]):
        raise ModelError(f"{folder} has no tokenizer.json (or tokenizer.model). {_ADVICE}")
    for name in _TOKENIZER[2:]:
        if not (folder / name).is_file():
            continue
        for key, value in read_object(folder / name, _ADVICE).items():
            if key == "auto_map" and value is not None:
                raise ModelError(
                    f"{folder / name} names code (auto_map), which is never run. Drop the key, or the folder."
                )
            if key.endswith(("_file", "_files")) and key != "special_tokens_map_file" and value is not None:
                raise ModelError(
                    f"{folder / name} names {key} {value!r}; only the folder's own files are read. Drop it."
                )
    source = next(folder / name for name in _TOKENIZER if (folder / name).is_file())
    with blaming(source, _ADVICE):
        if _ABORTS.search(source.read_bytes()):
            raise ModelError(f"{source} says continuing_subword_prefix; wanted Gemma's tokenizer, without. {_ADVICE}")
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        largest, rows = max(tokenizer.get_vocab().values(), default=-1), config.encoder.text_config.vocab_size
        tokens = TextTokens(tokenizer)
    if not 0 <= largest < rows:
        raise ModelError(f"{source} gives ids up to {largest}; config.json says {rows} of them. {_ADVICE}")
    return tokens


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, in the order of their names.

    Raises:
        ModelError: If there are none, or the index names a file that is no safetensors of this folder.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        raise ModelError(
            f"{folder} has no .safetensors file that is the model ({_WEIGHTS} or {_INDEX}). Save the checkpoint with "
            f"save_pretrained(); pickles are refused."
        )
    shards = read_object(index, _ADVICE).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index} has no weight_map; wanted tensor names and their files. {_ADVICE}")
    names = set(map(str, shards.values()))
    for name in sorted(names):
        if not name.endswith(".safetensors") or set(name) & set("/\\") or not (folder / name).is_file():
            raise ModelError(
                f"{index} names {name!r}; wanted .safetensors files of this folder. Pickles and other folders' files "
                f"are never read. {_ADVICE}"
            )
    return [folder / name for name in sorted(names)]


def load_model(folder: Path, config: T5Gemma2Config, dtype: torch.dtype) -> T5Gemma2TextReranker:
    """Load a checkpoint's text weights, on the CPU.

    Raises:
        ModelError: If they can't be read, some are missing, or they are those of another config.
    """
    files = weight_files(folder)
    weights: dict[str, Tensor] = {}
    for path in files:
        with blaming(path, f"It could not be loaded. {_ADVICE}"), safe_open(path, "pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys() if not _IGNORED.search(name)}
    _check_weights(folder, weights, config)
    model: T5Gemma2TextReranker
    with blaming(folder, f"config.json and {files[0].name} don't fit each other. {_ADVICE}"):
        model, report = T5Gemma2TextReranker.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            attn_implementation="sdpa",
            key_mapping=KEY_MAPPING,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{folder} misses {len(missing)} weights (first: {missing[0]}); scores would be random. "
            f"Fetch or save the checkpoint again."
        )
    return model


def _check_weights(folder: Path, weights: dict[str, Tensor], config: T5Gemma2Config) -> None:
    """Refuse integers (quantised weights), and more or fewer layers than the config says: they would go unread."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{folder} holds {name} as {tensor.dtype}; wanted unquantised weights. {_ADVICE}")
    layers = [found.groups() for found in map(_LAYER.match, weights) if found]
    for part, half in (("encoder", config.encoder.text_config), ("decoder", config.decoder)):
        found = 1 + max((int(number) for own, number in layers if own == part), default=-1)
        if found != half.num_hidden_layers:
            raise ModelError(
                f"{folder} holds weights of {found} {part} layers; its config.json says {half.num_hidden_layers}. "
                f"{_ADVICE}"
            )


def digest_checkpoint(folder: Path) -> str:
    """Digest of everything in a folder that changes a state, hex: weights, tokenizer, and the encoder's config.

    Weights are hashed once per process. The decoder's weights are among them: a file isn't told apart by its halves.

    Raises:
        ModelError: If a file can't be read.
    """
    parts = {
        "weights": [digest_file(path) for path in weight_files(folder)],
        "tokenizer": {name: digest_file(folder / name) for name in _TOKENIZER if (folder / name).is_file()},
        "config": _without(read_object(folder / "config.json", _ADVICE), _NOT_IN_A_STATE | _NOT_OURS),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _without(content: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """A copy of a JSON object without some keys, at every level of objects."""
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in keys
    }
