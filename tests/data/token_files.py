"""Write token files for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.token_file import bin_path, index_path, write_index


def write_documents(prefix: Path, documents: Sequence[npt.NDArray[Any]], dtype: str | None = None) -> None:
    """Write NAME.bin and NAME.idx with one sequence per document.

    Without `dtype`, int64 documents, numpy's default, become uint8 if all ids are below 256, otherwise int32.
    """
    written = np.dtype(dtype) if dtype else documents[0].dtype if documents else np.dtype("u1")
    if dtype is None and written == np.int64:
        written = np.dtype("u1" if max(int(d.max(initial=0)) for d in documents) < 256 else "<i4")
    bin_path(prefix).write_bytes(b"".join(document.astype(written).tobytes() for document in documents))
    write_index(index_path(prefix), np.array([len(document) for document in documents], np.int32), written)
