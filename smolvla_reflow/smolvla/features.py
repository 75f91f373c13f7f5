"""Whether a policy can use what a dataset or an environment offers."""

from typing import Any

from lerobot.configs.types import FeatureType

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.smolvla.checkpoint import Checkpoint


def check_features(
    checkpoint: Checkpoint, features: dict[str, Any], rename_map: dict[str, str], where: str = "the dataset"
) -> None:
    """Raise ReflowError unless the features include the policy's state, action and cameras, in the policy's widths.

    Args:
        checkpoint: of the policy.
        features: by name, each with its "shape".
        rename_map: from names of `features` to the policy's.
        where: the features are found, for the message.
    """
    names = {rename_map.get(name, name): feature for name, feature in features.items()}
    expected = {**(checkpoint.config.input_features or {}), **(checkpoint.config.output_features or {})}
    for name, feature in expected.items():
        if name not in names:
            if feature.type is FeatureType.VISUAL and ".empty_camera_" in name:
                continue
            raise ReflowError(
                f"{checkpoint.source} needs '{name}', which {where} lacks (it has {', '.join(sorted(names))}); "
                "if it is there under another name, map it with --rename_map."
            )
        shape = tuple(names[name]["shape"])
        if feature.type in (FeatureType.STATE, FeatureType.ACTION) and shape != tuple(feature.shape):
            raise ReflowError(
                f"'{name}' has shape {shape} in {where} and {tuple(feature.shape)} in {checkpoint.source}."
            )
