"""What a SmolVLA takes from the folder or hub id of its vision-language backbone, beside its own checkpoint."""

from pathlib import Path
from typing import Any

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from smolvla_reflow.errors import ReflowError, first_line, in_one_line

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


def check_backbone(config: SmolVLAConfig) -> None:
    """Raise ReflowError unless LeRobot can build this policy's network and image processor from its backbone."""
    name = config.vlm_model_name
    try:
        for part in (AutoConfig, AutoProcessor):
            part.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ReflowError(
            f"--policy.vlm_model_name={name}: the backbone's configuration is not there, nor could it be "
            f"downloaded ({first_line(error)}). If it has moved, say where it is now."
        ) from None
    except Exception as error:  # a package that transformers misses, and what damaged files lead it to
        raise ReflowError(f"--policy.vlm_model_name={name} cannot be used: {in_one_line(error)}") from error
    folder = Path(name)
    if config.load_vlm_weights and folder.is_dir() and not any(list(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ReflowError(
            f"--policy.vlm_model_name={name} holds no weights, which load_vlm_weights=true starts from. The checkpoint "
            "has them all, so make that false: by --policy.load_vlm_weights=false in training, else in its config.json."
        )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of this folder or hub id. Raises OSError or ValueError if there is none."""
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
