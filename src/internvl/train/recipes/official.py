"""What the recipes of released models share: the settings of every official script, batches, what a run starts from.

The numbers of a generation stand in its own file, v1_1 to v2_5 and mini. A batch is that of all official GPUs together:
`accumulate` micro-batches on the devices that are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule
from internvl.zoo import RELEASED

MICRO = 4
"""Samples in a micro-batch, ours: memory only, the loss is weighted over all of a step."""
HUB = {
    "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
    "vicuna-13b-v1.5": "lmsys/vicuna-13b-v1.5",
    "internlm2-chat-1_8b": "internlm/internlm2-chat-1_8b",
    "internlm2_5-1_8b-chat": "internlm/internlm2_5-1_8b-chat",
    "internlm2_5-7b-chat": "internlm/internlm2_5-7b-chat",
    "internlm2-chat-20b": "internlm/internlm2-chat-20b",
    "internlm2_5-20b-chat": "internlm/internlm2_5-20b-chat",
    "Qwen2-0.5B-Instruct": "Qwen/Qwen2-0.5B-Instruct",
    "Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen2.5-3B-Instruct": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen2.5-32B-Instruct": "Qwen/Qwen2.5-32B-Instruct",
    "Qwen2.5-72B-Instruct": "Qwen/Qwen2.5-72B-Instruct",
    "Nous-Hermes-2-Yi-34B": "NousResearch/Nous-Hermes-2-Yi-34B",
    "Hermes-2-Theta-Llama-3-70B": "NousResearch/Hermes-2-Theta-Llama-3-70B",
    "Phi-3-mini-128k-instruct": "microsoft/Phi-3-mini-128k-instruct",
}
"""Language models by hub id; that of 1.1 was never released."""


@dataclass(frozen=True)
class Family:
    """One recipe for several sizes: `NAME_SIZE`, or NAME alone where there is one size, called ""."""

    name: str
    make: Callable[[str], RunConfig]
    releases: Mapping[str, str]
    """Size -> the release whose shape it trains."""
    vision: Mapping[str, str] = field(default_factory=dict)
    """Size -> vision encoder that a run starts from where it is not the release's own."""

    def recipe(self, size: str) -> str:
        return f"{self.name}_{size}" if size else self.name

    def prepare(self, size: str, run: RunConfig) -> None:
        """ValueError where the folder that the run starts from is not there: how to make it."""
        folder = Path(run.model)
        if folder.parts[:1] != ("runs",) or (folder / "config.json").is_file():
            return
        if folder.name == "model":
            raise ValueError(
                f"{run.model} is not there: this recipe starts from what `internvl train {folder.parent.name}` leaves; "
                "run that first, or give another --model"
            )
        raise ValueError(f"{run.model} is not there; make it with: {self.compose(size, run.model)}")

    def compose(self, size: str, target: str) -> str:
        """The command that puts the first model together, and what to change in its config.json."""
        row = RELEASED[self.releases[size]]
        if row.language not in HUB:
            return f"internvl compose {target}, from folders of {row.vision} and {row.language} (never released)"
        vision = self.vision.get(size, "InternVL-14B-224px" if row.config.queries else row.vision)
        command = (
            f"internvl compose {target} --vision {vision} --language {HUB[row.language].split('/')[1]} "
            f"--template {row.config.template} (folders of OpenGVLab/{vision} and {HUB[row.language]})"
        )
        if not row.config.image_marks:
            return command.replace(" --template", f" --form 1.0 --tile-size {row.config.tile_size} --template")
        unlike = {} if row.config.dynamic_tiles else {"ps_version": "v1", "dynamic_image_size": "false"}
        more = ", ".join(f"{key} {value}" for key, value in unlike.items())
        return command + (f"; then set in its config.json: {more}" if more else "")


def shared(name: str, model: str) -> RunConfig:
    """Common to the official scripts: bf16, AdamW 0.9 / 0.999 / 1e-8, norms clipped at 1, cosine to 0, checkpointing,
    samples of like length together, one rate for all parts, the plain mean over tokens (shell/internvl1.2, 1.5)."""
    return RunConfig(
        out=f"runs/{name}",
        model=model,
        connector=Part("full"),
        data=Data(
            batch_samples=MICRO, grouped=True, workers=4, max_length=4096, overlong="cut", max_tiles=12,
            weighting="token",
        ),
        optimiser=Optimiser(peak_lr=1e-5, weight_decay=0.05),
        schedule=Schedule(epochs=1, warmup_share=0.03),
        precision="bf16",
        grad_checkpoint=True,
        save_every=200,
    )  # fmt: skip


def batch(run: RunConfig, samples: int) -> RunConfig:
    """`samples` a step, over all devices."""
    return replace(run, data=replace(run.data, batch_samples=MICRO), accumulate=samples // MICRO)


def packed(run: RunConfig, rows: int) -> RunConfig:
    """`rows` packed rows a step: 16,384 positions, 48 tiles each, tokens weighing 1/sqrt(x) (paper 2.5, 3.4, 4.2)."""
    data = replace(
        run.data, batch_samples=None, batch_tokens=16384, batch_tiles=48, grouped=False, packed=True, max_length=16384,
        weighting="square",
    )  # fmt: skip
    return replace(run, data=data, accumulate=rows)


def learning(run: RunConfig, parts: str, drop_path: float = 0.0) -> RunConfig:
    """The parts named in full, the others frozen; `drop_path` as the scripts pass it, whether the ViT learns or not."""
    how = {name: Part("full" if name in parts.split() else "frozen") for name in ("vision", "connector", "language")}
    return replace(
        run,
        vision=replace(how["vision"], drop_path=drop_path),
        connector=how["connector"],
        language=how["language"],
    )


def rates(run: RunConfig, peak_lr: float, weight_decay: float) -> RunConfig:
    return replace(run, optimiser=replace(run.optimiser, peak_lr=peak_lr, weight_decay=weight_decay))


def second_full(run: RunConfig, drop_path: float) -> RunConfig:
    """Second fine-tuning in full: connector and language model, 128 samples a step (official *_finetune_full)."""
    return batch(learning(run, "connector language", drop_path), 128)


def second_lora(run: RunConfig) -> RunConfig:
    """Second fine-tuning by adapters: rank 16 on the language model, all else frozen, 16 samples a step, no drop path
    (official *_finetune_lora)."""
    run = batch(learning(run, ""), 16)
    return replace(run, language=Part("lora", rank=16))
