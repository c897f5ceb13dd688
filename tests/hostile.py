"""Folders with code in every place where a loader might look for it."""

from __future__ import annotations

import json
from pathlib import Path

TRAP = "from pathlib import Path\nPath({mark!r}).write_text('ran')\nraise SystemExit('ran')\n"
CLASSES = {
    "AutoConfig": "configuration_trap.TrapConfig",
    "AutoModel": "modeling_trap.TrapModel",
    "AutoModelForCausalLM": "modeling_trap.TrapModel",
    "AutoTokenizer": ["tokenization_trap.TrapTokenizer", "tokenization_trap.TrapTokenizer"],
    "AutoProcessor": "processing_trap.TrapProcessor",
}


def trap(folder: Path) -> Path:
    """Code in every place where a loader might look for it; running any of it writes the file returned."""
    mark = folder.parent / "ran"
    modules = ("configuration_trap", "modeling_trap", "tokenization_trap", "processing_trap", "conversation")
    for name in (*modules, "configuration_intern_vit", "modeling_internvl_chat", "tokenization_internlm2", "__init__"):
        (folder / f"{name}.py").write_text(TRAP.format(mark=str(mark)))
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(TRAP.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content["auto_map"] = CLASSES
        for part in ("llm_config", "vision_config", "text_config"):
            if part in content:
                content[part]["auto_map"] = CLASSES
        if name == "tokenizer_config.json" and "Qwen2Tokenizer" not in content.get("tokenizer_class", ""):
            content["tokenizer_class"] = "TrapTokenizer"
        path.write_text(json.dumps(content))
    return mark
