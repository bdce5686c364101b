"""Text to token ids and back: bytes, or any tokenizer.json of Hugging Face's `tokenizers`."""

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.numbers import BYTE_VALUES
from launcher.config.shape import END_OF_TEXT
from launcher.data.token_file import smallest_dtype
from launcher.files import replacing

# What ends a document in GPT-2, Llama 3, Llama 2, and others.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    vocab_size: int
    dtype: np.dtype[Any]  # of ids

    @property
    def end_of_document(self) -> int:
        """The id that `launcher prepare` ends each document with."""

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The ids of each, without any that stand for no text. Raises UnicodeError for half a character."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Bytes:
    """Each byte of UTF-8 is a token; a zero byte, which text does not contain, ends a document."""

    vocab_size, end_of_document, dtype = BYTE_VALUES, END_OF_TEXT, smallest_dtype(BYTE_VALUES)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        # A prompt from a command line may hold bytes that are no UTF-8; prepare refuses text that does.
        return [np.frombuffer(text.encode(errors="surrogateescape"), self.dtype) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(min(token, BYTE_VALUES - 1) for token in ids).decode(errors="replace")


class HuggingFace:
    """A tokenizer.json. Raises ConfigError about `field` where it cannot be used."""

    def __init__(self, path: Path, end: str | None = None, *, field: str) -> None:
        """`end` is the token that ends a document; None: one of the usual."""
        # Many at once in processes of our own; its threads would only stand in each other's way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as Theirs

        try:
            self._theirs = Theirs.from_file(str(path))
        except Exception as error:  # it raises nothing narrower
            why = f"cannot be read: {error}"
            raise ConfigError(field, path, why, "a tokenizer.json of Hugging Face's tokenizers") from None
        # Text that spells a special token is text: no document may pretend to end.
        self._theirs.encode_special_tokens = True
        self._theirs.no_padding()
        self._theirs.no_truncation()
        self._path, self._field, self._end = path, field, end
        self._vocabulary = self._theirs.get_vocab()
        self.vocab_size = max(self._vocabulary.values()) + 1  # ids may have gaps
        self.dtype = smallest_dtype(self.vocab_size)

    @property
    def end_of_document(self) -> int:
        end = self._end
        known = [token for token in ((end,) if end else USUAL_ENDS) if token in self._vocabulary]
        if not known:
            why = f"has no token {end!r}" if end else f"has none of {', '.join(USUAL_ENDS)}"
            other = next(iter(self._vocabulary), "TOKEN")
            remedy = shlex.quote(f'tokenizer.end_of_document="{other}"') + ", or another that it has"
            raise ConfigError(self._field, self._path, why, remedy)
        return int(self._vocabulary[known[0]])

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        found = self._theirs.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._theirs.decode(list(ids), skip_special_tokens=False)
        return text


def write_byte_tokenizer(path: Path) -> None:
    """Bytes as a tokenizer.json: each byte of UTF-8 is a token, and its value the id."""
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, pre_tokenizers

    # The library writes a byte as a character: itself where that can be seen, else the next from 256 on.
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1)]
    seen += range(ord("\u00ae"), ord("\u00ff") + 1)
    unseen = (byte for byte in range(BYTE_VALUES) if byte not in seen)
    characters = {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(unseen)}
    made = Theirs(models.BPE({character: byte for byte, character in characters.items()}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    with replacing(path) as aside:
        made.save(str(aside))


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Write a tokenizer.json of byte-level BPE made of `texts`, the same for the same texts.

    Sennrich et al., arXiv 1508.07909, over bytes as GPT-2's (Radford et al., 2019). Raises ConfigError
    where the texts are too few for so large a vocabulary.
    """
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Theirs(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[USUAL_ENDS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    with replacing(path) as aside:
        made.save(str(aside))
    if made.get_vocab_size() < vocab_size:
        why = f"the text has no more than {made.get_vocab_size()} tokens to make"
        raise ConfigError("vocab", vocab_size, why, f"vocab={made.get_vocab_size()}, or more text")


def pieces(text: str, most: int) -> Iterator[str]:
    """The text cut into stretches of at most `most` characters, after a newline where there is one.

    A tokenizer's memory grows with what it is given at once.
    """
    start = 0
    while len(text) - start > most:
        newline = text.rfind("\n", start + most // 2, start + most)
        end = newline + 1 if newline >= 0 else start + most
        yield text[start:end]
        start = end
    yield text[start:]
