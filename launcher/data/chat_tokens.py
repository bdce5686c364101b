"""Turn a conversation into token ids, and into a mask of the tokens that are learned."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.chat_template import MARKS, ChatTemplate
from launcher.data.conversation import BadConversation, Conversation, parsed, texts_in
from launcher.data.tokenizer import Tokenizer

Mask = npt.NDArray[np.uint8]  # 1 for a token that is learned, else 0

ENDS_INSIDE = "has the token that ends documents"


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes conversations with a template and a tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, (*MARKS, *self.tokenizer.control_tokens))))

    def encode(self, record: dict[str, Any]) -> tuple[npt.NDArray[Any], Mask, int]:
        """Return ids (tokens,), mask (tokens,) and the number of characters. Raises BadConversation.

        A token is learned if a part of it belongs to the assistant. The end of the document is added where
        the template does not write it, and is learned if the token before it is. The first token is never
        learned: no token predicts it.
        """
        example = parsed(record)
        if match := next(filter(None, map(self._control.search, texts_in(vars(example)))), None):
            raise BadConversation(f"spells the control token {match[0]!r}, which only the template may write")
        if isinstance(example, Conversation):
            text, spans = self.template.write(example)
        else:
            text = example.prompt + example.completion
            spans = [(len(example.prompt), len(text))]
        ids, starts, ends = self._encoded(text)
        mask = np.zeros(len(ids), np.uint8)
        for start, end in spans:
            mask[(ends > start) & (starts < end)] = 1
        ids, mask = self._with_end(ids, mask)
        mask[0] = 0
        if not mask.any():
            raise BadConversation("has no token of the assistant, so there is nothing to learn")
        return ids, mask, len(text)

    def _encoded(self, text: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        try:
            return self.tokenizer.encode_with_places(text)
        except UnicodeError:
            raise BadConversation("contains half a character (a lone surrogate)") from None

    def _with_end(self, ids: npt.NDArray[Any], mask: Mask) -> tuple[npt.NDArray[Any], Mask]:
        end = self.tokenizer.end_of_document
        if (ids[:-1] == end).any():
            spelling = self.tokenizer.end_spelling
            raise BadConversation(f"{ENDS_INSIDE}, {spelling!r}, before its end")
        if len(ids) and ids[-1] == end:
            return ids, mask
        return np.append(ids, ids.dtype.type(end)), np.append(mask, mask[-1:] if len(mask) else np.uint8(0))
