"""Small chunks of tokens at the head, so that the small runs compared here have several."""

import pytest

from launcher.parallel import vocabulary


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forked ranks inherit the value. 5 divides no batch of tokens: the last chunk is smaller.
    monkeypatch.setitem(vocabulary.CHUNK_TOKENS, "cpu", 5)
