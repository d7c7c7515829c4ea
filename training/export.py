"""How models leave: open_clip `local-dir:` folders, with a model card for satellite encoders.

Anything that reads open_clip folders loads them; how they are trained is in loop.py and foundation.py.
"""

import json
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from upath import UPath

from graft_pipeline.manifests import is_local
from training.encoders import Clip

logger = logging.getLogger(__name__)

CARD = "model_card.json"
_README = "README.md"
_CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"


def save_encoder(folder: UPath, clip: Clip, card: dict[str, Any] | None = None) -> UPath:
    """Write a CLIP as an open_clip folder that appears whole or not at all.

    On an object store, which cannot rename folders, the config is put last: without it the folder does not
    load.

    Args:
        folder: folder to write; replaced if it exists.
        clip: the model; for a satellite encoder, the satellite image tower beside the foundation's text
            tower.
        card: what model_card.json says, and README.md for people, if the folder is to have them.

    Returns:
        The folder.
    """
    preprocess = {key: clip.preprocess_config[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": clip.model_config, "preprocess_cfg": preprocess}
    texts = {_CONFIG: _json(config)}
    if card is not None:
        texts = {CARD: _json(card), _README: readme(card)} | texts
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.model.state_dict().items()}

    if is_local(folder):
        final = Path(os.fspath(folder))
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f".{final.name}.*.partial"):
            # Of a process that was killed here.
            shutil.rmtree(leftover, ignore_errors=True)
        staging = final.with_name(f".{final.name}.{secrets.token_hex(6)}.partial")
    else:
        staging = Path(tempfile.mkdtemp())
    try:
        staging.mkdir(exist_ok=True)
        save_file(tensors, staging / _WEIGHTS)
        for name, content in texts.items():
            (staging / name).write_text(content)
        if is_local(folder):
            _replace_folder(staging, final)
        else:
            for name in (_WEIGHTS, *texts):
                (folder / name).write_bytes((staging / name).read_bytes())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("wrote %s", folder)
    return folder


def read_card(folder: UPath) -> dict[str, Any]:
    """The model card of a folder.

    Args:
        folder: folder that `save_encoder` wrote with a card.

    Returns:
        The card.
    """
    return json.loads((folder / CARD).read_text())


def readme(card: dict[str, Any]) -> str:
    """A model card for people: how to load the model, then what the card says.

    Args:
        card: the card; its values are texts, numbers, lists of texts, or mappings of those.

    Returns:
        Markdown.
    """
    lines = [
        "---",
        "library_name: open_clip",
        "---",
        f"# {card.get('what', 'CLIP')}",
        "",
        "```python",
        "import open_clip",
        "",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:/path/of/this/folder")',
        'tokenizer = open_clip.get_tokenizer("local-dir:/path/of/this/folder")',
        "```",
        "",
        "The image tower is the satellite encoder, the text tower the foundation model's.",
    ]
    plain = {
        key: value for key, value in card.items() if not isinstance(value, dict | list) and key != "what"
    }
    for title, value in {"model": plain, **card}.items():
        if isinstance(value, dict):
            lines += ["", f"## {title.replace('_', ' ').capitalize()}", "", "| | |", "|---|---|"]
            lines += [f"| {name.replace('_', ' ')} | {_cell(some)} |" for name, some in value.items()]
        elif isinstance(value, list):
            lines += ["", f"## {title.replace('_', ' ').capitalize()}", ""]
            lines += [f"- {some}" for some in value]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _replace_folder(staging: Path, final: Path) -> None:
    """Put a folder in another's place; a rename replaces files only, so the old one steps aside first."""
    if not final.exists():
        staging.replace(final)
        return
    old = final.with_name(f".{final.name}.{secrets.token_hex(6)}.partial")
    final.replace(old)
    staging.replace(final)
    shutil.rmtree(old)
