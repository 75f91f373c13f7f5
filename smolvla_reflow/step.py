"""A step: what a loss sees of one forward pass, and what it can ask for.

    step.coupling()         noise and the actions that the attached source carries it to
    step.recorded()         noise and the recorded actions
    step.losses(coupling)   the student's errors on the lines between the two, -> Losses

The prefix is encoded once in a step. The teacher is solved on it, and the student's errors come from it too: one pass
through the action expert for each line, with gradient. Where the prefix itself is trained, the student's own training
forward is asked instead, and the teacher encodes for itself.

Times, couplings per frame and the share of recorded data are the step's to decide, so that every loss goes by the
user's flags.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
from lerobot.utils.constants import ACTION
from torch import Tensor
from torch.nn.functional import mse_loss

from smolvla_reflow.coupling import Coupling, CouplingSource
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.prefix import Prefix, encode
from smolvla_reflow.smolvla.velocity import Velocity
from smolvla_reflow.step_metrics import MEASURED, ONE_STEP, TENTHS, LineSums, sums_of
from smolvla_reflow.teacher import FrozenTeacher
from smolvla_reflow.times import STOCK, TimeSampling

# What LeRobot's training logs under names of its own, in one version or another.
REPORTED_BY_LEROBOT = frozenset(
    {
        *("loss", "grad_norm", "lr", "update_s", "dataloading_s", "gpu_mem_gb", "samples_per_s"),
        *("preprocessing_s", "step_s", "steps", "samples", "episodes", "epochs"),
    }
)
REPORTED_BY_REFLOW = frozenset({ONE_STEP, *TENTHS, *MEASURED})


@dataclass(frozen=True, eq=False)
class Losses:
    """What a loss strategy returns.

    Attributes:
        values: (B, chunk_size, max_action_dim) float32, unreduced: squared errors of the velocity, weighed, and
            averaged over each frame's couplings.
        recorded: of which frames these are losses on recorded actions: of all, none, or (B,) bool. From LeRobot 0.5 on
            their padded parts do not count; every entry that counts weighs the same (`reduction.py`).
    """

    values: Tensor
    recorded: bool | Tensor = False


@dataclass(frozen=True, eq=False)
class Step:
    """What a loss sees of one forward pass in training: made where the batch comes in, thrown away after it.

    `B` is the number of frames in the batch, `K` the number of couplings for each.

    Attributes:
        model: the student's VLAFlowMatching.
        forward: the student's own training forward, from (*observation, actions, noise, t) to squared errors of v.
        observation: what the student sees of the B frames.
        actions: (B, chunk_size, max_action_dim) float32, the recorded ones, normalised and padded.
        source: of couplings.
        recipe: the user's choices of times, couplings per frame and share of recorded data.
        batch: as it came to the policy: "task", "index", "action_is_pad" and all else the dataset has. Empty where the
            model was called without its policy.
        noise: (B, chunk_size, max_action_dim) where the caller of forward fixed it, else None.
        time: (B,) where the caller of forward fixed it, else None.
        joint_forward: whether the student's errors come from `forward`, which encodes the prefix with gradient.
        one_prefix: whether the student's encoded prefix is the teacher's too.
        teachers_observation: what the teacher sees, if its cameras are others than the student's, else None.
        deviations: (D,), how many standard deviations one unit of each of the robot's action dimensions is.
        metrics: what `log` has collected.
        lines: what `losses` has found of the couplings, for the metrics of every loss (`monitor.py`).
    """

    model: VLAFlowMatching
    forward: Callable[..., Tensor]
    observation: Observation
    actions: Tensor
    source: CouplingSource
    recipe: Recipe
    batch: Mapping[str, Any] = field(default_factory=dict)
    noise: Tensor | None = None
    time: Tensor | None = None
    joint_forward: bool = False
    one_prefix: bool = False
    teachers_observation: Observation | None = None
    deviations: Tensor | None = None
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    lines: list[LineSums] = field(default_factory=list)

    @property
    def frames(self) -> Tensor | None:
        """(B,) int64, the frames' indices in the dataset, if the batch holds them."""
        return self.batch.get("index")

    @property
    def couplings_per_frame(self) -> int:
        """K: the recipe's, or 1 where the caller of forward fixed noise or time, which are one for each frame."""
        return self.recipe.couplings_per_frame if self.noise is None and self.time is None else 1

    @property
    def action_dim(self) -> int:
        """How many action dimensions are the robot's own, those of the batch before LeRobot pads it.

        All of them where the model was called without its policy. (A config may still say those of its base.)
        """
        return self.batch.get(ACTION, self.actions).shape[-1]

    def coupling(self) -> Coupling:
        """Noise and the actions it is carried to by the attached source: B * K lines, K in a row for each frame.

        Frames that are the recipe's share of recorded data are not asked about; their lines are recorded ones.

        Raises:
            ReflowError: the source fails, or gives something else than such lines.
        """
        first, per_frame = self._recorded_frames, self.couplings_per_frame
        if not first:
            return self._coupled(first, per_frame)
        lines = self._recorded_lines(first, per_frame)
        if first == len(self.actions):
            return _joined(lines, lines.noise[:0], lines.actions[:0])
        coupled = self._coupled(first, per_frame)
        return _joined(lines, coupled.noise, coupled.actions)

    def recorded(self) -> Coupling:
        """Noise and the recorded actions, drawn independently, as in standard training: B * K lines."""
        return self._recorded_lines(len(self.actions), self.couplings_per_frame)

    def times(self) -> Tensor:
        """t of B * K lines, (B * K,) float32, as the recipe draws it, or as the caller of forward fixed it."""
        return self._times(len(self.actions) * self.couplings_per_frame, self.recipe.time_sampling)

    def losses(
        self,
        coupling: Coupling,
        *,
        times: Tensor | float | str | None = None,
        weights: Tensor | float | None = None,
    ) -> Losses:
        """Squared errors of the student's velocity on these lines, `|| (noise - actions) - v(x_t, t) ||^2` unreduced.

        The recipe's share of the frames trains on recorded actions instead, in LeRobot's way: with noise of its own,
        SmolVLA's times, and unweighed. Couplings are weighed by the recipe, and by `weights`.

        Args:
            coupling: N lines, as many in a row for each frame: B * K of `coupling()` and `recorded()`.
            times: t of each line, (N,), M of them on each, (N, M), which cost M passes through the action expert, one
                t for all, or the name of a distribution (`smolvla_reflow.times`). By default the recipe's, and
                SmolVLA's own for recorded actions. A time that the caller of forward fixed comes first.
            weights: factors on the squared errors: one for all, one for each line or time, in the shape of `times`, or
                three dimensions that broadcast to (N, chunk_size, max_action_dim).

        Raises:
            ReflowError: something has another shape.
        """
        count = len(coupling.noise)
        self._check(coupling, count)
        if not count or count % len(self.actions):
            raise ReflowError(f"{count} lines for {len(self.actions)} frames: each frame needs as many, in a row.")
        if times is None:
            times = STOCK if coupling.recorded is True else self.recipe.time_sampling
        sampling = TimeSampling(times) if isinstance(times, str) and self.time is None else None
        if isinstance(times, Tensor) and times.ndim == 2 and self.time is None:
            coupling, times, weights = _once_for_each_time(coupling, times, weights)
        frames, count = len(self.actions), len(coupling.noise)
        t, w = self._times(count, times), self._weights(count, weights)
        if self._recorded_frames and coupling.recorded is not True:
            lines = self._recorded_lines(self._recorded_frames, count // frames)
            m = len(lines.noise)
            coupling = _joined(lines, coupling.noise[m:], coupling.actions[m:])
            t = torch.cat([self._times(count, STOCK)[:m], t[m:]])
            w = None if w is None else torch.cat([torch.ones_like(w[:m]), w[m:]])

        some_coupled = coupling.recorded is not True and self.recipe.real_data_ratio < 1
        values = self.squared_errors(coupling, t)
        if some_coupled and self.deviations is not None:
            self.lines.append(sums_of(values, t, coupling.recorded, self.deviations, sampling))
        if some_coupled:
            weighed = self._weighed(values, t)
            if isinstance(coupling.recorded, Tensor):
                weighed = torch.where(coupling.recorded[:, None, None], values, weighed)
            values = weighed
        if w is not None:
            values = values * w
        values = values.unflatten(0, (frames, count // frames)).mean(dim=1)
        recorded = coupling.recorded
        if isinstance(recorded, Tensor):
            # Not whenever all of them happen to be: LeRobot wants the same metrics of every process.
            recorded = self.recipe.real_data_ratio == 1 or recorded[:: count // frames]
        return Losses(values, recorded)

    def squared_errors(self, coupling: Coupling, times: Tensor) -> Tensor:
        """The student's, of its velocity on each line: unreduced, (N, chunk_size, max_action_dim), with gradient.

        Args:
            coupling: N lines, as many in a row for each frame.
            times: t of each line, (N,).
        """
        if not self.joint_forward:
            velocity = self.student_velocity(coupling.at(times), times)
            return mse_loss(velocity, coupling.velocity, reduction="none")
        # One call for each of a frame's lines, since a batch of them all would hold each image as often.
        per_frame = len(times) // len(self.actions)
        calls = zip(
            *(x.unflatten(0, (-1, per_frame)).unbind(dim=1) for x in (coupling.actions, coupling.noise, times)),
            strict=True,
        )
        return torch.stack([self.forward(*self.observation, *call) for call in calls], dim=1).flatten(0, 1)

    def student_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The student's v(x, t), with gradient unless under `torch.no_grad()`.

        Args:
            x: (B * K, chunk_size, max_action_dim), K in a row for each frame.
            t: a scalar or (B * K,).
        """
        return self._student.repeated(len(x) // len(self.actions))(x, t).to(x.dtype)

    def teacher_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's v(x, t), whose only gradient is the one to `x`, if that has one; arguments as above.

        Raises:
            ReflowError: no teacher is attached, or its normalised space is not that of the batches, in which `x` is.
        """
        return self._teacher.repeated(len(x) // len(self.actions))(x, t).to(x.dtype)

    def log(self, name: str, value: Tensor | float) -> None:
        """Report a number beside the loss, on the console and to W&B.

        From 0.6 on LeRobot averages it over the steps since its last line and over processes, so log the same names in
        every step and process. Before, it is the last step's, and the training command prints it.

        Raises:
            ReflowError: LeRobot reports something else under that name, or there are several numbers.
        """
        if name in REPORTED_BY_LEROBOT:
            raise ReflowError(f"LeRobot reports '{name}' itself; choose another name for the metric.")
        if name in REPORTED_BY_REFLOW:
            raise ReflowError(f"'{name}' is reported of every loss; choose another name for the metric.")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ReflowError(f"The metric '{name}' has {value.numel()} numbers; log one, such as its mean.")
        self.metrics[name] = value.detach() if isinstance(value, Tensor) else value

    def _coupled(self, first: int, per_frame: int) -> Coupling:
        """What the source couples for the frames from the `first` on."""
        frames = None if self.frames is None else self.frames[first:]
        noise = None if self.noise is None else self.noise[first:]
        encoded = {"prefix": self._prefix.after(first)} if self.one_prefix else {}
        view = (self.teachers_observation or self.observation).after(first)
        coupling = self.source(view, frames=frames, noise=noise, per_frame=per_frame, **encoded)
        if not isinstance(coupling, Coupling):
            raise ReflowError(f"The source of couplings gave a {type(coupling).__name__}; return a Coupling.")
        self._check(coupling, (len(self.actions) - first) * per_frame)
        return coupling

    def _recorded_lines(self, frames: int, per_frame: int) -> Coupling:
        """The first frames' recorded actions, and noise of their own: stored pairs have few noises for a frame."""
        actions = self.actions[:frames].repeat_interleave(per_frame, dim=0)
        return Coupling(self._noise_like(actions), actions, recorded=True)

    def _noise_like(self, actions: Tensor) -> Tensor:
        if self.noise is not None:
            return self.noise[: len(actions)]
        return self.model.sample_noise(actions.shape, actions.device)

    def _times(self, count: int, times: Tensor | float | str) -> Tensor:
        if self.time is not None:
            return self.time[:count]
        if isinstance(times, str):
            return TimeSampling(times).draw(count, self.actions.device, self.model.sample_time)
        t = torch.as_tensor(times, dtype=torch.float32, device=self.actions.device)
        if t.ndim and t.shape != (count,):
            raise ReflowError(
                f"times of shape {tuple(t.shape)} were given for {count} lines; give one, or one for each."
            )
        return t.expand(count)

    def _weights(self, count: int, weights: Tensor | float | None) -> Tensor | None:
        if weights is None:
            return None
        weights = torch.as_tensor(weights, device=self.actions.device)
        if weights.shape == (count,):
            return weights[:, None, None]
        if weights.ndim == 3:
            return weights.expand(count, -1, -1)
        if weights.ndim:
            raise ReflowError(
                f"weights of shape {tuple(weights.shape)} were given for {count} lines; give one, one for each, or "
                "three dimensions (lines, steps of the chunk, action dimensions), any of which may be 1."
            )
        return weights.expand(count, 1, 1)

    def _weighed(self, values: Tensor, t: Tensor) -> Tensor:
        """Squared errors of couplings as the recipe weighs them: the padded dimensions, and then each line."""
        own, width = self.action_dim, values.shape[-1]
        if own < width and self.recipe.padding_weight != 1:
            weights = torch.ones(width, device=values.device)
            weights[own:] = self.recipe.padding_weight
            values = values * weights
        line = self.recipe.weights(values, t)
        return values if line is None else values * line[:, None, None]

    def _check(self, coupling: Coupling, count: int) -> None:
        config = self.model.config
        expected = (count, config.chunk_size, config.max_action_dim)
        for name in ("noise", "actions"):
            found: Tensor = getattr(coupling, name)
            shape = tuple(found.shape)
            if shape != expected:
                raise ReflowError(f"The source of couplings gave {name} of shape {shape}; {expected} was asked for.")
            if found.dtype != torch.float32:
                raise ReflowError(f"The source of couplings gave {name} in {found.dtype}; torch.float32 was asked for.")

    @cached_property
    def _recorded_frames(self) -> int:
        """How many of the frames, the first ones, are the recipe's share of recorded data."""
        return self.recipe.recorded_frames(len(self.actions))

    @cached_property
    def _prefix(self) -> Prefix:
        with torch.enable_grad():  # a first call without gradient must not take it from a later one
            return encode(self.model, self.observation)

    @cached_property
    def _student(self) -> Velocity:
        return Velocity(self.model, self._prefix)

    @cached_property
    def _teacher(self) -> Velocity:
        if not isinstance(self.source, FrozenTeacher):
            raise ReflowError("No teacher is attached whose velocity could be asked for; attach(policy, teacher=...).")
        if self.source.space is not None:
            raise ReflowError(
                "The teacher's velocity is defined in its own normalised space, which is not that of these batches; "
                "fine-tune the teacher on this dataset first."
            )
        return self.source.velocity(
            self.teachers_observation or self.observation, self._prefix if self.one_prefix else None
        )


def _joined(recorded: Coupling, noise: Tensor, actions: Tensor) -> Coupling:
    """Recorded lines, and after them others."""
    joined = torch.cat([recorded.noise, noise])
    which = torch.arange(len(joined), device=joined.device) < len(recorded.noise)
    return Coupling(joined, torch.cat([recorded.actions, actions]), recorded=which)


def _once_for_each_time(
    coupling: Coupling, times: Tensor, weights: Tensor | float | None
) -> tuple[Coupling, Tensor, Tensor | float | None]:
    """Each line as often as it has times: N lines with times (N, M) become N * M with times (N * M,)."""
    if len(times) != len(coupling.noise):
        raise ReflowError(f"times of shape {tuple(times.shape)} were given for {len(coupling.noise)} lines.")
    if isinstance(weights, Tensor) and weights.shape == times.shape:
        weights = weights.flatten()
    each = times.shape[1]
    noise, actions = (x.repeat_interleave(each, dim=0) for x in (coupling.noise, coupling.actions))
    recorded = coupling.recorded
    if isinstance(recorded, Tensor):
        recorded = recorded.repeat_interleave(each)
    return Coupling(noise, actions, recorded), times.flatten(), weights
