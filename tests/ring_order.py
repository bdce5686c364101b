"""The order in which a rank of the ring sends, computes and waits, from the events of torch's profiler."""

from collections.abc import Iterable
from itertools import groupby

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
# P: an exchange is posted; a: attention of the pairs of one step of the ring; w: a wait for an exchange.
# Each step posts the next keys and values, computes, and only then waits for them. In the backward pass a
# step also posts the gradients of the part that it has computed, and the next step waits for them after its
# own attention. The gradients of the last step have no attention left to travel behind.
FORWARD = {2: "Pawa", 4: "PawPawPawa"}
BACKWARD = {2: "PawaPw", 4: "PawPaPwPawPwawPw"}


def order(spans: Iterable[tuple[float, float, str]], label: str) -> str:
    """Return the posts, attention and waits among spans (start, end, name), each row of equal ones once.

    `label` names the spans of calls and of waits; a call has a send of c10d inside.
    """
    ordered = sorted(spans)
    sends = [start for start, _, name in ordered if name == "c10d::send"]
    letters = []
    for start, end, name in ordered:
        if name == label:
            letters.append("P" if any(start <= send <= end for send in sends) else "w")
        elif name.startswith(ATTENTION):
            letters.append("a")
    # A wait is one for the send and one for the receive; a step has a pair of chunks or more.
    return "".join(letter for letter, _ in groupby(letters))
