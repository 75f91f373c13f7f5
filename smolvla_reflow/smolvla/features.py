"""The features that a policy takes from a dataset or an environment, chosen as LeRobot chooses them.

LeRobot takes any dataset with some of the cameras in a policy's `config.json`, or with all and more. It never reads the
widths in `config.json`, and they may still be the widths of the base that the policy was fine-tuned from.
"""

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.utils import validate_visual_features_consistency
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_PREFIX, OBS_STATE

from smolvla_reflow.checkpoint.read import PREPROCESSOR_NAME, Checkpoint
from smolvla_reflow.compat import renamed_early
from smolvla_reflow.errors import ReflowError, in_one_line
from smolvla_reflow.smolvla.statistics import saved_statistics, width_of

EMPTY_CAMERA = f"{OBS_IMAGES}.empty_camera_"


def cameras_seen(config: SmolVLAConfig, names: Collection[str]) -> tuple[str, ...]:
    """The images that a policy makes of a batch with these names, in its own order; empty images have no name.

    At most `config.empty_cameras` missing cameras become empty images.
    """
    known = list(config.image_features)
    missing = sum(name not in names for name in known)
    return (*(name for name in known if name in names), *[""] * min(missing, config.empty_cameras))


def saved_rename_map(checkpoint: Checkpoint) -> dict[str, str]:
    """The map from a dataset's names to the policy's in the saved preprocessor; empty if nothing was renamed."""
    for step in checkpoint.processors.get(PREPROCESSOR_NAME, ()):
        if issubclass(step.type, RenameObservationsProcessorStep):
            return dict(step.config.get("rename_map") or {})
    return {}


def rename_map_in_use(checkpoint: Checkpoint, given: dict[str, str], names: Collection[str]) -> dict[str, str]:
    """The part of the given map, or of the checkpoint's own if that is empty, that changes a dataset's names."""
    rename_map = given or saved_rename_map(checkpoint)
    return {name: rename_map[name] for name in names if rename_map.get(name, name) != name}


def fitted(
    checkpoint: Checkpoint,
    features: Mapping[str, PolicyFeature],
    rename_map: dict[str, str],
    where: str = "the dataset",
) -> Checkpoint:
    """The checkpoint, with the features in its config that LeRobot would run it with.

    `features` belong to a dataset or an environment, called `where` in messages. If `rename_map` is empty, the
    checkpoint's own map holds. Raises ReflowError if the policy cannot use these features.
    """
    source, rename_map = checkpoint.source, rename_map or saved_rename_map(checkpoint)
    given = {rename_map.get(name, name): feature for name, feature in features.items()}
    saved = saved_statistics(checkpoint)
    for name in (OBS_STATE, ACTION):
        if name not in given:
            raise ReflowError(
                f"{source} needs '{name}', which {where} lacks (it has {', '.join(sorted(given))}). If the dataset "
                "has another name for it, map it with --rename_map."
            )
        shape, width = tuple(given[name].shape), width_of(saved.get(name, {}))
        if width is not None and shape != (width,):
            raise ReflowError(
                f"'{name}' has shape {shape} in {where}, and {source} was trained on {width} dimensions (by its saved "
                "statistics)."
            )
    config = copy.deepcopy(checkpoint.config)
    config.output_features = {ACTION: given[ACTION]}
    if not config.input_features:
        config.input_features = {name: feature for name, feature in given.items() if name != ACTION}
    _check_cameras(source, config, features, rename_map, where)
    return replace(checkpoint, config=config)


def check_students_cameras(
    config: SmolVLAConfig, features: Mapping[str, PolicyFeature], rename_map: dict[str, str]
) -> None:
    """Raise ReflowError if LeRobot would train the student on batches without any of its cameras."""
    # If the config lists no features, LeRobot takes the dataset's own names, and still renames the batches.
    known = _cameras(config.input_features or features)
    if not {rename_map.get(name, name) for name in features if name.startswith(OBS_PREFIX)}.intersection(known):
        raise ReflowError(
            f"The student has the cameras {', '.join(known)}, and the batches have no such names"
            + (f" after --rename_map={rename_map}" if rename_map else "")
            + "; leave --policy.input_features out."
        )


def _cameras(features: Mapping[str, PolicyFeature]) -> list[str]:
    return [name for name, feature in features.items() if feature.type is FeatureType.VISUAL]


def _check_cameras(
    source: str, config: SmolVLAConfig, features: Mapping[str, PolicyFeature], rename_map: dict[str, str], where: str
) -> None:
    """Raise ReflowError unless LeRobot would run the policy with some of these cameras; warn if it drops one."""
    given = {rename_map.get(name, name): feature for name, feature in features.items()}
    early = renamed_early(rename_map)
    dropped = [name for name in _cameras(features) if not early.get(name, name).startswith(OBS_PREFIX)]
    if not any(cameras_seen(config, given.keys() - {rename_map.get(name, name) for name in dropped})):
        known = [name for name in config.image_features if not name.startswith(EMPTY_CAMERA)]
        raise ReflowError(
            f"{source} needs one of the cameras {', '.join(known)}, and {where} has "
            f"{', '.join(sorted(_cameras(given))) or 'none'}; map other names with --rename_map. LeRobot passes on "
            f"names that begin with '{OBS_PREFIX}'."
        )
    if dropped:
        logging.getLogger(__name__).warning(
            f"LeRobot drops {', '.join(dropped)} of {where}, since a camera's name has to begin with '{OBS_PREFIX}'."
        )
    if not rename_map:  # else LeRobot leaves it to the user
        try:
            validate_visual_features_consistency(config, given)
        except ValueError as error:
            raise ReflowError(f"{source} cannot use {where}: {in_one_line(error)}") from None
