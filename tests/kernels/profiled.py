"""Allocations of a computation on the CPU, counted by PyTorch's profiler."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most bytes that were allocated at once during `compute`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = compute()
    del result
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
