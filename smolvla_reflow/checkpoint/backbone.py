"""The vision-language backbone: its folder or hub id gives a SmolVLA's structure and its tokenizer."""

from typing import Any

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from smolvla_reflow.errors import ReflowError, doing


def check_backbone(config: SmolVLAConfig) -> None:
    """Raise ReflowError unless the backbone's configuration and processor load without code that it brings along."""
    with doing(f"opening the backbone --policy.vlm_model_name={config.vlm_model_name}"):
        for part in (AutoConfig, AutoProcessor):
            part.from_pretrained(config.vlm_model_name, trust_remote_code=False)


def load_tokenizer(name: object) -> Any:
    """Load the tokenizer of this folder or hub id without code that it brings along. Raises ReflowError."""
    with doing(f"loading the tokenizer {name} (--policy.vlm_model_name names another)"):
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)


def tokenizer_or_none(name: object) -> Any:
    """The tokenizer of this folder or hub id, None if it cannot be loaded."""
    try:
        return load_tokenizer(name)
    except ReflowError:
        return None
