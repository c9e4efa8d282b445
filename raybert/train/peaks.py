"""The peaks of GPUs, for the model FLOPs utilization."""

from __future__ import annotations

import re

import torch

#: Dense bf16 operations per second by words of the GPU's name, from the vendor's data sheets; the
#: first that has all its words in the name counts. V100 and T4 have no bf16: theirs are of fp16.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIE": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L20": 119e12,
    "L4": 121e12,
    "A6000": 155e12,
    "6000 ADA": 364e12,
    "V100S": 130e12,
    "V100 PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device) -> float:
    """The peak of a device in operations per second; 0 for a CPU or an unknown GPU."""
    return gpu_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def gpu_peak_flops(name: str) -> float:
    """The peak of a GPU by its name, in operations per second; 0 where it is unknown.

    A part of one, by MIG or as a vGPU (`GRID A100-10C`), has the name of the whole, and an unknown
    share of its peak.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & {"MIG", "GRID"} or any(re.fullmatch(r"\d+([ABCQ]|CME)", word) for word in words):
        return 0.0
    return next((flops for key, flops in PEAK_FLOPS.items() if set(key.split()) <= words), 0.0)
