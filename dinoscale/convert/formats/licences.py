"""What can be known of the licence of weights: their layout, and what a hub's folder says.

No file of the authors names its licence, and a layout shows a family of networks, not who trained
one: the note says no more than that. It stays with all that is trained from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from dinoscale.convert.read_files import Content

Family = Literal["dino", "dinov2", "dinov3", "convnext"]

_LAYOUTS: dict[Family, str] = {
    "dino": "of DINO and of other networks: those that DINO's authors released are under"
    " Apache-2.0",
    "dinov2": "of DINOv2: those that its authors released are under Apache-2.0",
    "dinov3": "of DINOv3: those that its authors released are under the DINOv3 License, which also"
    " binds what is trained from them"
    " (https://ai.meta.com/resources/models-and-libraries/dinov3-license/)",
    "convnext": "of ConvNeXt: those that DINOv3's authors released are under the DINOv3 License,"
    " which also binds what is trained from them"
    " (https://ai.meta.com/resources/models-and-libraries/dinov3-license/), and others are not",
}
_STATED = re.compile(r"^(license_name|license): *[\"']?([\w.+-][\w .+-]{0,63})", re.MULTILINE)


def licence_note(content: Content, family: Family) -> str:
    """One or two sentences on weights that another program wrote, and on what derives from them."""
    note = (
        f"These weights, or those that they were trained from, have the layout {_LAYOUTS[family]}."
    )
    stated = _stated(content)
    return f"{note} Beside them, {stated}." if stated else note


def joined_notes(notes: Iterable[str | None]) -> str | None:
    """The notes on all weights that something derives from, each once; None if there are none."""
    joined = ""
    for note in notes:
        if note is not None and note not in joined:  # one may be joined already
            joined = f"{joined} {note}".strip()
    return joined or None


def _stated(content: Content) -> str | None:
    """What the model card of a hub's folder, or else timm's settings, say."""
    found = dict(_STATED.findall(content.model_card or ""))
    name = found.get("license_name") or found.get("license")
    if name:
        return f"README.md says license: {name.strip()}"
    settings = content.settings or {}
    config = settings.get("pretrained_cfg", settings)
    name = config.get("license") if isinstance(config, Mapping) else None
    if isinstance(name, str) and re.fullmatch(r"[\w .+-]{1,64}", name):
        return f"config.json says license: {name}"
    return None
