"""The vision-language backbone: its folder or hub id gives a SmolVLA's structure and its tokenizer."""

from typing import Any

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from smolvla_reflow.errors import doing


def check_backbone(config: SmolVLAConfig) -> None:
    """Raise ReflowError unless the backbone's configuration and processor load without code that it brings along."""
    with doing(f"opening the backbone --policy.vlm_model_name={config.vlm_model_name}"):
        for part in (AutoConfig, AutoProcessor):
            part.from_pretrained(config.vlm_model_name, trust_remote_code=False)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of this folder or hub id. Raises OSError or ValueError if there is none."""
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
