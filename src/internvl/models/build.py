"""A config to a module: empty on the meta device, or with random weights. Loading is `load.py`'s."""

from __future__ import annotations

import torch
from torch import nn

from internvl.config import ChatConfig, DualConfig
from internvl.models.chat import ChatModel
from internvl.models.contrastive import LOGIT_SCALE, DualModel
from internvl.models.internvit import Embeddings, InternViT


def build(
    config: ChatConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ChatModel:
    """A chat model with random weights, or without memory for them on "meta"."""
    with torch.device("meta"):
        model = ChatModel(config, dtype)
    if torch.device(device).type == "meta":
        return model.eval()
    model = model.to_empty(device=device)
    finish(model)
    initialise(model, seed)
    return model.eval()


def build_dual(
    config: DualConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> DualModel:
    """InternVL-C or -G with random weights, or without memory for them on "meta"."""
    with torch.device("meta"):
        model = DualModel(config).to(dtype)
    tie(model)
    if torch.device(device).type == "meta":
        return model.eval()
    model = model.to_empty(device=device)
    tie(model)
    initialise_dual(model, seed)
    return model.eval()


def tie(model: DualModel) -> None:
    """The output head is the embedding, where the config says so."""
    if model.config.generative and model.config.language.tied:
        model.qllama.head.weight = model.qllama.embed_tokens.weight


def finish(model: ChatModel) -> None:
    """What weights alone do not bring, after building on the meta device: rotary frequencies, the tied head."""
    model.language.fill_buffers()
    if model.config.language.tied:
        model.language.model.tie_weights()


@torch.no_grad()
def initialise(model: ChatModel, seed: int = 0) -> None:
    """Random weights from a seed, the same on every device: normal, with unit norms and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    vision, language = model.config.vision, model.language.model.config
    for module in model.vision.modules():
        _initialise(module, vision.weight_std, generator)
    for module in (*model.connector.modules(), *model.language.modules()):
        _initialise(module, language.initializer_range, generator)
    _initialise_vision(model.vision, generator)
    if model.qllama is not None:
        std = float(model.qllama.config.language.settings.get("initializer_range", 0.02))
        for module in model.qllama.modules():
            _initialise(module, std, generator)
        _normal(model.qllama.queries, std, generator)


@torch.no_grad()
def initialise_dual(model: DualModel, seed: int = 0) -> None:
    """Random weights from a seed, as `initialise`; queries are random too (paper 1.0, section 3.2)."""
    generator = torch.Generator().manual_seed(seed)
    language = model.config.language
    std = float(language.settings.get("initializer_range", 0.02))
    for module in model.vision.modules():
        _initialise(module, model.config.vision.weight_std, generator)
    for name, part in model.named_children():
        for module in part.modules() if name != "vision" else ():
            _initialise(module, std, generator)
    _initialise_vision(model.vision, generator)
    _normal(model.text_projection, language.width**-0.5, generator)
    model.logit_scale.fill_(LOGIT_SCALE)
    if model.config.generative:
        _normal(model.qllama.queries, std, generator)


def _initialise_vision(vision: InternViT, generator: torch.Generator) -> None:
    std, scale = vision.config.weight_std, vision.config.scale_init
    for module in vision.modules():
        if isinstance(module, Embeddings):
            _normal(module.class_embedding, std, generator)
            _normal(module.position_embedding, std, generator)
    for name, parameter in vision.named_parameters():
        if name.rpartition(".")[2] in ("scale1", "scale2"):
            parameter.fill_(scale)


def _initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """One module's own weights: matrices normal, norms one, biases zero."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, nn.Parameter):
        if weight.ndim > 1:
            _normal(weight, std, generator)
        else:
            weight.fill_(1.0)
    if isinstance(bias, nn.Parameter):
        bias.zero_()


def _normal(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
