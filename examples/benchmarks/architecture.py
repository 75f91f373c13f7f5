"""SmolVLA at its real size (450 M parameters), offline. Its weights are random, and its cost is the real cost."""

from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor
from transformers import SmolVLMConfig

from smolvla_reflow.demo.backbone import write_backbone

CAMERAS = ("observation.images.top", "observation.images.wrist")
STATE_DIM = ACTION_DIM = 6
LANGUAGE_TOKENS = 48


def write_real_size_backbone(folder: Path) -> Path:
    """Write a folder like HuggingFaceTB/SmolVLM2-500M-Video-Instruct, without weights."""
    write_backbone(folder)
    config = SmolVLMConfig.from_pretrained(folder)
    config.scale_factor = 4
    for name, value in {
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
    }.items():
        setattr(config.text_config, name, value)
    for name, value in {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }.items():
        setattr(config.vision_config, name, value)
    config.save_pretrained(folder)
    return folder


def make_policy(backbone: Path, device: str = "cpu", **overrides: object) -> SmolVLAPolicy:
    """SmolVLA with its stock configuration for two cameras and a six-dimensional arm."""
    return SmolVLAPolicy(
        SmolVLAConfig(
            device=device,
            vlm_model_name=str(backbone),
            load_vlm_weights=False,
            push_to_hub=False,
            input_features={
                "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
                **{camera: PolicyFeature(FeatureType.VISUAL, (3, 480, 640)) for camera in CAMERAS},
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
            **overrides,
        )
    ).to(device)


def make_batch(policy: SmolVLAPolicy, size: int, seed: int = 0) -> dict[str, Tensor]:
    """A preprocessed batch of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    chunk = policy.config.chunk_size
    batch = {
        "observation.state": torch.randn(size, STATE_DIM, generator=generator),
        **{camera: torch.rand(size, 3, 480, 640, generator=generator) for camera in CAMERAS},
        "observation.language.tokens": torch.randint(0, 256, (size, LANGUAGE_TOKENS), generator=generator),
        "observation.language.attention_mask": torch.ones(size, LANGUAGE_TOKENS, dtype=torch.bool),
        "action": torch.randn(size, chunk, ACTION_DIM, generator=generator),
        "action_is_pad": torch.zeros(size, chunk, dtype=torch.bool),
    }
    return {name: tensor.to(policy.config.device) for name, tensor in batch.items()}
