"""Find out how much memory this process may still take."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# By version of cgroups: limit, use, and the line of memory.stat with cached files, which are given up when needed.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available() -> int:
    """Return the bytes that this process may still take, by the machine, its control groups and its `ulimit -v`."""
    free = [psutil.virtual_memory().available, *_left_in_groups(_CGROUPS, _MEMBERSHIP)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def _left_in_groups(root: Path, membership: Path) -> Iterator[int]:
    """Yield what is left in each control group with a limit, from the process's own to the outermost."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:  # "0::/path" of version 2, "9:memory:/path" of version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield from _left(folder, *_FILES[1 if controllers else 2])


def _left(folder: Path, limit: str, use: str, cached: str) -> Iterator[int]:
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, use))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # inside a container outer groups cannot be seen; the outermost group has no limit
        return
    if most != "max":
        yield int(most) - int(used) + int(statistics.get(cached, 0))
