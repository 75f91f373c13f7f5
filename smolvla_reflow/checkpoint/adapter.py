"""A PEFT adapter: `lerobot-train --peft.*` saves it in place of the policy's weights.

LeRobot loads the base that `adapter_config.json` names, with the configuration saved beside the adapter, and PEFT adds
the adapter's layers. `merged` does the same, and then has PEFT add these layers to the base's weights. The result is
the same function of the observation, up to rounding, and a stock SmolVLA.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.errors import ReflowError, doing, sha256

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Fields of `adapter_config.json` that say where an adapter comes from. The other fields say how it acts.
OF_ITS_ORIGIN = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode")


def merge_command(source: object) -> str:
    """The command that makes a stock checkpoint of an adapter."""
    return f"smolvla-reflow-merge {source} NEW_FOLDER"


def check_adapter(source: str, folder: Path, fields: Mapping[str, Any]) -> None:
    """Raise ReflowError if PEFT is missing, or if it would unpickle weights or import a module that a file names."""
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise ReflowError(f"The adapter {source} holds no {ADAPTER_WEIGHTS_NAME}. Pickled weights are never loaded.")
    if fields.get("megatron_config"):  # then PEFT imports the module that `megatron_core` names
        raise ReflowError(
            f"{folder / ADAPTER_CONFIG_NAME} has a megatron_config, and PEFT would import the module that it names. "
            "SmolVLA needs no such module; take it out."
        )
    _peft()


def adapter_digest(folder: Path, fields: Mapping[str, Any]) -> bytes:
    """SHA-256 of an adapter's weights and of the fields of its `adapter_config.json` that say how it acts."""
    digest = sha256(folder / ADAPTER_WEIGHTS_NAME)
    relevant = {name: value for name, value in fields.items() if name not in OF_ITS_ORIGIN}
    digest.update(json.dumps(relevant, sort_keys=True).encode())
    return digest.digest()


def merged(base: SmolVLAPolicy, folder: Path) -> SmolVLAPolicy:
    """The base with the adapter in `folder` merged into it; `base` has the adapter's configuration, and is used up."""
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(folder))
    adapted = peft.PeftModel.from_pretrained(base, str(folder), config=settings)
    # PEFT warns about missing weights and ignores unknown ones. A second load returns the names of both.
    found = adapted.load_adapter(str(folder), adapted.active_adapter, torch_device="cpu")
    for problem, names in (("lacks", found.missing_keys), ("has the unknown", found.unexpected_keys)):
        if names:
            raise ReflowError(f"The adapter in {folder} does not fit its base: it {problem} {names[0]}.")
    with doing(f"merging the adapter in {folder}, of kind {settings.peft_type.value}, into its base"):
        return adapted.merge_and_unload()


def _peft() -> ModuleType:
    with doing("importing the package peft for a PEFT adapter (pip install peft)"):
        import peft
    return peft
