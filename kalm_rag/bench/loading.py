"""Memory that loading takes: our text-only reader against transformers reading the whole checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from kalm_rag.bench.report import Row
from kalm_rag.errors import KalmRagError
from kalm_rag.models.devices import parse_dtype

_LOADERS = {
    "whole": "from transformers import T5Gemma2ForConditionalGeneration as model\n"
    "held = model.from_pretrained(folder, dtype=dtype)",
    "text": "from kalm_rag import Reranker\nheld = Reranker.from_pretrained(folder, device='cpu', dtype=dtype)",
}
_REPORT = (
    "import sys\n"
    "from kalm_rag.bench.measuring import peak_resident_bytes, resident_bytes\n"
    "folder, dtype = sys.argv[1:]\n"
    "{load}\n"
    "sys.stdout.write(f'{{resident_bytes()}} {{peak_resident_bytes()}}')\n"
)


def bench_loading(folder: Path, dtype: str) -> list[Row]:
    """Memory of a fresh process once the checkpoint is loaded: whole by transformers, and its text part by us.

    Args:
        folder: The checkpoint.
        dtype: ``"fp32"`` or ``"bf16"``.

    Raises:
        KalmRagError: If a process fails; its last words are in the message.
    """
    rows = []
    mapped = "; weights of the file's own dtype are mapped, and count once they are used" if dtype == "bf16" else ""
    long = str(parse_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")
    for way, what in (("whole", "whole, by transformers"), ("text", "text, by Reranker")):
        code = _REPORT.format(load=_LOADERS[way])
        run = subprocess.run(
            [sys.executable, "-c", code, str(folder), long], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise KalmRagError(f"loading the checkpoint in a process of its own failed: {run.stderr.strip()[-500:]}")
        held, peak = run.stdout.split()
        if held == "None":  # only Linux tells
            return []
        rows.append(
            Row(
                key=f"nano.load.{dtype}.{way}",
                group=f"KaLM-Nano's shape, {dtype}: memory resident in a fresh process that loaded it",
                what=what,
                stage="load",
                peak_bytes=int(held),
                baseline=f"nano.load.{dtype}.whole" if way == "text" else None,
                note=f"at most {int(peak) / 1e6:,.0f} MB while loading{mapped}",
            )
        )
    return rows
