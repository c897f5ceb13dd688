"""A slow chat model from official weights, for comparison: plain functions and transformers' own language model.

Shares nothing with the package: keys are the official ones, pixel shuffle and attention are loops over the formulas.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

CLASSES = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "InternLM2ForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
    "Phi3ForCausalLM": (Phi3Config, Phi3ForCausalLM),
}


class PlainChat:
    """`weights` and `settings` of an official folder; weights are leaves, so gradients have the official keys."""

    def __init__(self, weights: dict[str, Tensor], settings: dict[str, Any], image_token_id: int) -> None:
        self.weights = {key: value.clone().requires_grad_() for key, value in weights.items()}
        self.settings, self.image_token_id = settings, image_token_id
        language = dict(settings["llm_config"])
        config_class, model_class = CLASSES[language.pop("architectures")[0]]
        language.pop("model_type")
        self.internlm2 = "InternLM2" in settings["llm_config"]["architectures"][0]
        if self.internlm2:
            language["attention_bias"] = language.pop("bias")
        config = config_class(**language)
        config._attn_implementation = "eager"
        self.language = model_class(config).eval()

    def vision(self, tiles: Tensor) -> Tensor:
        w = {k.removeprefix("vision_model."): v for k, v in self.weights.items() if k.startswith("vision_model.")}
        config = self.settings["vision_config"]
        heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

        def norm(x: Tensor, name: str, rms: bool) -> Tensor:
            if rms:
                return w[f"{name}.weight"] * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt())
            centred = x - x.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

        patch = config["patch_size"]
        cuts = tiles.unfold(2, patch, patch).unfold(3, patch, patch)  # tiles, 3, rows, columns, patch, patch
        cuts = cuts.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = cuts @ w["embeddings.patch_embedding.weight"].flatten(1).T + w["embeddings.patch_embedding.bias"]
        x = (
            torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
            + w["embeddings.position_embedding"]
        )
        rms, states = config["norm_type"] == "rms_norm", [x]
        for n in range(config["num_hidden_layers"]):
            layer = f"encoder.layers.{n}"
            y = norm(x, f"{layer}.norm1", rms)
            qkv = y @ w[f"{layer}.attn.qkv.weight"].T + w.get(f"{layer}.attn.qkv.bias", torch.zeros(()))
            q, k, v = qkv.unflatten(-1, (3, -1)).unbind(-2)
            if config["qk_normalization"]:
                q, k = norm(q, f"{layer}.attn.q_norm", True), norm(k, f"{layer}.attn.k_norm", True)
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            y = (scores @ v).transpose(1, 2).flatten(2)
            y = y @ w[f"{layer}.attn.proj.weight"].T + w[f"{layer}.attn.proj.bias"]
            x = x + w[f"{layer}.ls1"] * y
            y = norm(x, f"{layer}.norm2", rms) @ w[f"{layer}.mlp.fc1.weight"].T + w[f"{layer}.mlp.fc1.bias"]
            y = F.gelu(y) @ w[f"{layer}.mlp.fc2.weight"].T + w[f"{layer}.mlp.fc2.bias"]
            x = x + w[f"{layer}.ls2"] * y
            states.append(x)
        return states[self.settings["select_layer"]][:, 1:]

    def visual(self, tiles: Tensor) -> Tensor:
        """Pixel shuffle one token at a time, then mlp1."""
        features = self.vision(tiles)
        side = math.isqrt(features.shape[1])
        grid = features.unflatten(1, (side, side))
        half = range(side // 2)
        places = [(r, c) for r in half for c in half]
        if self.settings["ps_version"] == "v1":
            places = [(r, c) for c in half for r in half]
        corners = ((0, 0), (0, 1), (1, 0), (1, 1))
        x = torch.stack([torch.cat([grid[:, 2 * r + i, 2 * c + j] for i, j in corners], -1) for r, c in places], 1)
        w = self.weights
        x = F.layer_norm(x, x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"])
        x = F.gelu(x @ w["mlp1.1.weight"].T + w["mlp1.1.bias"])
        return x @ w["mlp1.3.weight"].T + w["mlp1.3.bias"]

    def __call__(self, ids: Tensor, tiles: Tensor) -> Tensor:
        state = self.language_weights()
        embeds = state["model.embed_tokens.weight"][ids]
        rows = iter(self.visual(tiles).flatten(0, 1))
        flat = [next(rows) if int(i) == self.image_token_id else e for i, e in zip(ids.flatten(), embeds.flatten(0, 1))]  # noqa: B905
        assert next(rows, None) is None
        embeds = torch.stack(flat).view_as(embeds)
        out: Tensor = functional_call(
            self.language, state, kwargs={"inputs_embeds": embeds, "use_cache": False}, tie_weights=False
        ).logits
        return out

    def language_weights(self) -> dict[str, Tensor]:
        prefix = "language_model."
        w = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        return self._from_internlm2(w) if self.internlm2 else w

    def _from_internlm2(self, w: dict[str, Tensor]) -> dict[str, Tensor]:
        config, out = self.language.config, {}
        names = {
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "tok_embeddings": "embed_tokens",
            "output": "lm_head",
        }
        head = config.hidden_size // config.num_attention_heads
        groups = config.num_attention_heads // config.num_key_value_heads
        for key, value in w.items():
            if "wqkv" not in key:
                for old, new in names.items():
                    key = key.replace(old, new) if f".{old}." in f".{key}" else key
                out[key] = value
                continue
            rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
            for index, block in enumerate(value.split(head)):
                place = index % (groups + 2)
                rows["q" if place < groups else "kv"[place - groups]].append(block)
            for name, blocks in rows.items():
                out[key.replace("attention.wqkv", f"self_attn.{name}_proj")] = torch.cat(blocks)
        return out

    def greedy(self, ids: Tensor, tiles: Tensor, count: int) -> list[int]:
        out: list[int] = []
        with torch.no_grad():
            for _ in range(count):
                out.append(int(self(ids, tiles)[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor([[out[-1]]])], 1)
        return out
