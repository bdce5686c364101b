"""Faults that survive a campaign for a reason that was looked into: (file, function, change) -> reason.

They change numbers without being errors, such as another order of a sum, or a size that only changes speed. A
survivor that is not listed here makes `python -m tests.fuzz` end with exit code 1.
"""

_DEEPSPEED_REDUCES = "DeepSpeed's own reduction: the same sums with more copies, after the backward pass"
_GATHERED_BLOCKS = "ZeRO-3 gathers whole blocks, or parts of them: the same sums in another order"

EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "engine/gradient_passes.py",
        "lighten",
        "_reduce_in_one_buffer(deepspeed_engine) -> pass",
    ): _DEEPSPEED_REDUCES,
    (
        "engine/gradient_passes.py",
        "_reduce_in_one_buffer",
        "engine.allreduce_and_copy = allreduce_and_copy -> pass",
    ): _DEEPSPEED_REDUCES,
    (
        "engine/flat.py",
        "FlatEngine.__init__",
        "layout.compiled and layout.zero_stage == 3 -> layout.compiled or layout.zero_stage == 3",
    ): _GATHERED_BLOCKS,
    (
        "engine/flat.py",
        "FlatEngine.__init__",
        "layout.compiled and layout.zero_stage == 3 -> not (layout.compiled and layout.zero_stage == 3)",
    ): _GATHERED_BLOCKS,
    (
        "engine/update_guard.py",
        "norms_of",
        "gradient.reshape(-1).split(_PART) -> gradient.reshape(-1)",
    ): "the norm of a whole gradient instead of the norms of its parts: more memory, another order",
    (
        "models/attention_kernel.py",
        "attend",
        "cap is not None -> cap is None",
    ): "without a soft cap, KV heads are copied for their group: another kernel; with one, a rank fails",
}
