"""The text of KaLM-Reranker-V1's protocol: templates, limits, and token ids that no text of a user can break.

Protocol: arXiv 2606.22807 and the model cards of ``KaLM-Embedding/KaLM-Reranker-V1-*``. Knows tokenizers, no model.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from kalm_rag.errors import InputError

PASSAGE_TEMPLATE = "<Document>: {passage}"
PROMPT_TEMPLATE = "<bos><start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n\n\n\n"
HEAD_TEMPLATE = "{system}\n\n<Instruct>: {task}\n<Query>:"
USER_TEMPLATE = HEAD_TEMPLATE + " {query}"
MAX_PASSAGE_TOKENS = 1024
MAX_QUERY_TOKENS = 512
MAX_INSTRUCTION_TOKENS = 1024
"""Where a system text (judge sentence included) and a task are cut, each for itself. The protocol names no limit, but
memory grows with the square of the prompt: 10,000 tokens took 2.6 GB."""
_TURN_MARKERS = ("<bos>", "<start_of_turn>", "<end_of_turn>")
_MOST_CUT_TEXTS = 100

logger = logging.getLogger(__name__)


class TextTokens:
    """Tokenises by the protocol; special tokens inside user text are plain text, never control.

    Works on the `tokenizers` object itself with padding and truncation off: the transformers wrapper sets them
    per call, which is what makes it fail with "Already borrowed" across threads.

    Args:
        tokenizer: Transformers' fast tokenizer of the checkpoint; not changed.

    Raises:
        InputError: If it is not one that the protocol can be written with.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - PreTrainedTokenizerFast is untyped
        if not getattr(tokenizer, "is_fast", False):
            raise InputError("it is no fast tokenizer (tokenizer.json); convert it with transformers.")
        self._plain: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.no_padding()
        self._plain.no_truncation()
        self._inert: Tokenizer | None = None
        self._lock = threading.Lock()
        self._cut_texts: set[str] = set()  # those that the log has told
        self._markers = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else 0
        self.yes_id, self.no_id = self._last_id("yes"), self._last_id("no")
        if self.yes_id == self.no_id:
            raise InputError("it gives 'yes' and 'no' one token id; a yes/no reranker needs two.")
        missing = [marker for marker in _TURN_MARKERS if self._plain.token_to_id(marker) is None]
        if missing:
            raise InputError(f"it has no token {' or '.join(missing)}; the protocol is written with them.")

    def _last_id(self, word: str) -> int:
        return int(self._plain.encode(word, add_special_tokens=False).ids[-1])

    def has_markers(self, text: str) -> bool:
        """Whether the text spells one of the tokenizer's special tokens."""
        return any(marker in text for marker in self._markers)

    def ids(self, text: str, *, inert: bool = False) -> list[int]:
        """Token ids of a text; with `inert`, special tokens in it are read as ordinary characters."""
        tokenizer = self._inert_tokenizer() if inert else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` behind each token of a user text, special tokens inert."""
        tokenizer = self._inert_tokenizer() if self.has_markers(text) else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).offsets)

    def ids_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of user texts, special tokens inert, in parallel."""
        marked = {i for i, text in enumerate(texts) if self.has_markers(text)}
        clean = [text for i, text in enumerate(texts) if i not in marked]
        encoded = iter(self._plain.encode_batch(clean, add_special_tokens=False))
        return [self.ids(text, inert=True) if i in marked else list(next(encoded).ids) for i, text in enumerate(texts)]

    def cut_query(self, query: str) -> str:
        """Cut a query to `MAX_QUERY_TOKENS` before it enters the template, so that the suffix is never cut."""
        ids = self.ids(query, inert=self.has_markers(query))
        if len(ids) <= MAX_QUERY_TOKENS:
            return query
        return str(self._plain.decode(ids[:MAX_QUERY_TOKENS], skip_special_tokens=False))

    def total_tokens(self, text: str) -> int:
        """How many tokens a user text has, special tokens inert."""
        return len(self.ids(text, inert=self.has_markers(text)))

    def cut_instruction(self, text: str, name: str) -> str:
        """Cut a system text or a task to `MAX_INSTRUCTION_TOKENS`; the log says so once per text.

        Args:
            text: The whole text.
            name: How to name it in the log.
        """
        if len(text.encode()) <= MAX_INSTRUCTION_TOKENS:  # a token is a byte at least
            return text
        offsets = self.offsets(text)
        if len(offsets) <= MAX_INSTRUCTION_TOKENS:
            return text
        if text not in self._cut_texts:
            if len(self._cut_texts) >= _MOST_CUT_TEXTS:
                self._cut_texts.clear()
            self._cut_texts.add(text)
            logger.warning("the %s has %d tokens; the first %d are read.", name, len(offsets), MAX_INSTRUCTION_TOKENS)
        return text[: offsets[MAX_INSTRUCTION_TOKENS][0]]

    def prompt_ids(self, user: str) -> list[int]:
        """Token ids of the whole decoder input around the user's part."""
        if not self.has_markers(user):
            return self.ids(PROMPT_TEMPLATE.format(user=user))  # one string, as published
        # The turn markers are atomic and split the text before anything else, so tokenising the pieces between
        # them apart gives the ids of the whole; only the user's piece is read with its markers as plain text.
        before, after = PROMPT_TEMPLATE.split("user\n{user}")
        return [*self.ids(before), *self.ids(f"user\n{user}", inert=True), *self.ids(after)]

    def head_ids(self, head: str) -> list[int]:
        """Token ids that a decoder input begins with whose user part begins with `head`."""
        before, _ = PROMPT_TEMPLATE.split("{user}")
        if not self.has_markers(head):
            return self.ids(before + head)
        turn = before.removesuffix("user\n")
        return [*self.ids(turn), *self.ids(f"user\n{head}", inert=True)]

    def _inert_tokenizer(self) -> Tokenizer:
        with self._lock:  # a second copy costs memory, so it is made when the first such text comes
            if self._inert is None:
                copy = Tokenizer.from_str(self._plain.to_str())
                copy.encode_special_tokens = True
                self._inert = copy
            return self._inert
