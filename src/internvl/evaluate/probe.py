"""Probes: small heads trained on features that were computed once, and their accuracy. Deterministic by seed.

The backbone is not here: who computed the features says how (layer, picture size). Heads are models/heads.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from internvl.evaluate.classify import Accuracy, accuracy
from internvl.evaluate.ranking import Ranks
from internvl.models.heads import AttentionProbe, LinearProbe

PROTOCOL_BATCH = 512
"""Pictures that the learning rate is stated for (InternVL paper, table 22)."""
Features = Float[Tensor, "pictures *shape"]


@dataclass(frozen=True)
class ProbeSettings:
    """How a head is trained; the defaults are the official linear probe's, without augmentation (paper, table 22)."""

    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """For 512 pictures a batch; the one best on held-back training pictures is taken. One alone: no sweep (0.1 is the
    official one)."""
    epochs: int = 10
    warmup_epochs: float = 1.0
    batch: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float = 5.0
    label_smoothing: float = 0.0
    """0.1 in the published log, where Mixup and CutMix mix pixels besides."""
    held_back: float = 0.1
    """Share of the training pictures that chooses the learning rate; the chosen head then learns from all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning rates {self.learning_rates}; give at least one, all above 0")
        if self.epochs < 1 or self.batch < 2 or not 0 < self.held_back < 1:
            raise ValueError(
                f"epochs {self.epochs}, batch {self.batch}, held_back {self.held_back}; at least 1 epoch, 2 pictures a "
                "batch (batch norm) and a share between 0 and 1"
            )


@dataclass(frozen=True)
class Probe:
    """A trained head and how it was chosen."""

    head: nn.Module
    chosen: float
    """Learning rate, or L2 strength."""
    tried: Mapping[float, float]
    """Each candidate -> top-1 on the held-back pictures; empty where there was one candidate."""

    @torch.inference_mode()
    def score(self, features: Features, labels: Int[Tensor, " pictures"], block: int = 4096) -> Accuracy:
        """Accuracy on pictures that training did not see."""
        self.head.eval()
        first = next(self.head.parameters())
        parts = [
            _ranks(self.head(features[i : i + block].to(first)), labels[i : i + block].to(first.device))
            for i in range(0, len(labels), block)
        ]
        if not parts:
            raise ValueError("no picture to score; give at least one")
        greater, equal, right = (torch.cat([getattr(p, name) for p in parts]) for name in ("greater", "equal", "right"))
        return accuracy(Ranks(greater, equal, right), labels, self.head(features[:1].to(first)).shape[1])


def _ranks(scores: Float[Tensor, "pictures classes"], labels: Int[Tensor, " pictures"]) -> Ranks:
    right = scores.gather(1, labels[:, None])
    return Ranks((scores > right).sum(1), (scores == right).sum(1) - 1, torch.ones_like(labels))


def linear_probe(
    features: Float[Tensor, "pictures dim"],
    labels: Int[Tensor, " pictures"],
    num_classes: int,
    settings: ProbeSettings | None = None,
) -> Probe:
    """Batch norm and a linear layer by SGD (official linear probe)."""
    return _probe(lambda: LinearProbe(features.shape[1], num_classes), features, labels, num_classes, settings)


def attention_probe(
    tokens: Float[Tensor, "pictures tokens dim"],
    labels: Int[Tensor, " pictures"],
    num_classes: int,
    settings: ProbeSettings | None = None,
    num_heads: int = 8,
) -> Probe:
    """One learned query over all tokens, then the linear probe, by SGD."""
    make: Callable[[], nn.Module] = lambda: AttentionProbe(tokens.shape[2], num_classes, num_heads)  # noqa: E731
    return _probe(make, tokens, labels, num_classes, settings)


def _probe(
    make: Callable[[], nn.Module],
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    settings: ProbeSettings | None,
) -> Probe:
    settings = settings or ProbeSettings()
    check_features(features, labels, num_classes)
    tried: dict[float, float] = {}
    if len(settings.learning_rates) > 1:
        kept, held = hold_back(labels, settings.held_back, settings.seed)
        for rate in settings.learning_rates:
            head = _train(make, features[kept], labels[kept], rate, settings)
            tried[rate] = Probe(head, rate, {}).score(features[held], labels[held]).top1
    chosen = max(tried, key=lambda rate: tried[rate]) if tried else settings.learning_rates[0]
    return Probe(_train(make, features, labels, chosen, settings), chosen, tried)


def check_features(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """ValueError unless features and labels agree in number, labels are classes and features finite."""
    if len(features) != len(labels) or len(labels) < 4:
        raise ValueError(f"{len(features)} features and {len(labels)} labels; the numbers must agree and be at least 4")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())} but there are {num_classes} classes; "
            "count them from 0"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features are not finite; compute them in float32")


def hold_back(
    labels: Int[Tensor, " pictures"], share: float, seed: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Rows to learn from and rows to choose by: of each class the same share, rounded down, but one in all at least."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = []
    for label in labels.cpu().unique():
        rows = order[labels.cpu()[order] == label]
        held.append(rows[: int(len(rows) * share)])
    chosen = torch.cat(held)
    if not len(chosen):
        chosen = order[: max(1, int(len(labels) * share))]
    left = torch.ones(len(labels), dtype=torch.bool)
    left[chosen] = False
    return left.nonzero()[:, 0], chosen.sort().values


def _train(
    make: Callable[[], nn.Module], features: Tensor, labels: Tensor, rate: float, settings: ProbeSettings
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = make().to(features.device)
    head.train()
    batch = min(settings.batch, len(labels))
    steps = max(1, len(labels) // batch)  # as officially: what does not fill a batch waits for the next shuffle
    peak = rate * batch / PROTOCOL_BATCH
    optimiser = torch.optim.SGD(
        head.parameters(), lr=peak, momentum=settings.momentum, nesterov=True, weight_decay=settings.weight_decay
    )
    draw = torch.Generator().manual_seed(settings.seed)
    warmup = settings.warmup_epochs * steps
    for epoch in range(settings.epochs):
        order = torch.randperm(len(labels), generator=draw).to(features.device)
        for step in range(steps):
            done = epoch * steps + step
            optimiser.param_groups[0]["lr"] = peak * schedule(done, settings.epochs * steps, warmup)
            rows = order[step * batch : (step + 1) * batch]
            loss = F.cross_entropy(head(features[rows].float()), labels[rows], label_smoothing=settings.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), settings.clip_norm)
            optimiser.step()
    return head


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate: up in a line, down along a cosine to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


def logistic_probe(
    features: Float[Tensor, "pictures dim"],
    labels: Int[Tensor, " pictures"],
    num_classes: int,
    *,
    strengths: tuple[float, ...] = (1e-6, 1e-4, 1e-2, 1e0),
    held_back: float = 0.1,
    max_iterations: int = 200,
    seed: int = 0,
) -> Probe:
    """Logistic regression to convergence by L-BFGS on standardised features, L2 strength from held-back pictures.

    The problem is convex: the answer depends on the data alone, not on a rate or on luck (CLIP, appendix A.3, with the
    strength swept in the loss's scale: mean cross-entropy + strength / 2 x |weights|^2).
    """
    check_features(features, labels, num_classes)
    if not strengths or min(strengths) < 0:
        raise ValueError(f"L2 strengths {strengths}; give at least one, none below 0")
    tried: dict[float, float] = {}
    if len(strengths) > 1:
        kept, held = hold_back(labels, held_back, seed)
        for strength in strengths:
            head = _logistic(features[kept], labels[kept], num_classes, strength, max_iterations)
            tried[strength] = Probe(head, strength, {}).score(features[held], labels[held]).top1
    chosen = max(tried, key=lambda strength: tried[strength]) if tried else strengths[0]
    return Probe(_logistic(features, labels, num_classes, chosen, max_iterations), chosen, tried)


def _logistic(features: Tensor, labels: Tensor, num_classes: int, strength: float, iterations: int) -> nn.Module:
    wide = features.detach().double()
    mean, spread = wide.mean(0), wide.std(0).clamp(min=1e-12)
    wide = (wide - mean) / spread
    weight = torch.zeros(num_classes, wide.shape[1], dtype=wide.dtype, device=wide.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=wide.dtype, device=wide.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(wide, weight, bias), labels) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    head = nn.Linear(wide.shape[1], num_classes, device=wide.device, dtype=wide.dtype)
    with torch.no_grad():
        head.weight.copy_(weight / spread)
        head.bias.copy_(bias - (weight / spread) @ mean)
    return head
