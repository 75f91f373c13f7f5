"""A step: the view that a loss has of one forward pass, and what the loss can ask for.

    step.coupling()         noise and the actions that the attached source carries it to
    step.recorded()         noise and the recorded actions
    step.losses(coupling)   the student's squared errors on the lines between the two, a tensor

The prefix is encoded once in a step. The teacher is solved on it, and the student's errors come from it too: one pass
through the action expert for each line, with gradient. If the prefix itself is trained, the student's own training
forward is asked instead, and the teacher encodes for itself.

The step chooses times, weights and couplings per frame by the recipe, so every loss follows the user's flags.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
from lerobot.utils.constants import ACTION
from torch import Tensor
from torch.nn.functional import mse_loss

from smolvla_reflow.compat import REPORTED_BY_LEROBOT
from smolvla_reflow.coupling import Coupling, CouplingSource
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.noise import scaled
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.smolvla.observation import Observation
from smolvla_reflow.smolvla.prefix import Prefix, encode
from smolvla_reflow.smolvla.velocity import Velocity
from smolvla_reflow.step_metrics import REPORTED, LineSums, sums_of
from smolvla_reflow.teacher import FrozenTeacher
from smolvla_reflow.times import STOCK, TimeSampling


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass in training, as a loss sees it. It is made where the batch comes in, and thrown away after it.

    `B` is the number of frames in the batch, `K` the number of couplings for each.

    Attributes:
        model: the student's VLAFlowMatching.
        forward: the student's own training forward, from (*observation, actions, noise, t) to squared errors of v.
        observation: the student's view of the B frames.
        actions: (B, chunk_size, max_action_dim) float32, the recorded ones, normalised and padded.
        source: of couplings.
        recipe: the user's choices of times, weights and couplings per frame.
        batch: as it came to the policy: "task", "index", "action_is_pad" and everything else in the dataset. Empty if
            the model was called without its policy.
        noise: (B, chunk_size, max_action_dim) if the caller of forward fixed it, else None.
        time: (B,) if the caller of forward fixed it, else None.
        joint_forward: True if the student's errors come from `forward`, which encodes the prefix with gradient.
        one_prefix: True if the student's encoded prefix is the teacher's too.
        teachers_observation: the teacher's view, if its cameras are not the student's, else None.
        deviations: (D,), standard deviations in one unit of each of the robot's action dimensions.
        metrics: numbers that `log` has collected.
        lines: sums of errors that `losses` has collected, for the metrics of every loss (`step_metrics.py`).
        coupled: frames and couplings that `coupling` has handed out, for `not_finite`.
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
    coupled: list[tuple[Tensor | None, Coupling]] = field(default_factory=list)

    @property
    def frames(self) -> Tensor | None:
        """(B,) int64, the frames' indices in the dataset, if the batch holds them."""
        return self.batch.get("index")

    @property
    def couplings_per_frame(self) -> int:
        """K: the recipe's, or 1 if the caller of forward fixed noise or time, one for each frame."""
        return self.recipe.couplings_per_frame if self.noise is None and self.time is None else 1

    @property
    def action_dim(self) -> int:
        """The robot's number of action dimensions: the batch's, before LeRobot pads it.

        All dimensions count if the model was called without its policy. (A config may still have its base's number.)
        """
        return self.batch.get(ACTION, self.actions).shape[-1]

    def rows(self, start: int, stop: int) -> "Step":
        """The step of the frames from `start` up to `stop`, which logs into the same metrics."""
        size, part = len(self.actions), slice(start, stop)

        def cut(value: Any) -> Any:
            rows = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
            return value[part] if rows and len(value) == size else value

        others = self.teachers_observation
        return replace(
            self,
            observation=self.observation.rows(part),
            actions=self.actions[part],
            batch={name: cut(value) for name, value in self.batch.items()},
            noise=cut(self.noise),
            time=cut(self.time),
            teachers_observation=None if others is None else others.rows(part),
        )

    def coupling(self) -> Coupling:
        """Noise and the actions that the source carries it to: B * K lines, K in a row for each frame.

        Raises:
            ReflowError: the source fails, or gives something else than such lines.
        """
        seen = self.observation if self.teachers_observation is None else self.teachers_observation
        encoded = {"prefix": self._prefix} if self.one_prefix else {}
        per_frame = self.couplings_per_frame
        noise = self._scaled_noise() if self.noise is None and isinstance(self.source, FrozenTeacher) else self.noise
        coupling = self.source(seen, frames=self.frames, noise=noise, per_frame=per_frame, **encoded)
        if not isinstance(coupling, Coupling):
            raise ReflowError(f"The source of couplings gave a {type(coupling).__name__}; return a Coupling.")
        self._check(coupling, len(self.actions) * per_frame)
        self.coupled.append((self.frames, coupling))
        return coupling

    def recorded(self) -> Coupling:
        """Noise and the recorded actions, drawn independently, as in standard training: B * K lines."""
        actions = self.actions.repeat_interleave(self.couplings_per_frame, dim=0)
        noise = self.model.sample_noise(actions.shape, actions.device) if self.noise is None else self.noise
        return Coupling(noise, actions, recorded=True)

    def times(self) -> Tensor:
        """t of B * K lines, (B * K,) float32, as the recipe draws it, or as the caller of forward fixed it."""
        return self._times(len(self.actions) * self.couplings_per_frame, self.recipe.time_sampling)

    def losses(self, coupling: Coupling, *, times: Tensor | float | str | None = None) -> Tensor:
        """Squared errors of the student's velocity on these lines, `|| (noise - actions) - v(x_t, t) ||^2`.

        Couplings are weighed by the recipe, recorded actions are not. (Their padded dimensions are, beside couplings.)

        Args:
            coupling: N lines, as many in a row for each frame: B * K of `coupling()` and `recorded()`.
            times: t of each line, (N,), one t for all, or the name of a distribution (`smolvla_reflow.times`). Default
                is the recipe's, and SmolVLA's own for recorded actions. A time that the caller of forward fixed comes
                first.

        Returns:
            (B, chunk_size, max_action_dim) float32, the mean over each frame's lines, with gradient.

        Raises:
            ReflowError: something has another shape.
        """
        frames, count = len(self.actions), len(coupling.noise)
        self._check(coupling, count)
        if not count or count % frames:
            raise ReflowError(f"{count} lines for {frames} frames: each frame needs as many, in a row.")
        if times is None:
            times = STOCK if coupling.recorded else self.recipe.time_sampling
        t = self._times(count, times)
        errors = self.squared_errors(coupling, t)
        if not coupling.recorded:
            if self.deviations is not None:
                sampling = TimeSampling(times) if isinstance(times, str) and self.time is None else None
                self.lines.append(sums_of(errors, t, self.deviations, sampling))
            errors = self.recipe.weighed(errors, t, self.action_dim)
        elif 0 < self.recipe.real_data_ratio < 1:
            errors = self.recipe.weighed_padding(errors, self.action_dim)
        return errors.unflatten(0, (frames, count // frames)).mean(dim=1)

    def squared_errors(self, coupling: Coupling, times: Tensor) -> Tensor:
        """Squared errors of the student's velocity on each line, (N, chunk_size, max_action_dim), with gradient.

        Args:
            coupling: N lines, as many in a row for each frame.
            times: t of each line, (N,).
        """
        if not self.joint_forward:
            velocity = self.student_velocity(coupling.at(times), times)
            return mse_loss(velocity, coupling.velocity, reduction="none")
        # One call for each of a frame's lines, since one batch of all lines would hold each image K times.
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
        """The teacher's v(x, t), with a gradient to `x` if `x` requires it, and to nothing else; arguments as above.

        Raises:
            ReflowError: no teacher is attached, or its normalised space is not the batches'.
        """
        return self._teacher.repeated(len(x) // len(self.actions))(x, t).to(x.dtype)

    def log(self, name: str, value: Tensor | float) -> None:
        """Report a number beside the loss, on the console and to W&B.

        LeRobot 0.6 averages the number over the steps since its last line and over processes, so log the same names in
        every step and process. Earlier versions report the last step's, which the training command prints.

        Raises:
            ReflowError: LeRobot reports something else under that name, or there are several numbers.
        """
        if name in REPORTED_BY_LEROBOT | REPORTED:
            raise ReflowError(f"'{name}' is reported already; choose another name for the metric.")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ReflowError(f"The metric '{name}' has {value.numel()} numbers; log one, such as its mean.")
        self.metrics[name] = value.detach() if isinstance(value, Tensor) else value

    def not_finite(self) -> str | None:
        """The first of the batch's and the couplings' tensors with NaN or infinity, and its frames; None if all are."""
        seen = self.observation
        given = {"state": seen.state, **{f"image {k}": image for k, image in enumerate(seen.images, start=1)}}
        asked = [(f"batch's {name}", self.frames, rows) for name, rows in given.items()]
        if not self.coupled:
            asked.append(("batch's recorded actions", self.frames, self.actions))
        asked += [("teacher's actions", frames, coupling.actions) for frames, coupling in self.coupled]
        for name, frames, rows in asked:
            bad = ~rows.isfinite().flatten(1).all(dim=1)
            if bad.any():
                per_frame = len(bad) // len(bad if frames is None else frames)
                where = bad.view(-1, per_frame).any(dim=1)
                which = where.nonzero().flatten() if frames is None else frames.to(where.device)[where]
                of = "rows" if frames is None else "frames"
                return f"the {name} of the {of} {', '.join(map(str, which.tolist()))}"
        return None

    def _scaled_noise(self) -> Tensor:
        """Noise for a teacher, B * K in the shape of the actions, scaled by the recipe."""
        count, device = len(self.actions) * self.couplings_per_frame, self.actions.device
        noise = self.model.sample_noise((count, *self.actions.shape[1:]), device)
        share = self.recipe.scaled_noise
        return scaled(noise, share, torch.rand(count, device=device)) if share else noise

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

    def _check(self, coupling: Coupling, count: int) -> None:
        config = self.model.config
        expected = (count, config.chunk_size, config.max_action_dim)
        for name in ("noise", "actions"):
            tensor: Tensor = getattr(coupling, name)
            if tuple(tensor.shape) != expected:
                problem = f"of shape {tuple(tensor.shape)}; {expected}"
            elif tensor.dtype != torch.float32:
                problem = f"in {tensor.dtype}; torch.float32"
            else:
                continue
            raise ReflowError(f"The source of couplings gave {name} {problem} was asked for.")

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
