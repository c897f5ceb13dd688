"""Tests check the shapes in annotations while they run, stay on few threads and never touch the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny`, `import reference` from any folder

CHECKED = [
    "internvl.models",
    "internvl.data",
    "internvl.train.losses",
    "internvl.train.contrast",
    "internvl.train.alignment",
    "internvl.load",
    "internvl.load_dual",
    "internvl.parallel",
    "internvl.opened",
    "internvl.convert",
    "internvl.evaluate.ranking",
    "internvl.evaluate.retrieve",
    "internvl.evaluate.classify",
    "internvl.evaluate.segment",
    "internvl.evaluate.probe",
]
install_import_hook(CHECKED, "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(
    int(os.environ.get("INTERNVL_TEST_THREADS", "2" if "PYTEST_XDIST_WORKER" not in os.environ else "1"))
)
# The same examples every time, so that a change fails for what it changed; `make test-all` draws new ones, and more.
settings.register_profile(
    "same", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("new", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("INTERNVL_TEST_EXAMPLES", "same"))
