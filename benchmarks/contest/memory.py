"""Peak memory of the tensors of a rank, measured alike for every peer.

On CPU, torch's profiler reports each allocation and release of torch's allocator, whoever asked for it:
DTensor, DDP's buckets and autograd's saved tensors included. The profiler slows the steps, so that memory
is measured in ranks of its own. On a GPU the allocator counts itself. Buffers inside gloo are not counted.
"""

from itertools import accumulate
from typing import Any

from benchmarks.contest.job import Job

_MARK = "benchmark: steps from here on"


class PeakMemory:
    """Peak bytes from `begin` on. Create it in the thread that trains, before the model is built."""

    def __init__(self, job: Job) -> None:
        self._cuda, self._profile, self._began = job.device == "cuda", None, False
        if job.counts_memory and not self._cuda:
            self._profile = _started_profile()

    def begin(self) -> None:
        """Count from now on; later calls have no effect."""
        if self._began:
            return
        self._began = True
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif self._profile is not None:
            from torch.profiler import record_function

            with record_function(_MARK):
                pass

    def peak_on_gpu(self) -> int | None:
        if not self._cuda:
            return None
        import torch

        return torch.cuda.max_memory_allocated()

    def end(self) -> int | None:
        if self._profile is None:
            return self.peak_on_gpu()
        self._profile.stop()
        return peak_of(self._profile.profiler.kineto_results.events())


def _started_profile() -> Any:
    from torch.profiler import ProfilerActivity, profile

    started = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    started.start()
    return started


def peak_of(events: list[Any]) -> int:
    """Return the peak of live bytes after the mark; bytes that are live at the mark count."""
    [mark] = [event.start_ns() for event in events if event.name() == _MARK]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = accumulate(size for _, size in changes)
    # The last change before the mark says what is live at the mark.
    before = sum(1 for at, _ in changes if at < mark)
    return max(list(live)[max(before - 1, 0) :])
