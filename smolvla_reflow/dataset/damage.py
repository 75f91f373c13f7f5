"""What is wrong with a dataset's files: which of them, and what mends it.

unreadable_metadata    why LeRobot could not read what is in meta/
unusable_statistics    what lerobot-train would stumble over, or leave unnormalised
not_finite             what was recorded that is NaN or infinity
wrong_counts           numbers that contradict each other, by which frames would be mistaken for others
damaged_data           parquet files and videos that are missing, cut off, or hold other frames

All but the first return None where nothing is wrong. Only headers and footers are read, so that a large dataset costs
seconds.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from lerobot.datasets.utils import (
    DEFAULT_TASKS_PATH,
    EPISODES_DIR,
    INFO_PATH,
    LEGACY_EPISODES_PATH,
    LEGACY_TASKS_PATH,
    STATS_PATH,
    get_safe_version,
    is_valid_version,
)
from lerobot.datasets.video_utils import get_video_duration_in_s
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from smolvla_reflow.compat import (
    LeRobotDatasetMetadata,
    conversion_command,
    needs_camera_statistics,
    statistics_command,
)
from smolvla_reflow.errors import first_line
from smolvla_reflow.smolvla.statistics import TYPES, in_use

EPISODE_COLUMNS = ("episode_index", "length", "dataset_from_index", "dataset_to_index", "data/chunk_index")
NEEDED_INFO = ("codebase_version", "fps", "features", "total_episodes", "total_frames", "total_tasks", "data_path")
# Seconds by which a video's header may be off what the table of episodes says.
ROUNDING = 0.5
# How many missing files to ask the hub about.
ASKED = 50


class Damage(NamedTuple):
    """What is wrong, in a clause that names the file, and a sentence that says what to do."""

    what: str
    remedy: str


def unreadable_metadata(repo_id: str, root: Path, error: Exception) -> Damage:
    """The first file of `meta/` that is missing or cannot be read.

    Args:
        repo_id: of the dataset.
        root: its folder.
        error: what LeRobot said, for where nothing else is found.
    """
    again = _fetch_again(repo_id, root)
    if not (root / INFO_PATH).is_file():
        return Damage(f"{INFO_PATH} is missing", again)
    info, problem = _json_object(root / INFO_PATH)
    problem = problem or next((f"lacks '{name}'" for name in NEEDED_INFO if name not in info), None)
    if problem:
        return Damage(f"{INFO_PATH} {problem}", again)
    episodes = sorted((root / EPISODES_DIR).glob("*/*.parquet"))
    for missing, older in (
        (DEFAULT_TASKS_PATH if not (root / DEFAULT_TASKS_PATH).is_file() else None, LEGACY_TASKS_PATH),
        (f"{EPISODES_DIR}/*/*.parquet" if not episodes else None, LEGACY_EPISODES_PATH),
    ):
        if missing and (root / older).is_file():
            return Damage(
                f"{missing} is missing, and there is {older} of the older format v2.1 instead",
                f"Convert it with: {conversion_command(repo_id, root)}",
            )
        if missing:
            return Damage(f"{missing} is missing", again)
    for path in (root / DEFAULT_TASKS_PATH, *episodes):
        if problem := _parquet_problem(path):
            return Damage(f"{path.relative_to(root)} {problem}", again)
    for path in episodes:
        columns = pq.read_schema(path).names
        for name in (name for name in EPISODE_COLUMNS if name not in columns):
            return Damage(f"{path.relative_to(root)} lacks the column '{name}'", again)
    if not _rows_of(root / EPISODES_DIR):
        return Damage(f"{EPISODES_DIR} lists no episode", again)
    if (root / STATS_PATH).exists() and (problem := _json_object(root / STATS_PATH)[1]):
        return Damage(f"{STATS_PATH} {problem}", _new_statistics(repo_id, root))
    return Damage(f"LeRobot cannot use {INFO_PATH} ({type(error).__name__}: {_said(error)})", again)


def _json_object(path: Path) -> tuple[dict[str, Any], str | None]:
    """A JSON object, and what is wrong with the file if there is none."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read ({_said(error)})"
    return (fields, None) if isinstance(fields, dict) else ({}, "holds no JSON object")


def unusable_statistics(
    metadata: LeRobotDatasetMetadata, policy: SmolVLAConfig, *, use_imagenet_stats: bool
) -> Damage | None:
    """The first statistic that is missing, no list of numbers, or of another width than its feature.

    Args:
        metadata: of the dataset.
        policy: which is normalised by them.
        use_imagenet_stats: whether LeRobot replaces those of the cameras.
    """
    anew = _new_statistics(metadata.repo_id, metadata.root)
    stats: dict[str, Any] | None = metadata.stats
    if stats is None:
        return Damage(f"{STATS_PATH} is missing", anew)
    for feature in (name for name in TYPES if name in metadata.features):
        for statistic in in_use(policy, feature):
            if problem := _statistic_problem(metadata, feature, statistic):
                return Damage(f"in {STATS_PATH}, '{feature}' {problem}", anew)
    if use_imagenet_stats and needs_camera_statistics():
        for camera in metadata.camera_keys:
            if not isinstance(stats.get(camera), dict):
                unneeded = "--dataset.use_imagenet_stats=false does without, as SmolVLA's images are not normalised. "
                return Damage(f"{STATS_PATH} has nothing about the camera '{camera}'", unneeded + anew)
    return None


def _statistic_problem(metadata: LeRobotDatasetMetadata, feature: str, statistic: str) -> str | None:
    of_feature = metadata.stats.get(feature, {})
    if not isinstance(of_feature, dict):
        return "has no statistics by name"
    values = of_feature.get(statistic)
    if values is None:
        return f"has no '{statistic}', by which it is normalised"
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        return f"has a '{statistic}' that is no list of numbers"
    shape = tuple(metadata.features[feature]["shape"])
    if array.shape == shape:
        return None
    return f"has a '{statistic}' of shape {array.shape}, and {INFO_PATH} says that the feature has {shape}"


def not_finite(metadata: LeRobotDatasetMetadata, policy: SmolVLAConfig) -> str | None:
    """A sentence about recorded states or actions that are not finite, as their statistics then are not, either."""
    for feature in (name for name in TYPES if name in metadata.features):
        for statistic in in_use(policy, feature):
            if not np.isfinite(np.asarray(metadata.stats[feature][statistic], np.float64)).all():
                return (
                    f"The dataset's '{feature}' holds NaN or infinity (so says '{statistic}' in {STATS_PATH}); leave "
                    "the episodes out in which it does (lerobot-edit-dataset --operation.type=delete_episodes), or "
                    "record them again."
                )
    return None


def wrong_counts(metadata: LeRobotDatasetMetadata) -> Damage | None:
    """Numbers in `info.json` or the table of episodes that contradict each other, or tasks that are not there."""
    again = _fetch_again(metadata.repo_id, metadata.root)
    if not metadata.fps > 0:
        return Damage(f"{INFO_PATH} says fps={metadata.fps}", "Correct it to the frames per second of the recording.")
    if metadata.total_episodes == 0 and not _rows_of(metadata.root / EPISODES_DIR):
        return None  # nothing was recorded, and that is what it says
    if metadata.episodes is None:
        return Damage(f"{INFO_PATH} says 0 episodes, and {EPISODES_DIR} lists some", _CORRECT_INFO)
    table = metadata.episodes
    starts, stops = table["dataset_from_index"][:], table["dataset_to_index"][:]
    in_order = list(range(len(table))) == table["episode_index"][:]
    if not in_order or [0, *stops[:-1]] != starts or any(a >= b for a, b in zip(starts, stops, strict=True)):
        return Damage(f"the episodes in {EPISODES_DIR} do not follow each other without gaps", again)
    listed, said = (len(table), stops[-1]), (metadata.total_episodes, metadata.total_frames)
    if listed != said:
        return Damage(
            f"{INFO_PATH} says {said[0]} episodes and {said[1]} frames, and {EPISODES_DIR} lists {listed[0]} and "
            f"{listed[1]}",
            _CORRECT_INFO if _rows_of(metadata.root / "data") == listed[1] else again,
        )
    if metadata.tasks is None or not len(metadata.tasks):
        where = f"{INFO_PATH} says total_tasks=0" if metadata.tasks is None else f"{DEFAULT_TASKS_PATH} lists no task"
        return Damage(f"{where}, so that its frames have no instruction", again)
    return None


_CORRECT_INFO = f"The table is right, so correct {INFO_PATH} (total_episodes, total_frames)."


def damaged_data(
    metadata: LeRobotDatasetMetadata, episodes: Sequence[int] | None, *, streaming: bool = False
) -> Damage | None:
    """Data files or videos of these episodes (None for all) that are missing, cut off, or hold other frames.

    Args:
        metadata: of the dataset, whose counts are right.
        episodes: which of them are wanted.
        streaming: whether LeRobot reads the folder as it is, and downloads no missing files.
    """
    root, again = metadata.root, _fetch_again(metadata.repo_id, metadata.root)
    for path in sorted((root / "data").glob("*/*.parquet")):  # LeRobot opens all of them, whichever are wanted
        problem = _parquet_problem(path) or _contents_problem(path, metadata)
        if problem:
            return Damage(f"{path.relative_to(root)} {problem}", again)
    missing = missing_files(metadata, episodes)
    if missing:
        why_not = "streaming does not" if streaming else _why_not_on_the_hub(metadata, missing[:ASKED])
        others = f" and {len(missing) - 1} more files are missing" if len(missing) > 1 else " is missing"
        choose = "" if episodes is not None else " Or choose --dataset.episodes without it."
        return Damage(f"{missing[0]}{others} and cannot be downloaded ({why_not})", again + choose) if why_not else None
    frames = Counter[Path]()
    for file, length in zip(_data_files(metadata), metadata.episodes["length"][:], strict=True):
        frames[root / file] += length
    wanted = {root / file for file in _wanted(_data_files(metadata), episodes)}
    for path in sorted(wanted):
        if (rows := pq.read_metadata(path).num_rows) != frames[path]:
            what = f"{path.relative_to(root)} holds {rows} frames, and {EPISODES_DIR} lists {frames[path]} in it"
            return Damage(what, again)
    return _damaged_videos(metadata, episodes, again)


def missing_files(metadata: LeRobotDatasetMetadata, episodes: Sequence[int] | None) -> list[str]:
    """The data files and videos of these episodes (None for all) that are not on this machine."""
    files = [*_wanted(_data_files(metadata), episodes)]
    for camera in metadata.video_keys:
        files += _wanted(_video_files(metadata, camera), episodes)
    return [file for file in dict.fromkeys(files) if not (metadata.root / file).is_file()]


def _damaged_videos(metadata: LeRobotDatasetMetadata, episodes: Sequence[int] | None, again: str) -> Damage | None:
    for camera in metadata.video_keys:
        files = _video_files(metadata, camera)
        ends = dict[str, float]()
        for file, end in zip(files, metadata.episodes[f"videos/{camera}/to_timestamp"][:], strict=True):
            ends[file] = max(end, ends.get(file, 0.0))
        for file in dict.fromkeys(_wanted(files, episodes)):
            try:
                lasts = get_video_duration_in_s(metadata.root / file)
            except Exception as error:  # PyAV's errors, and whatever a header without a stream leads to
                return Damage(f"{file} is no whole video ({_said(error)})", again)
            if _is_cut(metadata.root / file):
                return Damage(f"{file} is cut off", again)
            if lasts < ends[file] - ROUNDING:
                what = f"{file} lasts {lasts:.1f} s, and {EPISODES_DIR} lists {ends[file]:.1f} s in it"
                return Damage(what, again)
    return None


def _is_cut(video: Path) -> bool:
    """Whether an MP4 file ends before the last of the boxes that it consists of; its header may be whole then."""
    end, position = video.stat().st_size, 0
    with video.open("rb") as file:
        while position < end:
            file.seek(position)
            header = file.read(16)
            size = int.from_bytes(header[:4], "big")
            if size == 1:  # a large box, whose size stands behind its name
                size = int.from_bytes(header[8:], "big")
            if size < 8:  # 0 for a box up to the end
                return size != 0
            position += size
    return position > end


def _data_files(metadata: LeRobotDatasetMetadata) -> list[str]:
    """The data file of each episode."""
    places = zip(metadata.episodes["data/chunk_index"][:], metadata.episodes["data/file_index"][:], strict=True)
    return [metadata.data_path.format(chunk_index=chunk, file_index=file) for chunk, file in places]


def _video_files(metadata: LeRobotDatasetMetadata, camera: str) -> list[str]:
    """The file of each episode's video from this camera."""
    columns = (metadata.episodes[f"videos/{camera}/{name}"][:] for name in ("chunk_index", "file_index"))
    template = str(metadata.video_path)
    return [template.format(video_key=camera, chunk_index=c, file_index=f) for c, f in zip(*columns, strict=True)]


def _wanted(files: Sequence[str], episodes: Sequence[int] | None) -> Iterator[str]:
    return (files[episode] for episode in (range(len(files)) if episodes is None else episodes))


def _parquet_problem(path: Path) -> str | None:
    try:
        pq.read_metadata(path)
    except Exception as error:  # OSError or one of Arrow's own
        return f"is cut off or no parquet file ({_said(error)})"
    return None


def _contents_problem(path: Path, metadata: LeRobotDatasetMetadata) -> str | None:
    footer = pq.read_metadata(path)
    columns = footer.schema.to_arrow_schema().names
    stored = [name for name, feature in metadata.features.items() if feature["dtype"] != "video"]
    if lacking := [name for name in stored if name not in columns]:
        return f"lacks the column '{lacking[0]}', which {INFO_PATH} lists"
    largest = _largest(footer, "task_index")
    if metadata.tasks is not None and largest is not None and largest >= len(metadata.tasks):
        return f"names task {largest}, and {DEFAULT_TASKS_PATH} lists {len(metadata.tasks)}"
    return None


def _largest(footer: pq.FileMetaData, column: str) -> int | None:
    """The largest value of a column, if the footer says."""
    groups = (footer.row_group(i) for i in range(footer.num_row_groups))
    found = (group.column(i) for group in groups for i in range(group.num_columns))
    said = [chunk.statistics for chunk in found if chunk.path_in_schema == column]
    return max((s.max for s in said if s is not None and s.has_min_max), default=None)


def _rows_of(folder: Path) -> int:
    """How many rows its parquet files hold, those that can be read."""
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*/*.parquet") if not _parquet_problem(path))


def _why_not_on_the_hub(metadata: LeRobotDatasetMetadata, files: list[str]) -> str | None:
    """Why these files cannot be downloaded, None if they can."""
    repo_id, revision = metadata.repo_id, metadata.revision
    try:
        revision = get_safe_version(repo_id, revision) if is_valid_version(revision) else revision
        there = {info.path for info in HfApi().get_paths_info(repo_id, files, repo_type="dataset", revision=revision)}
    except Exception as error:  # the hub client's and LeRobot's errors share no base class
        return _said(error)
    lacking = [file for file in files if file not in there]
    return f"{repo_id} on the hub lacks {lacking[0]}" if lacking else None


def _said(error: Exception) -> str:
    return first_line(error).rstrip(".")


def _fetch_again(repo_id: str, root: Path) -> str:
    place = "" if root.parent.name == "snapshots" else f", root='{root}'"  # else it is in the hub client's cache
    return (
        "Copy the dataset again, or have LeRobot fetch it from the hub again: "
        f"LeRobotDataset('{repo_id}'{place}, force_cache_sync=True)."
    )


def _new_statistics(repo_id: str, root: Path) -> str:
    return (
        f"Compute all of them anew with: {statistics_command(repo_id, root)} (which writes {STATS_PATH}, and then goes "
        "on to push the dataset to the hub)"
    )
