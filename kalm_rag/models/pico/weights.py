"""pico's weights on disk: a folder of ``pico.safetensors`` and ``config.json``, written and read whole or not at all.

The decoder is kept in bfloat16, the word codes' map in float32; the encoder has files of its own and is not copied.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kalm_rag.errors import ModelError
from kalm_rag.models.files import blaming, digest_file, read_object
from kalm_rag.models.pico.config import DecoderConfig
from kalm_rag.models.pico.decoder import PicoDecoder
from kalm_rag.models.pico.word_codes import WordCodes

FORMAT_VERSION = 3
"""Version of the weights folder: ``pico.safetensors`` and ``config.json``."""

_ADVICE = "Install the package again, or pass the folder that kalm-rag train wrote."
_WEIGHTS = "pico.safetensors"
_FORMER_NAMES = {"look.weight": "probes.weight"}
_CENTRE, _PROJECTION = "codes.centre", "codes.projection"


def read_weights(folder: Path | str | None, embeddings: Tensor) -> tuple[PicoDecoder, WordCodes]:
    """Read a weights folder, checked against the digest in its config.

    Args:
        folder: The folder; None takes the shipped one.
        embeddings: The encoder's word embeddings, ``(V, H)``, which the word codes are made of.

    Returns:
        The decoder in float32 and the word codes, on the CPU.

    Raises:
        ModelError: If a file is missing, damaged, or of a version or kind this release doesn't read.
    """
    path = Path(str(resources.files("kalm_rag.models.pico") / "weights")) if folder is None else Path(folder)
    content = read_object(path / "config.json", _ADVICE)
    if content.get("format") != FORMAT_VERSION:
        raise ModelError(
            f"{path} has weights of format {content.get('format')!r}; this release reads {FORMAT_VERSION}. {_ADVICE}"
        )
    found = digest_file(path / _WEIGHTS)
    if found != content.get("sha256"):
        raise ModelError(f"{path / _WEIGHTS} has sha256 {found}; its config says {content.get('sha256')}. {_ADVICE}")
    with blaming(path, _ADVICE):
        config = DecoderConfig.from_dict(content["decoder"])
        tensors = {_FORMER_NAMES.get(name, name): one.float() for name, one in load_file(path / _WEIGHTS).items()}
        if tensors.pop("lexical_scale", torch.tensor(0.0)) != 0:
            raise ModelError(f"{path} adds a lexical score, which this release hasn't got. Train the weights anew.")
        codes = WordCodes(embeddings, tensors.pop(_CENTRE), tensors.pop(_PROJECTION))
        with torch.device("meta"):  # sizes are compared before memory is taken
            decoder = PicoDecoder(config)
        decoder.load_state_dict(tensors, assign=True)
        if (config.vocab, config.code_size) != codes.table.shape:
            raise ModelError(f"{path} has codes {tuple(codes.table.shape)}; its config says {config}. {_ADVICE}")
    return decoder, codes


def write_weights(folder: Path, decoder: PicoDecoder, codes: WordCodes) -> None:
    """Write what `read_weights` reads.

    Args:
        folder: Where to; made if missing.
        decoder: Rounded to bfloat16, but for rarities (float16) and calibration.
        codes: Its word codes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in decoder.state_dict().items()}
    tensors |= {"idf": decoder.idf.half(), "calibration": decoder.calibration.float()}
    tensors |= {_CENTRE: codes.centre, _PROJECTION: codes.projection.contiguous()}
    path = folder / _WEIGHTS
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, which would make an installed package unreadable to others
    config = {
        "format": FORMAT_VERSION,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "decoder": decoder.config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
