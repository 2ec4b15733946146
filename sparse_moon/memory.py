"""What the C library does with freed memory."""

import ctypes
import os
import sys

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# What glibc's thresholds come to once large blocks were freed: set ones do not move any more.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = 64 << 20, 32 << 20, 65536

# mallopt makes the largest size of it. With the largest int the system got back what lay free at the end of the heap
# from 2 GB on: half of the processes with steps of 2.4 GB had all their page faults again, 1.9 s of two steps.
_NEVER = -1

decided = os.environ.get("SPARSE_MOON_KEEP_MEMORY") == "0"
"""Whether :func:`keep_freed_memory` has been called in this process, or the environment says no."""
_kept = False


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the process keep the memory that it frees, to use it again; worth much in training on the CPU.

    glibc gives large blocks back to the system at once, so that each activation above 32 MB, and often smaller ones,
    come as fresh pages in every step, and the system clears each page when it is first touched. This asks glibc not to.
    The process then stays at its peak size.

    The first forward pass with gradients of a sparse layer on the CPU does it by itself, and so does
    :func:`sparse_moon.train` on the CPU, unless this was called before: ``keep_freed_memory(False)`` at the start of a
    program, or ``SPARSE_MOON_KEEP_MEMORY=0`` in its environment, leaves everything as it is. Models on a GPU, and
    evaluation under ``torch.no_grad()``, never do it.

    Args:
        keep: False not to do it, or to go back to what glibc does by itself; what was kept is then given back.

    Returns:
        Whether freed memory is kept from now on: with ``keep`` True with glibc (most of Linux), else False, and nothing
        has changed.
    """
    global decided, _kept
    decided = True
    if sys.platform != "linux" or not (keep or _kept):
        return False
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    if keep:
        _kept = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
    else:
        mallopt(_M_MMAP_MAX, _MMAP_MAX)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        library.malloc_trim(0)
        _kept = False
    return _kept


def keep_for_training() -> bool:
    """:func:`keep_freed_memory`, unless that has been decided already: what training on the CPU calls.

    Returns:
        Whether freed memory is kept from now on.
    """
    return _kept if decided else keep_freed_memory()


# A compiler calls it while it traces a training pass, and neither traces it nor asks again whether that was decided.
# What torch.compiler.assume_constant_result does after importing torch._dynamo, which takes as long as half of torch.
keep_for_training._dynamo_marked_constant = True  # type: ignore[attr-defined]
