"""What learns and how fast: freezing by part, token rows beside a frozen table, groups. Schedules are optim.py's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from internvl.models.layers import DropPath, drop_path_rates
from internvl.train.run import RunConfig
from internvl.train.settings import PARTS, Part
from internvl.train.start import begin_from

if TYPE_CHECKING:
    from internvl.models.adapters import Adaptable
    from internvl.models.chat import ChatModel

ROWS = "token_rows"
"""Prefix of the names of learned token rows."""
QLLAMA = "qllama"
"""Queries of 1.0 beside a chat model's encoder: part of no setting, always frozen."""
PROJECTIONS = "projections"
"""Prefix of the names of what distillation puts behind the student."""


class TokenRows(nn.Module):
    """Rows of a few tokens, learned beside frozen tables; hooks put them into the tables' outputs.

    Only these rows get a gradient: learning the whole table would cost its gradient and optimiser state each step.
    """

    token_ids: Int[Tensor, " tokens"]

    def __init__(self, table: nn.Module, head: nn.Module, token_ids: Sequence[int]) -> None:
        super().__init__()
        weight = _weight(table)
        self.table, self.head = [table], [head]  # in lists: the model owns these modules
        self.register_buffer("token_ids", torch.tensor(token_ids, device=weight.device), persistent=False)
        self.tied = weight is _weight(head)
        self.input = nn.Parameter(weight.detach()[list(token_ids)].float().clone())
        self.output = self.input if self.tied else nn.Parameter(_weight(head).detach()[list(token_ids)].float().clone())
        self._hooks = [table.register_forward_hook(self._embedded), head.register_forward_hook(self._scored)]
        first, last = min(token_ids), max(token_ids)
        self._span = slice(first, last + 1) if list(token_ids) == list(range(first, last + 1)) else None

    def _embedded(self, module: nn.Module, inputs: tuple[Any, ...], embeds: Float[Tensor, "... width"]) -> Tensor:
        hit = inputs[0].unsqueeze(-1) == self.token_ids
        rows = hit.to(self.input.dtype) @ self.input  # a product, so that the gradient is deterministic on every device
        return torch.where(hit.any(-1, keepdim=True), rows.to(embeds.dtype), embeds)

    def _scored(self, module: nn.Module, inputs: tuple[Any, ...], logits: Float[Tensor, "... vocab"]) -> Tensor:
        hidden = inputs[0]
        scores = F.linear(hidden, self.output.to(hidden.dtype)).to(logits.dtype)
        if self._span is None:
            return logits.index_copy(-1, self.token_ids, scores)
        logits[..., self._span] = scores  # in place: logits are the largest tensor of a step
        return logits

    def settle(self) -> None:
        """Write the rows into the tables and take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():
            for module, rows in ((self.table[0], self.input), (self.head[0], self.output)):
                weight = _weight(module)
                weight[self.token_ids] = rows.to(weight.dtype)


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Learner(Generic[M]):
    """A model and the parameters of it that learn, by name."""

    model: M
    run: RunConfig
    parameters: dict[str, nn.Parameter]
    rows: TokenRows | None

    def part_of(self, name: str) -> str:
        """Part of the run that a parameter belongs to."""
        return name.split(".", 1)[0]

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if not p.requires_grad)

    def train_mode(self) -> None:
        """Dropout and drop path only where something learns; checkpointed blocks need the mode to recompute."""
        self.model.eval()
        for name in PARTS:
            if self.run.part(name).learn != "frozen" or (self.run.grad_checkpoint and name == "language"):
                getattr(self.model, name).train()


def choose(model: ChatModel, run: RunConfig, token_ids: Sequence[int] = ()) -> Learner[ChatModel]:
    """Freeze and thaw the parts of `model` as `run` says; adapters are added where a part learns by lora."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in PARTS:
        part = run.part(name)
        if part.learn == "full":
            _thaw(getattr(model, name), part)
        elif part.learn == "lora":
            adapt(model, name, part, run.precision)
    _drop_paths(model, run.vision.drop_path)
    rows = _token_rows(model, run, token_ids)
    if run.start:
        begin_from(run.start, model, run, rows)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if rows is not None:
        parameters |= {f"{ROWS}.{name}": p for name, p in rows.named_parameters()}
    if not parameters:
        raise ValueError("nothing learns: every part is frozen; set --connector.learn full, or another part")
    set_dtypes(model, parameters, run)
    return Learner(model, run, parameters, rows)


def groups(learner: Learner) -> list[dict[str, Any]]:
    """Parameter groups by part, rate and decay: `part`, `lr_scale`, `weight_decay` and parameter `names` of each."""
    run = learner.run
    depths = {name: _depth(learner, name) for name in PARTS if run.part(name).layer_decay < 1}
    found: dict[tuple[str, bool, float], dict[str, Any]] = {}
    for name, parameter in learner.parameters.items():
        part = learner.part_of(name)
        scale = _lr_scale(run, part)
        if part in depths:
            scale *= run.part(part).layer_decay ** (depths[part] + 1 - layer_number(name, depths[part]))
        decays = part != ROWS and sum(size > 1 for size in parameter.shape) > 1
        group = found.setdefault(
            (part, decays, scale),
            {
                "part": part,
                "lr_scale": scale,
                "weight_decay": run.optimiser.weight_decay if decays else 0.0,
                "params": [],
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(found.values())


def layer_number(name: str, depth: int) -> int:
    """0 for embeddings, 1 to depth for the blocks, depth + 1 for what follows them (BEiT's layer-wise decay)."""
    words = name.split(".")
    if "layers" in words:
        return int(words[words.index("layers") + 1]) + 1
    return 0 if any("embed" in word for word in words) else depth + 1


def _depth(learner: Learner, part: str) -> int:
    mine = (name.split(".") for name, _ in learner.model.named_parameters() if learner.part_of(name) == part)
    return max((int(words[words.index("layers") + 1]) + 1 for words in mine if "layers" in words), default=0)


def table(learner: Learner) -> list[tuple[str, str, int, int]]:
    """(part, how it learns, parameters that learn, frozen parameters), for people."""
    run, lines = learner.run, []
    for name in PARTS:
        mine = (p for key, p in learner.model.named_parameters() if learner.part_of(key) == name)
        sizes = [(p.numel(), p.requires_grad) for p in mine]
        learned = sum(n for n, learns in sizes if learns)
        part = run.part(name)
        how = f"lora rank {part.rank}" if part.learn == "lora" else part.learn
        lines.append((name, how, learned, sum(n for n, learns in sizes if not learns)))
    looks = sum(p.numel() for key, p in learner.model.named_parameters() if learner.part_of(key) == QLLAMA)
    if looks:
        lines.append((QLLAMA, "frozen", 0, looks))
    if learner.rows is not None:
        lines.append(("new tokens", "full", sum(p.numel() for p in learner.rows.parameters()), 0))
    return lines


def _lr_scale(run: RunConfig, part: str) -> float:
    beside = {ROWS: run.tokens.lr_scale, PROJECTIONS: run.distill.projection_lr_scale}
    return beside[part] if part in beside else run.part(part).lr_scale


def _drop_paths(model: ChatModel, top: float | None) -> None:
    if top is None:
        return
    config, blocks = model.config.vision, model.vision.layers
    for block, rate in zip(blocks, drop_path_rates(top, len(blocks), config.drop_path_schedule), strict=True):
        block.drop_path = DropPath(rate)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def adapt(model: Adaptable, name: str, part: Part, precision: str) -> None:
    """Low-rank pairs beside the matrices of one part."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ValueError(f"{name}.learn is 'lora', which needs: pip install 'internvl[train]'") from error
    from internvl.models.adapters import add_adapters, module_of

    add_adapters(model, part.rank, alpha=part.alpha or 2 * part.rank, dropout=part.dropout, parts=(name,))
    for module in module_of(model, name).modules():
        if isinstance(module, BaseTunerLayer):
            # autocast chooses the type; peft would copy every input to fp32 first
            module.cast_input_dtype_enabled = precision != "bf16"


def _thaw(module: nn.Module, part: Part) -> None:
    if not part.layers_from:
        module.requires_grad_(True)
        return
    blocks = next((m for m in module.modules() if isinstance(m, nn.ModuleList)), None)
    if blocks is None or not -len(blocks) <= part.layers_from < len(blocks):
        count = 0 if blocks is None else len(blocks)
        raise ValueError(f"layers_from is {part.layers_from} but the part has {count} blocks; give a smaller number")
    for block in blocks[part.layers_from :]:
        block.requires_grad_(True)


def _token_rows(model: ChatModel, run: RunConfig, token_ids: Sequence[int]) -> TokenRows | None:
    if not run.tokens.learn:
        return None
    if run.language.learn == "full":
        raise ValueError(
            "tokens.learn is on, but language.learn is 'full' learns the whole table; use --tokens.no-learn"
        )
    if not token_ids:
        raise ValueError("tokens.learn is on, but the model has no tokenizer to name the rows; use --tokens.no-learn")
    language = model.language.model
    return TokenRows(language.get_input_embeddings(), language.get_output_embeddings(), token_ids)


def set_dtypes(model: nn.Module, parameters: dict[str, nn.Parameter], run: RunConfig) -> None:
    """What learns in float32, what is frozen in the run's precision."""
    learned = {id(p) for p in parameters.values()}
    frozen = torch.bfloat16 if run.precision == "bf16" else torch.float32
    for parameter in model.parameters():  # one by one: buffers (rotary frequencies) keep their precision
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in learned else frozen)
