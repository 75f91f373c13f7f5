"""What a policy sees of a dataset or an environment, and whether that is enough, as LeRobot decides it.

LeRobot takes any dataset that has some of the cameras in a policy's `config.json`, or all of them and more. It never
looks at the widths there, which may still be those of the base that the policy was fine-tuned from.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.utils import validate_visual_features_consistency
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from smolvla_reflow.checkpoint.read import PREPROCESSOR_NAME, Checkpoint
from smolvla_reflow.errors import ReflowError, in_one_line
from smolvla_reflow.smolvla.statistics import Statistics, saved_statistics, width_of

EMPTY_CAMERA = f"{OBS_IMAGES}.empty_camera_"


def cameras_seen(config: SmolVLAConfig, names: Collection[str]) -> tuple[str, ...]:
    """The images that a policy makes of a batch with these names, in its own order; empty ones have no name.

    A missing camera becomes an empty image, but no more of them do than `config.empty_cameras` says.
    """
    known = list(config.image_features)
    missing = sum(name not in names for name in known)
    return (*(name for name in known if name in names), *[""] * min(missing, config.empty_cameras))


def saved_rename_map(checkpoint: Checkpoint) -> dict[str, str]:
    """From a dataset's names to the policy's, as the checkpoint was trained; empty if nothing was renamed.

    Raises:
        ReflowError: it has no processors, or they cannot be used.
    """
    for step in checkpoint.steps(PREPROCESSOR_NAME):
        if issubclass(step.type, RenameObservationsProcessorStep):
            return dict(step.config.get("rename_map") or {})
    return {}


def rename_map_in_use(checkpoint: Checkpoint, given: dict[str, str], names: Collection[str]) -> dict[str, str]:
    """Which of a dataset's names the policy knows by others: by the given map, or if that is empty, its own."""
    rename_map = given or saved_rename_map(checkpoint)
    return {name: rename_map[name] for name in names if rename_map.get(name, name) != name}


def fitted(
    checkpoint: Checkpoint,
    features: Mapping[str, PolicyFeature],
    rename_map: dict[str, str],
    where: str = "the dataset",
) -> Checkpoint:
    """The checkpoint, with the features in its config that LeRobot would run it with here.

    Args:
        checkpoint: of the policy.
        features: by name; of a dataset or an environment.
        rename_map: from names of `features` to the policy's; if it is empty, the one saved in the checkpoint holds.
        where: the features are found, for the message.

    Raises:
        ReflowError: the policy cannot use these features.
    """
    rename_map = rename_map or saved_rename_map(checkpoint)
    here = {rename_map.get(name, name): feature for name, feature in features.items()}
    saved = saved_statistics(checkpoint)
    for name in (OBS_STATE, ACTION):
        if name not in here:
            raise ReflowError(
                f"{checkpoint.source} needs '{name}', which {where} lacks (it has {', '.join(sorted(here))}); "
                "if it is there under another name, map it with --rename_map."
            )
        _check_width(checkpoint.source, saved, name, here[name], where)
    config = copy.deepcopy(checkpoint.config)
    config.output_features = {ACTION: here[ACTION]}
    if not config.input_features:
        config.input_features = {name: feature for name, feature in here.items() if name not in config.output_features}
    _check_cameras(checkpoint.source, config, here, where, renamed=bool(rename_map))
    return replace(checkpoint, config=config)


def check_students_cameras(
    config: SmolVLAConfig, features: Mapping[str, PolicyFeature], rename_map: dict[str, str]
) -> None:
    """Raise ReflowError if LeRobot would train the student on batches in which it finds none of its cameras.

    Args:
        config: of the student.
        features: of the dataset, by name.
        rename_map: from names of `features` to those in the batches.
    """
    # Where the config lists no features, LeRobot takes the dataset's own names, and renames the batches all the same.
    own = config.input_features or features
    known = [name for name, feature in own.items() if feature.type is FeatureType.VISUAL]
    if not {rename_map.get(name, name) for name in features}.intersection(known):
        raise ReflowError(
            f"The student has the cameras {', '.join(known)}, and finds none of them in the batches"
            + (f", whose names are mapped by {rename_map}" if rename_map else "")
            + "; leave --policy.input_features out."
        )


def _check_width(source: str, saved: Statistics, name: str, feature: PolicyFeature, where: str) -> None:
    """Raise ReflowError unless the policy was trained on a feature of this width."""
    width = width_of(saved.get(name, {}))
    if width is not None and tuple(feature.shape) != (width,):
        raise ReflowError(
            f"'{name}' has shape {tuple(feature.shape)} in {where}, and {source} was trained on {width} "
            "dimensions (so say the statistics it was saved with)."
        )


def _check_cameras(
    source: str, config: SmolVLAConfig, here: Mapping[str, PolicyFeature], where: str, *, renamed: bool
) -> None:
    """Raise ReflowError unless LeRobot would run the policy with the cameras that are here."""
    if not any(cameras_seen(config, here)):
        known = [name for name in config.image_features if not name.startswith(EMPTY_CAMERA)]
        there = sorted(name for name, feature in here.items() if feature.type is FeatureType.VISUAL)
        raise ReflowError(
            f"{source} needs one of the cameras {', '.join(known)}, and {where} has {', '.join(there) or 'none'}; if "
            "they are the same under other names, map them with --rename_map."
        )
    if not renamed:  # LeRobot leaves it to the user then
        try:
            validate_visual_features_consistency(config, dict(here))
        except ValueError as error:
            raise ReflowError(f"{source} cannot use {where}: {in_one_line(error)}") from None
