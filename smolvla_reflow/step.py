"""A step: what a loss sees of one forward pass, and what it can ask for.

    step.coupling()         noise and the actions that the attached source carries it to
    step.recorded()         noise and the recorded actions
    step.losses(coupling)   the student's errors on the lines between the two, -> Losses

Times, couplings per frame and the share of recorded data are the step's to decide, so that every loss goes by the
user's flags.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
from torch import Tensor

from smolvla_reflow.coupling import Coupling, CouplingSource, FrozenTeacher
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.smolvla.velocity import Observation, Velocity, encode
from smolvla_reflow.smolvla.vision import SharedFeatures
from smolvla_reflow.times import STOCK, TimeSampling

# What LeRobot's training logs under names of its own, in one version or another.
REPORTED_BY_LEROBOT = frozenset(
    {
        *("loss", "grad_norm", "lr", "update_s", "dataloading_s", "gpu_mem_gb", "samples_per_s"),
        *("preprocessing_s", "step_s", "steps", "samples", "episodes", "epochs"),
    }
)


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
        features: of the images, which student and teacher share; None if each has its own.
        teachers_observation: what the teacher sees, if its cameras are others than the student's, else None.
        metrics: what `log` has collected.
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
    features: SharedFeatures | None = None
    teachers_observation: Observation | None = None
    metrics: dict[str, Tensor | float] = field(default_factory=dict)

    @property
    def frames(self) -> Tensor | None:
        """(B,) int64, the frames' indices in the dataset, if the batch holds them."""
        return self.batch.get("index")

    @property
    def couplings_per_frame(self) -> int:
        """K: the recipe's, or 1 where the caller of forward fixed noise or time, which are one for each frame."""
        return self.recipe.couplings_per_frame if self.noise is None and self.time is None else 1

    def coupling(self) -> Coupling:
        """Noise and the actions it is carried to by the attached source: B * K lines, K in a row for each frame.

        Raises:
            ReflowError: the source fails, or gives something else than such lines.
        """
        per_frame = self.couplings_per_frame
        coupling = self.source(self._teachers_view, frames=self.frames, noise=self.noise, per_frame=per_frame)
        if not isinstance(coupling, Coupling):
            raise ReflowError(f"The source of couplings gave a {type(coupling).__name__}; return a Coupling.")
        self._check(coupling, len(self.actions) * per_frame)
        return coupling

    def recorded(self) -> Coupling:
        """Noise and the recorded actions, drawn independently, as in standard training: B * K lines."""
        actions = self.actions.repeat_interleave(self.couplings_per_frame, dim=0)
        return Coupling(self._noise_like(actions), actions, recorded=True)

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
        SmolVLA's times, and unweighed.

        Args:
            coupling: N lines, as many in a row for each frame: B * K of `coupling()` and `recorded()`.
            times: t of each line, (N,), one t for all, or the name of a distribution (`smolvla_reflow.times`). By
                default the recipe's, and SmolVLA's own for recorded actions. A time that the caller of forward fixed
                comes first.
            weights: factors on the squared errors: one for all, (N,) for each line, or three dimensions that broadcast
                to (N, chunk_size, max_action_dim).

        Raises:
            ReflowError: something has another shape.
        """
        count = len(coupling.noise)
        self._check(coupling, count)
        if times is None:
            times = STOCK if coupling.recorded else self.recipe.time_sampling
        lines = _Lines(coupling, self._times(count, times), self._weights(count, weights))
        if self.recipe.real_data_ratio and not coupling.recorded:
            lines = self._with_recorded(lines)

        frames, per_frame = len(self.actions), count // len(self.actions)
        observation = self._repeated(per_frame)
        values = self.forward(*observation, lines.coupling.actions, lines.coupling.noise, lines.times)
        if lines.weights is not None:
            values = values * lines.weights
        values = values.unflatten(0, (frames, per_frame)).mean(dim=1)
        if lines.recorded is None or self.recipe.real_data_ratio == 1:
            return Losses(values, coupling.recorded or lines.recorded is not None)
        return Losses(values, lines.recorded[::per_frame])

    def student_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The student's v(x, t), with gradient unless under `torch.no_grad()`.

        Args:
            x: (B * K, chunk_size, max_action_dim), K in a row for each frame.
            t: a scalar or (B * K,).
        """
        return self._student_prefix.repeated(len(x) // len(self.actions))(x, t)

    def teacher_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's v(x, t), whose only gradient is the one to `x`, if that has one; arguments as above.

        Raises:
            ReflowError: no teacher is attached, or its normalised space is not that of the batches, in which `x` is.
        """
        return self._teacher_prefix.repeated(len(x) // len(self.actions))(x, t)

    def log(self, name: str, value: Tensor | float) -> None:
        """Report a number beside the loss, which LeRobot sends to W&B and, from 0.6 on, prints.

        From 0.6 on LeRobot averages it over the steps since its last line and over processes, so log the same names in
        every step and process.

        Raises:
            ReflowError: LeRobot reports something else under that name, or there are several numbers.
        """
        if name in REPORTED_BY_LEROBOT:
            raise ReflowError(f"LeRobot reports '{name}' itself; choose another name for the metric.")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ReflowError(f"The metric '{name}' has {value.numel()} numbers; log one, such as its mean.")
        self.metrics[name] = value.detach() if isinstance(value, Tensor) else value

    def _noise_like(self, actions: Tensor) -> Tensor:
        return self.model.sample_noise(actions.shape, actions.device) if self.noise is None else self.noise

    def _times(self, count: int, times: Tensor | float | str) -> Tensor:
        if self.time is not None:
            return self.time
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
        if weights.ndim not in (0, 3):
            raise ReflowError(
                f"weights of shape {tuple(weights.shape)} were given for {count} lines; give one, one for each, or "
                "three dimensions (lines, steps of the chunk, action dimensions), any of which may be 1."
            )
        return weights

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
        if not count or count % len(self.actions):
            raise ReflowError(f"{count} lines for {len(self.actions)} frames: each frame needs as many, in a row.")

    def _with_recorded(self, lines: "_Lines") -> "_Lines":
        """The recipe's share of the frames with recorded actions in all of their lines."""
        count = len(lines.times)
        per_frame = count // len(self.actions)
        chosen = self.recipe.recorded(len(self.actions), self.actions.device).repeat_interleave(per_frame)
        in_chunks = chosen[:, None, None]
        # Noise of its own: stored pairs have few noises for a frame, and recorded actions are to meet all.
        recorded = self.actions.repeat_interleave(per_frame, dim=0)
        noise = self._noise_like(recorded)
        weights = lines.weights
        return _Lines(
            coupling=Coupling(
                noise=torch.where(in_chunks, noise, lines.coupling.noise),
                actions=torch.where(in_chunks, recorded, lines.coupling.actions),
            ),
            recorded=chosen,
            times=torch.where(chosen, self._times(count, STOCK), lines.times),
            weights=None if weights is None else torch.where(in_chunks, torch.ones_like(weights), weights),
        )

    @property
    def _teachers_view(self) -> Observation:
        return self.observation if self.teachers_observation is None else self.teachers_observation

    def _repeated(self, per_frame: int) -> Observation:
        if per_frame == 1:
            return self.observation
        if self.features is None:
            return self.observation.repeated(per_frame)
        return self.features.repeated(self.observation, per_frame)

    @cached_property
    def _student_prefix(self) -> Velocity:
        with torch.enable_grad():  # a first call without gradient must not take it from a later one
            return encode(self.model, self.observation)

    @cached_property
    def _teacher_prefix(self) -> Velocity:
        if not isinstance(self.source, FrozenTeacher):
            raise ReflowError("No teacher is attached whose velocity could be asked for; attach(policy, teacher=...).")
        if self.source.space is not None:
            raise ReflowError(
                "The teacher's velocity is defined in its own normalised space, which is not that of these batches; "
                "fine-tune the teacher on this dataset first."
            )
        return self.source.velocity(self._teachers_view)


class _Lines(NamedTuple):
    """What the student is asked about: N lines, a time and a weight on each, and which of them are recorded ones."""

    coupling: Coupling
    times: Tensor  # (N,)
    weights: Tensor | None
    recorded: Tensor | None = None  # (N,) bool, where some are and others are not
