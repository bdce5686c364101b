"""Pack conversations into windows. Only tokens of the mask are labels.

A window of T + 1 tokens is filled with whole conversations in their order, until the next does not fit; what
is left of it is filled with end tokens, which are no labels. Of a conversation that is longer than a window
only the first T + 1 tokens are used; if none of them is learned, the conversation is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.numbers import IGNORED_LABEL
from launcher.config.sequence_order import Part
from launcher.data.sampler import part_of_pair
from launcher.data.token_file import TokenFile
from launcher.data.windows import Stretch, check_ids

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class ChatTokens:
    """Conversations as tokens and mask, one after the other: in memory, or mapped from token files."""

    name: str  # for messages
    starts: Places  # the index of each conversation's first token, and the number of tokens: (n + 1,)
    file: TokenFile | None = None
    in_memory: tuple[npt.NDArray[Any], npt.NDArray[np.uint8]] | None = None  # (tokens,) twice

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def tokens(self) -> npt.NDArray[Any]:
        return self.in_memory[0] if self.in_memory else self._mapped.tokens

    @property
    def mask(self) -> npt.NDArray[np.uint8]:
        return self.in_memory[1] if self.in_memory else self._mapped.mask

    @property
    def _mapped(self) -> TokenFile:
        assert self.file is not None
        return self.file

    def mask_of(self, start: int, end: int) -> npt.NDArray[np.uint8]:
        """Return the mask of tokens [start, end). Raises ConfigError for a byte that is neither 0 nor 1."""
        mask = self.mask[start:end]
        if mask.size and mask.max() > 1:
            place = start + int((mask > 1).argmax())
            why = f"{self.name} has the byte {int(mask.max())} at {place}, and a mask has only 0 and 1"
            raise ConfigError("data.train", self.name, why, "launcher prepare SOURCE TARGET chat=true, again")
        return mask


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class PackedChats:
    """The windows into which the conversations from `first` to before `last` are packed."""

    chats: ChatTokens
    first: int
    last: int
    sequence_length: int  # T
    end_of_document: int
    vocab_size: int

    @cached_property
    def _kept(self) -> tuple[Places, Places]:
        """Start and number of tokens of each conversation that is used (k,), (k,)."""
        starts = self.chats.starts[self.first : self.last + 1]
        lengths, most = np.diff(starts), self.sequence_length + 1
        is_used = lengths <= most
        for number in (~is_used).nonzero()[0].tolist():
            start = int(starts[number])
            is_used[number] = self.chats.mask_of(start + 1, start + most).any()
        return starts[:-1][is_used], np.minimum(lengths, most)[is_used]

    @cached_property
    def _firsts(self) -> Places:
        """The first conversation of each window, and the number of conversations: (windows + 1,)."""
        ends = np.cumsum(self._kept[1])
        firsts, filled = [0], 0
        while firsts[-1] < len(ends):
            number = int(np.searchsorted(ends, filled + self.sequence_length + 1, side="right"))
            filled = int(ends[number - 1])
            firsts.append(number)
        return np.array(firsts, np.int64)

    @property
    def left_out(self) -> int:
        """The number of conversations without a learned token in a window."""
        return self.last - self.first - len(self._kept[0])

    @property
    def cut(self) -> int:
        """The number of conversations of which only the first part is used."""
        starts = self.chats.starts[self.first : self.last + 1]
        return int((np.diff(starts) > self.sequence_length + 1).sum()) - self.left_out

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def read(
        self, places: Places, part: Part | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return inputs (B, T) and labels (B, T) of windows `places` (B,), or only their `part`.

        Raises ConfigError for a token id that the model's vocabulary does not have.
        """
        tokens = np.full((len(places), self.sequence_length + 1), self.end_of_document, np.int64)
        is_label = np.zeros(tokens.shape, bool)
        for row, place in enumerate(places.tolist()):
            filled = 0
            for start, length in self._conversations(place):
                conversation = self.chats.tokens[start : start + length]
                check_ids(conversation, self.vocab_size, Stretch(self.chats.tokens, self.chats.name), start)
                tokens[row, filled : filled + length] = conversation
                # No token predicts the first token of a conversation.
                is_label[row, filled + 1 : filled + length] = self.chats.mask_of(start + 1, start + length)
                filled += length
        labels = np.where(is_label[:, 1:], tokens[:, 1:], IGNORED_LABEL)
        return part_of_pair(tokens[:, :-1], labels, part)

    def count_labels(self, places: Places) -> int:
        """Return how many labels of windows `places` (B,) are learned."""
        return sum(
            int(np.count_nonzero(self.chats.mask_of(start + 1, start + length)))
            for place in places.tolist()
            for start, length in self._conversations(place)
        )

    def conversations(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
        """Yield tokens (n,) and mask (n,) of each conversation that is used, n at most T + 1.

        Raises ConfigError for a token id that the model's vocabulary does not have.
        """
        for start, length in zip(*(part.tolist() for part in self._kept), strict=True):
            tokens = self.chats.tokens[start : start + length]
            check_ids(tokens, self.vocab_size, Stretch(self.chats.tokens, self.chats.name), start)
            yield tokens, self.chats.mask_of(start, start + length).astype(bool)

    def _conversations(self, window: int) -> list[tuple[int, int]]:
        """Return start and number of tokens of the conversations of a window."""
        part = slice(*self._firsts[window : window + 2].tolist())
        return list(zip(self._kept[0][part].tolist(), self._kept[1][part].tolist(), strict=True))
