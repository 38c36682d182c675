"""What memory a device has, and how much of it is free now."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.device import Compute

MACHINE, CONTAINER = "this machine", "the container's limit"
CGROUP = Path("/sys/fs/cgroup")
# usage and limit of memory by version of Linux's control groups
_CGROUPS = (
    ("memory.current", "memory.max"),
    ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Room:
    """Bytes of a machine.

    Attributes:
        ram_total: What this process may have at most: the machine's, or its container's limit.
        ram_free: What is free of it now, this process's own resident set counted as free.
        gpu_total, gpu_free: The same of the card, what this process has reserved counted as free;
            None on a CPU.
        ram_limit: What sets `ram_total`: "this machine" or "the container's limit".
    """

    ram_total: int
    ram_free: int
    gpu_total: int | None = None
    gpu_free: int | None = None
    ram_limit: str = MACHINE


def free(compute: Compute) -> Room:
    """The memory of the device of a run and of its machine, as it is now."""
    own = resident()
    total, available = _of_machine()
    limit = MACHINE
    contained = of_container(CGROUP)
    if contained is not None and contained[0] < total:
        total, limit = contained[0], CONTAINER
        available = min(available, contained[1])
    sharing = compute.processes.local_size  # processes of this run on this machine
    total, available = total // sharing, min(total, available + own * sharing) // sharing
    if compute.device.type != "cuda":
        return Room(total, available, ram_limit=limit)
    import torch

    gpu_free, gpu_total = torch.cuda.mem_get_info(compute.device)
    gpu_free += torch.cuda.memory_reserved(compute.device)
    return Room(total, available, gpu_total, gpu_free, limit)


def of_container(root: Path) -> tuple[int, int] | None:
    """Limit and free bytes of this process's container; None where there is no limit.

    `root`: where the control groups are mounted. Pages of files that were read count as used
    there, but are given up for memory that is needed.
    """
    for usage, limit in _CGROUPS:
        try:
            most = (root / limit).read_text(encoding="utf-8").strip()
            used = int((root / usage).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if most == "max":
            return None
        return int(most), max(0, int(most) - used + _file_pages(root / Path(usage).parent))
    return None


def resident() -> int:
    """Bytes of this process that lie in memory now."""
    match platform.system():
        case "Linux":
            return _of_status("VmRSS")
        case "Windows":
            return _counters()
        case _:
            return _peak_of_usage()


def peak_resident() -> int:
    """The most bytes of this process that lay in memory, since its start or `forget_peak`."""
    match platform.system():
        case "Linux":
            return _of_status("VmHWM")
        case "Windows":
            return _counters(peak=True)
        case _:
            return _peak_of_usage()


def forget_peak() -> bool:
    """Let `peak_resident` begin anew. Returns whether this system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


# --- private --------------------------------------------------------------------------------------


def _of_machine() -> tuple[int, int]:
    """Total and available bytes."""
    match platform.system():
        case "Linux":
            text = Path("/proc/meminfo").read_text(encoding="utf-8")
            lines = dict(line.split(":", 1) for line in text.splitlines())
            total, available = (int(lines[k].split()[0]) for k in ("MemTotal", "MemAvailable"))
            return total * 1024, available * 1024
        case "Windows":
            return _global_memory()
        case _:
            return _of_sysctl()


def _file_pages(group: Path) -> int:
    """Bytes of files that are kept in memory while nobody else wants it."""
    try:
        text = (group / "memory.stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    counts = dict(line.split() for line in text.splitlines())
    return int(counts.get("inactive_file", counts.get("total_inactive_file", 0)))


def _of_status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _peak_of_usage() -> int:
    """macOS tells the peak alone."""
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _of_sysctl() -> tuple[int, int]:
    """macOS: all memory, and the pages that are free or can be given up."""

    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout

    total = int(said("sysctl", "-n", "hw.memsize"))
    size = int(said("sysctl", "-n", "hw.pagesize"))
    lines = dict(line.split(":", 1) for line in said("vm_stat").splitlines() if ":" in line)
    names = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    pages = sum(int(lines.get(name, "0").strip().rstrip(".")) for name in names)
    return total, pages * size


def _global_memory() -> tuple[int, int]:
    """Windows: GlobalMemoryStatusEx."""

    class Status(ctypes.Structure):
        _fields_ = [
            ("dwLength", ctypes.c_uint32),
            ("dwMemoryLoad", ctypes.c_uint32),
            ("ullTotalPhys", ctypes.c_uint64),
            ("ullAvailPhys", ctypes.c_uint64),
            ("ullTotalPageFile", ctypes.c_uint64),
            ("ullAvailPageFile", ctypes.c_uint64),
            ("ullTotalVirtual", ctypes.c_uint64),
            ("ullAvailVirtual", ctypes.c_uint64),
            ("ullAvailExtendedVirtual", ctypes.c_uint64),
        ]

    status = Status(dwLength=ctypes.sizeof(Status))
    kernel: object = ctypes.CDLL("kernel32")
    assert isinstance(kernel, ctypes.CDLL)
    kernel.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.ullTotalPhys), int(status.ullAvailPhys)


def _counters(*, peak: bool = False) -> int:
    """Windows: the working set, or its peak (GetProcessMemoryInfo)."""

    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
            ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t),
            ("PeakPagefileUsage", ctypes.c_size_t),
        ]

    counters = Counters(cb=ctypes.sizeof(Counters))
    kernel = ctypes.CDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize if peak else counters.WorkingSetSize)
