"""A PEFT adapter: what LeRobot saves of a policy that it trained with `--peft.*`, in place of the policy's weights.

LeRobot loads the base that `adapter_config.json` names, with the configuration that is saved with the adapter, and has
PEFT put the adapter's layers into it. `merged` does the same, and then has PEFT add them to the base's weights: the
same function of the observation, to rounding, and a stock SmolVLA again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from smolvla_reflow.errors import ReflowError, in_one_line, sha256

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Fields of `adapter_config.json` that say where an adapter comes from; the others say how it acts.
OF_ITS_ORIGIN = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode")


def merge_command(source: object) -> str:
    """The command that makes a stock checkpoint of an adapter."""
    return f"smolvla-reflow-merge {source} NEW_FOLDER"


def check_adapter(source: str, folder: Path, fields: Mapping[str, Any]) -> None:
    """Raise ReflowError unless the files are there that PEFT reads, and it is.

    Args:
        source: the adapter's name.
        folder: of its files.
        fields: of its `adapter_config.json`.
    """
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise ReflowError(
            f"The adapter {source} holds no {ADAPTER_WEIGHTS_NAME}; copy the whole checkpoint again. Pickled weights "
            "are never loaded."
        )
    if fields.get("megatron_config"):  # with which PEFT imports whatever module `megatron_core` names
        raise ReflowError(
            f"{folder / ADAPTER_CONFIG_NAME} has a megatron_config, with which PEFT imports the module it names, and "
            "SmolVLA needs none; take it out."
        )
    _peft()


def adapter_digest(folder: Path, fields: Mapping[str, Any]) -> bytes:
    """A hash of what an adapter adds to the actions of its base."""
    digest = sha256(folder / ADAPTER_WEIGHTS_NAME)
    relevant = {name: value for name, value in fields.items() if name not in OF_ITS_ORIGIN}
    digest.update(json.dumps(relevant, sort_keys=True).encode())
    return digest.digest()


def merged(base: SmolVLAPolicy, folder: Path) -> SmolVLAPolicy:
    """The base with an adapter merged into it, which uses it up.

    Args:
        base: the policy that the adapter was trained on, with the adapter's configuration.
        folder: of the adapter.

    Raises:
        ReflowError: the adapter does not fit the base, or is of a kind that cannot be merged.
    """
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(folder))
    adapted = peft.PeftModel.from_pretrained(base, str(folder), config=settings)
    # Once more, for what PEFT has found: of what is missing it only warns, of what is too much it says nothing.
    found = adapted.load_adapter(str(folder), adapted.active_adapter, torch_device="cpu")
    for problem, names in (("lacks", found.missing_keys), ("has the unknown", found.unexpected_keys)):
        if names:
            raise ReflowError(f"The adapter in {folder} does not fit its base: it {problem} {names[0]}.")
    try:
        return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ReflowError(
            f"The adapter in {folder} is of a kind ({settings.peft_type.value}) that PEFT cannot merge "
            f"({in_one_line(error)}), and only a merged one can be measured or reflowed here."
        ) from error


def _peft() -> ModuleType:
    """The package, without which LeRobot and this one do all else. Raises ReflowError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ReflowError(
            f"A PEFT adapter needs the package peft, which cannot be imported ({in_one_line(error)}): pip install peft"
        ) from None
    return peft
