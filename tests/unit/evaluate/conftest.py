"""A tiny ViT with fresh weights, and folders of noisy pictures whose class is their color."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.evaluate.classification.resumable_training import State, TrainingState
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=1
)
CARD = BackboneCard(
    SHAPE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), resize=18, crop=16, source="untrained"
)
COLORS = {"blue": (20, 40, 200), "green": (20, 190, 40), "red": (200, 30, 30)}


@dataclass(frozen=True)
class Colors:
    """Where the weights and sets lie."""

    root: Path
    weights: Path
    train: str
    test: str
    hard: tuple[str, str]  # train and test with noise far above the colors

    def folder(
        self, name: str, images: Mapping[str, int], *, seed: int = 0, noise: float = 15
    ) -> str:
        """A new set: class folder -> how many images; `noise` is a standard deviation of 255."""
        rng = np.random.default_rng(seed)
        for color, count in images.items():
            (self.root / name / color).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(COLORS[color] + rng.normal(0, noise, (20, 18, 3)), 0, 255)
                file = self.root / name / color / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(file)
        return str(self.root / name)


@pytest.fixture
def end_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Interrupt trainings, as by Ctrl-C, after a number of saved states."""
    save = TrainingState.save

    def end(times: int | None) -> None:
        saves = []

        def save_and_end(saved: TrainingState, state: State) -> None:
            save(saved, state)
            saves.append(state)
            if len(saves) == times:
                raise KeyboardInterrupt

        monkeypatch.setattr(TrainingState, "save", save_and_end)

    return end


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Colors:
    root = tmp_path_factory.mktemp("colors")
    torch.manual_seed(1)
    backbone = build_backbone(**vars(SHAPE))
    save_backbone(root / "weights.safetensors", backbone.state_dict(), CARD)
    place = Colors(
        root,
        root / "weights.safetensors",
        str(root / "train"),
        str(root / "test"),
        (str(root / "hard-train"), str(root / "hard-test")),
    )
    for seed, name in enumerate(("hard-train", "hard-test")):
        place.folder(name, dict.fromkeys(COLORS, 16), seed=seed, noise=250)
    place.folder("train", dict.fromkeys(COLORS, 12))
    place.folder("test", dict.fromkeys(COLORS, 4), seed=1)
    return place
