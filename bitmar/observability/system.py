"""What the machines of a run are doing: memory, processors, files, disk; GPUs where there are any."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from bitmar.observability.stats import Statistics

# Dense bf16 peak of a device, TFLOP/s, by what its name holds (NVIDIA's data sheets); the first that fits counts
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("A100", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("RTX 6000 Ada", 364.2),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of a known GPU that multiplies in bf16; None for others, whose peak wandb.device_tflops can give."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


def _utilization(device: torch.device) -> float | None:
    """Of a device, in percent; None where its driver does not tell (a slice of a GPU, some containers)."""
    import pynvml  # here, because only a node with GPUs needs it

    try:
        return torch.cuda.utilization(device)
    except pynvml.NVMLError:
        return None


class SystemProbe:
    """Shows this rank's process and device to the System/ metrics."""

    def __init__(self, run_dir: Path, device: torch.device, node: int) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # which tells of the time since the last call
        self._run_dir, self._device, self._node = run_dir, device, node

    def fill(self, statistics: Statistics) -> None:
        """Show what is so now. A GPU's metrics stay empty where there is none, a node's where there is one alone."""
        process, node = self._process, f"System/Node_{self._node}_"
        rss, cpu = process.memory_info().rss, process.cpu_percent()
        several = f"{node}Memory_RSS" in statistics
        places = ["System/", node] if several else ["System/"]
        statistics.peak("System/Memory_RSS", rss)
        statistics.peak("System/CPU_Percent", cpu)
        if several:
            statistics.add(f"{node}Memory_RSS", rss)
            statistics.add(f"{node}CPU_Percent", cpu)
        for place in places:
            statistics.peak(f"{place}Open_Files", process.num_fds())
            if self._run_dir.exists():
                statistics.peak(f"{place}Disk_Free", shutil.disk_usage(self._run_dir).free)
        if self._device.type == "cuda":
            self._fill_gpu(statistics, places)

    def _fill_gpu(self, statistics: Statistics, places: list[str]) -> None:
        device = self._device
        free, total = torch.cuda.mem_get_info(device)
        percent, busy = 100 * (1 - free / total), _utilization(device)
        statistics.peak("System/GPU_Memory_Allocated", torch.cuda.memory_allocated(device))
        statistics.peak("System/GPU_Memory_Reserved", torch.cuda.memory_reserved(device))
        for place in places:
            statistics.peak(f"{place}GPU_Memory_Peak", torch.cuda.max_memory_allocated(device))
            statistics.peak(f"{place}GPU_Memory_Percent", percent)
            if busy is not None:
                statistics.peak(f"{place}GPU_Utilization_Max", busy)
        if busy is not None:
            statistics.add("System/GPU_Utilization_Mean", busy)
