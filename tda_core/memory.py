"""How much memory there is, asked before anything large is allocated."""

import os
from pathlib import Path

import torch

GROUP = Path("/sys/fs/cgroup")
# Logits that are worked on at a time. On the CPU 1 MB: they stay in its cache from the product of matrices to the sum
# of exponentials. A GPU wants few and large products (256 MB).
CACHED_LOGITS = {"cpu": 2**18, "cuda": 2**26}


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be taken now: on a GPU what is free there; else what the system, and a container's limit, allow.

    Where the system does not say what is available (not Linux), all of its memory counts.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines()) if info.is_file() else {}
    if "MemAvailable" in lines:
        free = 1024 * int(lines["MemAvailable"].split()[0])
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = GROUP / "memory.max", GROUP / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def cached_logits(device: torch.device) -> int:
    """How many logits are worked on at a time on a device."""
    return CACHED_LOGITS.get(device.type, CACHED_LOGITS["cpu"])


def refuse_beyond(needed: int, what: str, device: torch.device | str = "cpu") -> None:
    """Raise MemoryError where `needed` bytes are more than are available, naming both figures and what they are for."""
    available = available_memory(device)
    if needed > available:
        raise MemoryError(f"{what} need {needed / 2**30:.2f} GiB, but {available / 2**30:.2f} GiB are available")
