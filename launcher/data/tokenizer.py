"""Encode and decode text: as bytes, or with a tokenizer.json of Hugging Face's `tokenizers`."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError, typed_text
from launcher.config.numbers import BYTE_VALUES
from launcher.config.shape import END_OF_TEXT
from launcher.data.chat_template import CHATML_TOKENS
from launcher.data.token_file import smallest_dtype
from launcher.files import replacing

# The tokens that end a document in GPT-2, Llama 3, Llama 2 and others, in order of preference.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# Tokens that a text seldom has.
_UNUSED = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")
_END_FIELD = "data.end_of_document"


class Tokenizer(Protocol):
    """Encodes text as token ids and decodes token ids as text."""

    vocab_size: int
    text_vocab_size: int  # of the tokens that text becomes: without special tokens, except the end's
    dtype: np.dtype[Any]  # of the token ids
    end_spelling: str  # text that looks like the token that ends documents

    @property
    def control_tokens(self) -> Sequence[str]:
        """Return the spellings of the tokens by which a chat template divides a conversation."""

    @property
    def end_of_document(self) -> int:
        """Return the token id that `launcher prepare` appends to each document."""

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Return the token ids (tokens,) of each text, without added special tokens.

        Raises UnicodeError for half a character (a lone surrogate).
        """

    def encode_with_places(self, text: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the ids (tokens,) of a text, and of each the character where it starts and that after it.

        Text that spells a special token becomes this token, unlike in `encode`. Raises UnicodeError.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the token ids."""


class Bytes:
    """Each byte of UTF-8 is a token; a zero byte ends a document. Text with a zero byte cannot be encoded."""

    vocab_size, end_of_document, dtype = BYTE_VALUES, END_OF_TEXT, smallest_dtype(BYTE_VALUES)
    text_vocab_size = BYTE_VALUES
    end_spelling = chr(END_OF_TEXT)
    control_tokens = (*CHATML_TOKENS, end_spelling)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        # A prompt from the command line may contain bytes that are not UTF-8; prepare refuses such text.
        return [np.frombuffer(text.encode(errors="surrogateescape"), self.dtype) for text in texts]

    def encode_with_places(self, text: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
        lengths = 1 + sum((characters >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
        places = np.repeat(np.arange(len(text)), lengths)
        return np.frombuffer(text.encode(), self.dtype), places, places + 1

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(min(token, BYTE_VALUES - 1) for token in ids).decode(errors="replace")


class HuggingFace:
    """A tokenizer that is loaded from a tokenizer.json."""

    def __init__(self, path: Path, end: str | int | None = None, *, field: str) -> None:
        """Load `path`. Raises ConfigError about `field`.

        `end` is the token that ends documents, or its id; None: the first of USUAL_ENDS that exists.
        """
        # Several processes tokenise at once, so threads inside the library would only slow each other down.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as LibraryTokenizer

        try:
            self._tokenizer = LibraryTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            why = f"this file cannot be read as a tokenizer: {error}"
            remedy = f"{field}=PATH of a tokenizer.json of Hugging Face's tokenizers"
            raise ConfigError(field, path, why, remedy) from None
        # Text that spells a special token stays text; otherwise a document could contain its own end token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._path, self._field = path, field
        self._vocabulary = self._tokenizer.get_vocab()
        self._end = end = self._spelled(end) if isinstance(end, int) else end
        self.vocab_size = max(self._vocabulary.values()) + 1  # the ids may have gaps
        self.dtype = smallest_dtype(self.vocab_size)
        self._ends = [token for token in ((end,) if end else USUAL_ENDS) if token in self._vocabulary]
        self.text_vocab_size = self._largest_of_text() + 1
        self.end_spelling = ""
        for token in self._ends[:1]:
            if self.end_of_document in self._tokenizer.get_added_tokens_decoder():
                # Many files do not mark the token as special.
                self._tokenizer.add_special_tokens([AddedToken(token, special=True)])
            self.end_spelling = self.decode([self.end_of_document]) or token

    @property
    def end_of_document(self) -> int:
        """Return the id of the token that ends a document. Raises ConfigError if the tokenizer has none."""
        end = self._end
        if not self._ends:
            missing = f"no token {end!r}" if end else f"none of {', '.join(USUAL_ENDS)}"
            why = f"this tokenizer has {missing} to end documents with"
            remedy = typed_text("tokenizer.end_of_document", next(iter(self._vocabulary), "TOKEN"))
            if self._field.startswith("data."):
                remedy = f"{_END_FIELD}=ID"
            raise ConfigError(self._field, self._path, why, f"{remedy} or another token of the tokenizer")
        return int(self._vocabulary[self._ends[0]])

    def _spelled(self, end: int) -> str:
        """Return the spelling of the token `end`. Raises ConfigError if there is none."""
        spelling = self._tokenizer.id_to_token(end)
        if spelling is None:
            usual = next((self._vocabulary[token] for token in USUAL_ENDS if token in self._vocabulary), "ID")
            why = f"{self._path} has no token with this id"
            raise ConfigError(_END_FIELD, end, why, f"{_END_FIELD}={usual}")
        return str(spelling)

    def token_beside_end(self) -> int | None:
        """Return the id of another token that could end documents; None if there is none."""
        usable = (token for token in (*USUAL_ENDS, *_UNUSED) if token in self._vocabulary)
        return next((self._vocabulary[token] for token in usable if token not in self._ends[:1]), None)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def _largest_of_text(self) -> int:
        """Return the largest token id that text, or the end of a document, can have.

        Special tokens with larger ids need no place in a model: Gemma 3's text models lack the last of them.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        ids = (index for index in self._vocabulary.values() if index not in added or not added[index].special)
        return max(
            [*ids, *(self._vocabulary[token] for token in self._ends[:1])], default=self.vocab_size - 1
        )

    @property
    def control_tokens(self) -> Sequence[str]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def encode_with_places(self, text: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        text.encode()  # the library replaces half a character
        self._tokenizer.encode_special_tokens = False
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, self.dtype), places[:, 0], places[:, 1]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def write_byte_tokenizer(path: Path) -> None:
    """Write a tokenizer.json in which each byte of UTF-8 is a token, and the byte's value is its id."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    # The library represents each byte by a character: the same code if it is printable, else from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1)]
    printable += range(ord("\u00ae"), ord("\u00ff") + 1)
    others = [byte for byte in range(BYTE_VALUES) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = LibraryTokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    with replacing(path) as temporary:
        tokenizer.save(str(temporary))


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE tokenizer on `texts` and write it as a tokenizer.json.

    The algorithm is Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2 (Radford et al., 2019). It is
    deterministic. Raises ConfigError if the texts give fewer than `vocab_size` tokens.
    """
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[USUAL_ENDS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with replacing(path) as temporary:
        tokenizer.save(str(temporary))
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        why = f"the text is too short: BPE finds only {size} tokens in it"
        raise ConfigError("vocab", vocab_size, why, f"vocab={size}, or more text")


def pieces(text: str, most: int) -> Iterator[str]:
    """Yield pieces of at most `most` characters, so that a tokenizer needs little memory for long texts."""
    start = 0
    while len(text) - start > most:
        newline = text.rfind("\n", start + most // 2, start + most)
        end = newline + 1 if newline >= 0 else start + most
        yield text[start:end]
        start = end
    yield text[start:]
