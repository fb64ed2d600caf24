"""How much memory there is, and whether arrays of given sizes fit into it, before any of that size is made."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dvrl_jax.errors import RunError

LESS = "fewer environments, particles, segments of a window or units of the model take less"

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
# Files of a control group's directory with its limit and its use, in its second and first version.
_GROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_of_host() -> int | None:
    """Bytes that this process can still get: of the machine, or less by its control group or address space (ulimit -v).

    None where the system does not tell.
    """
    found = list(_free_of_groups())
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]))
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree") if name in lines))
    except (OSError, ValueError):
        pass
    return max(0, min(found)) if found else None


def _free_of_groups() -> Iterator[int]:
    """What is left of the limits of the control groups that this process is in, as far as they can be seen."""
    try:
        own = [Path(line.split(":", 2)[2].lstrip("/")) for line in OWN_GROUP.read_text().splitlines()]
    except (OSError, IndexError):
        own = []
    for root in (CONTROL_GROUPS, CONTROL_GROUPS / "memory"):
        for folder in {root / parent for path in (*own, Path()) for parent in (path, *path.parents)}:
            for limit, use in _GROUP_FILES:
                try:
                    yield int((folder / limit).read_text()) - int((folder / use).read_text())
                except (OSError, ValueError):  # There is no such group; or it has no limit ("max").
                    continue


def free_of_device() -> int | None:
    """Bytes that JAX's first device has left for arrays; None where that cannot be told."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return free_of_host()
    known = device.memory_stats() or {}
    return known["bytes_limit"] - known.get("bytes_in_use", 0) if "bytes_limit" in known else None


def size_of(shapes: Any) -> int:
    """Bytes of the arrays of a pytree, or of what `jax.eval_shape` says of them."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def check_size(needed: int) -> None:
    """Raises RunError if the device has not so many bytes left for arrays."""
    there = free_of_device()
    if there is not None and needed > there:
        raise RunError(
            f"training needs at least {gigabytes(needed)} of memory, and {gigabytes(there)} are free; {LESS}"
        )


def gigabytes(size: int) -> str:
    """A size in bytes, for messages."""
    return f"{size / 1e9:,.1f} GB"
