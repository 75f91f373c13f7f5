"""Attach a teacher and a loss strategy to one SmolVLA policy, and detach them again.

    attach(policy, teacher="outputs/1rf/checkpoints/last/pretrained_model")
    loss, metrics = policy.forward(batch)       # the reflow loss in train mode, the stock loss in eval mode
    detach(policy)

No class is subclassed or changed. `attach` binds the functions of the two mixins below onto this one instance,
in the slot LeRobot itself uses when it compiles a policy (`self.forward = ...`), and puts the teacher where
`nn.Module` does not look for submodules. `detach` restores what `vars()` of each module held.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from smolvla_reflow.bindings import Binding, bind
from smolvla_reflow.checkpoint import Checkpoint, open_checkpoint
from smolvla_reflow.compat import check_signatures
from smolvla_reflow.coupling import Coupling, couple
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.flow import Observation
from smolvla_reflow.normalization import ChangeOfSpace, Statistics, change_of_space
from smolvla_reflow.pairs import Pairs
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.solver import Solver
from smolvla_reflow.strategies import get_loss_strategy
from smolvla_reflow.teacher import base_policy, frozen_teacher
from smolvla_reflow.timesteps import TimeSampling
from smolvla_reflow.vision import SharedFeatures, share_features

_STATE = "_reflow"  # the name under which policy and model keep their Attachment


class ModelMixin:
    """Bound onto `policy.model` (a VLAFlowMatching); never inherited. Signatures are the stock forward's."""

    training: bool
    training_mode: str
    teacher: SmolVLAPolicy | None
    config: SmolVLAConfig
    forward_standard: Callable[..., Tensor]
    sample_noise: Callable[..., Tensor]
    sample_time: Callable[..., Tensor]

    def forward(self, images, img_masks, lang_tokens, lang_masks, state, actions, noise=None, time=None) -> Tensor:
        """Unreduced losses `(B, chunk_size, max_action_dim)` of `training_mode`; in eval mode the stock ones."""
        observation = Observation(images, img_masks, lang_tokens, lang_masks, state)
        if not self.training:
            return self.forward_standard(*observation, actions, noise, time)
        strategy = get_loss_strategy(self.training_mode)
        attachment = vars(self)[_STATE]
        several = strategy.whole_chunk and noise is None and time is None
        per_frame = attachment.recipe.couplings_per_frame if several else 1
        with (
            attachment.each_image_once(observation) as observation,
            attachment.repeated(observation, per_frame) as each,
        ):
            losses = strategy(self, each, actions.repeat_interleave(per_frame, dim=0), noise, time)
        losses = losses.unflatten(0, (len(actions), per_frame)).mean(dim=1)
        attachment.whole_chunk_losses = losses if strategy.whole_chunk else None
        return losses

    def forward_reflow(
        self, images, img_masks, lang_tokens, lang_masks, state, actions, noise=None, time=None
    ) -> Tensor:
        """Unreduced reflow losses `(B, chunk_size, max_action_dim)`, whatever `training_mode` says."""
        observation = Observation(images, img_masks, lang_tokens, lang_masks, state)
        return get_loss_strategy("reflow")(self, observation, actions, noise, time)

    def generate_reflow_target(self, images, img_masks, lang_tokens, lang_masks, state, noise=None) -> Coupling:
        """Couple noise to the teacher's actions, both `(B, chunk_size, max_action_dim)`, without gradient.

        `noise` is drawn as the stock sampler draws it unless it is given. With pairs from disk, one of those of
        each of the batch's frames is drawn instead.
        """
        attachment = vars(self)[_STATE]
        if attachment.pairs is not None:
            return attachment.draw_pairs(noise, state.device)
        if noise is None:
            shape = (state.shape[0], self.config.chunk_size, self.config.max_action_dim)
            noise = self.sample_noise(shape, state.device)
        observation = attachment.frame_by_frame(Observation(images, img_masks, lang_tokens, lang_masks, state))
        return couple(self.teacher, observation, noise, attachment.solver, attachment.space)

    def forward_coupling(self, observation, actions, coupling, noise=None, time=None, time_sampling=None) -> Tensor:
        """Unreduced losses `(B, chunk_size, max_action_dim)` of a coupling, as the recipe has it.

        The recipe's share of recorded `actions` is put in the coupling's place, with noise and time as in standard
        training. `noise` and `time` are those that the caller fixed; `time_sampling` stands in for the recipe's.
        """
        attachment = vars(self)[_STATE]
        recipe, device = attachment.recipe, actions.device
        time_sampling = time_sampling or TimeSampling(recipe.time_sampling)
        times = time_sampling.draw(len(actions), device, self.sample_time) if time is None else time
        if not recipe.real_data_ratio:
            return self.forward_standard(*observation, coupling.actions, coupling.noise, times)

        attachment.recorded = recipe.recorded(len(actions) // attachment.per_frame, device)
        recorded = attachment.recorded.repeat_interleave(attachment.per_frame)
        chosen = recorded[:, None, None]
        # Stored pairs have few noises for a frame; recorded actions are to meet all.
        noise = self.sample_noise(actions.shape, device) if noise is None else noise
        times = torch.where(recorded, self.sample_time(len(actions), device) if time is None else time, times)
        return self.forward_standard(
            *observation,
            torch.where(chosen, actions, coupling.actions),
            torch.where(chosen, noise, coupling.noise),
            times,
        )


class PolicyMixin:
    """Bound onto the SmolVLAPolicy; never inherited."""

    training: bool

    def forward(self, batch, noise=None, time=None, reduction="mean") -> tuple[Tensor, dict[str, Any]]:
        """The stock forward, with the reduction a whole-chunk strategy needs (`LossStrategy.whole_chunk`).

        Returns:
            The loss, a scalar or with `reduction="none"` one per sample `(B,)`, and the stock metrics.
        """
        attachment = vars(self)[_STATE]
        attachment.whole_chunk_losses = attachment.recorded = None
        attachment.frames = batch.get("index")
        mixed = self.training and attachment.recipe.real_data_ratio and attachment.whole_chunk_strategy
        try:
            loss, metrics = attachment.policy_forward(batch, noise, time, "none" if mixed else reduction)
        finally:
            attachment.frames = None
        losses, attachment.whole_chunk_losses = attachment.whole_chunk_losses, None
        if losses is not None:
            if attachment.recorded is not None:
                losses = torch.where(attachment.recorded, loss, losses.mean(dim=(1, 2)))[:, None, None]
            loss = losses.mean(dim=(1, 2)) if reduction == "none" else losses.mean()
            metrics["loss"] = loss.mean().item()
        return loss, metrics


@dataclass(frozen=True)
class Repetition:
    """Observations of a batch, `once` each and then with `each` of them `times` in a row."""

    once: Observation
    each: Observation
    times: int


@dataclass(eq=False)
class Attachment:
    """What `attach` returns; as a context manager it detaches on leaving.

    Attributes:
        policy: the attached SmolVLAPolicy (inside a PEFT wrapper, the base policy).
        teacher: its frozen teacher; None if pairs stand in for it.
        pairs: couplings made before, read from disk.
        solver: of the teacher's ODE.
        recipe: where on the couplings' lines the student learns, how many for a frame, with how much recorded data.
        space: the way into the teacher's normalised space and back; None if it is the batches' own.
        features: of the images, shared by the two; None if the vision encoder is trained or differs.
        policy_forward: the policy's forward as it was before.
        bindings: what is to be undone.
        frames: the dataset indices of the batch of the present forward pass, (B,) int64, or None if it has none.
        recorded: within one forward pass, which frames train on recorded actions, (B,) bool; None if none do.
        whole_chunk_losses: within one forward pass, the losses on their way from model to policy.
        repetition: within one forward pass, how the strategy's batch came from the frames; None if it is the frames.
    """

    policy: SmolVLAPolicy
    teacher: SmolVLAPolicy | None
    pairs: Pairs | None
    solver: Solver
    recipe: Recipe
    space: ChangeOfSpace | None
    features: SharedFeatures | None
    policy_forward: Callable[..., tuple[Tensor, dict[str, Any]]]
    bindings: tuple[Binding, ...] = ()
    frames: Tensor | None = None
    recorded: Tensor | None = None
    whole_chunk_losses: Tensor | None = None
    repetition: Repetition | None = None

    @property
    def per_frame(self) -> int:
        return 1 if self.repetition is None else self.repetition.times

    @property
    def whole_chunk_strategy(self) -> bool:
        return get_loss_strategy(self.policy.model.training_mode).whole_chunk

    @contextmanager
    def each_image_once(self, observation: Observation) -> Iterator[Observation]:
        """Within this block the vision encoder sees each image of the yielded observation once."""
        if self.features is None:
            yield observation
            return
        with self.features.once():
            yield observation._replace(images=[image.to(self.features.dtype) for image in observation.images])

    @contextmanager
    def repeated(self, observation: Observation, times: int) -> Iterator[Observation]:
        """Within this block each observation stands `times` in a row, and is still looked at once."""
        each = observation if times == 1 else observation.repeated(times)
        if times > 1 and self.features is not None:
            for images, copies in zip(observation.images, each.images, strict=True):
                self.features.is_repeated(images, times, copies)
        self.repetition = Repetition(observation, each, times)
        try:
            yield each
        finally:
            self.repetition = None

    def frame_by_frame(self, observation: Observation) -> Observation:
        """The observation without its repetitions, unless a strategy has made another one of it."""
        if self.repetition is None or any(a is not b for a, b in zip(observation, self.repetition.each, strict=True)):
            return observation
        return self.repetition.once

    def draw_pairs(self, noise: Tensor | None, device: torch.device) -> Coupling:
        """Stored couplings, one for each frame of the batch, or as many as it stands there in a row.

        Raises:
            ReflowError: the batch does not say which frames it holds, or the caller fixed the noise.
        """
        assert self.pairs is not None
        if noise is not None:
            raise ReflowError("Stored pairs have noise of their own; attach a teacher to couple a given noise.")
        if self.frames is None:
            raise ReflowError(
                "The batch has no 'index', by which its frames' pairs are found; take it from a LeRobotDataset "
                "and call policy.forward(batch)."
            )
        return self.pairs.draw(self.frames.tolist(), device, self.per_frame)

    def detach(self) -> None:
        detach(self.policy)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: object) -> None:
        if is_attached(self.policy):
            self.detach()


def attach(
    policy: nn.Module,
    teacher: str | Path | Checkpoint | SmolVLAPolicy | None = None,
    *,
    strategy: str = "reflow",
    solver: str = Solver.method,
    num_steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    recipe: Recipe | None = None,
    dataset_stats: Statistics | None = None,
    pairs: str | Path | Pairs | None = None,
) -> Attachment:
    """Let `policy.forward` compute the loss of a strategy, with a frozen teacher or its stored couplings at hand.

    After this `policy.model` has `training_mode` (assignable), `teacher`, `forward_standard` (the forward it
    had, compiled or not), `forward_reflow` and `generate_reflow_target`. The teacher is no submodule: it is
    in no `state_dict()`, `parameters()` or checkpoint, and shares the memory of every parameter that is frozen
    in the policy and equal in both, so load the policy's weights before. Where the vision encoder is such,
    each image goes through it once per training step for the two together.

    Args:
        policy: a SmolVLAPolicy, or one wrapped by PEFT.
        teacher: a checkpoint folder or hub id, a SmolVLAPolicy (its present weights are taken), or None for
            the policy as it is now.
        strategy: a name from `available_loss_strategies()`.
        solver, num_steps, rtol, atol: how the teacher's ODE is solved, see `Solver`. The default is the midpoint rule
            with the teacher's own `config.num_steps`; an error of the couplings is one that training cannot undo.
        recipe: distribution of t, couplings for a frame, share of recorded data; the default recipe if None.
        dataset_stats: what the batches are normalised by (LeRobot's `dataset.meta.stats`), if that may differ from
            the statistics saved in the teacher's checkpoint; state and actions are then mapped.
        pairs: a folder of `smolvla-reflow-pairs`, instead of a teacher and a solver. That it fits the dataset the
            batches come from is for the caller to know; the training command checks it.

    Raises:
        ReflowError: the policy is no SmolVLA, not one of a supported LeRobot, or attached already; the strategy or
            solver is unknown; the teacher cannot be loaded or does not fit; or the statistics cannot be mapped.
    """
    base = base_policy(policy)
    if is_attached(base):
        raise ReflowError("This policy already has a teacher attached; call detach(policy) first.")
    check_signatures(base)
    get_loss_strategy(strategy)
    ode, recipe = Solver(solver, num_steps, rtol, atol), recipe or Recipe()
    if pairs is not None:
        if teacher is not None:
            raise ReflowError("Attach either a teacher or the pairs it made, not both.")
        stored = pairs if isinstance(pairs, Pairs) else Pairs(pairs)
        _check_shape(stored, base)
        features = share_features(base) if recipe.couplings_per_frame > 1 else None
        return _bind(Attachment(base, None, stored, ode, recipe, None, features, base.forward), strategy)
    source = open_checkpoint(teacher) if isinstance(teacher, str | Path) else teacher
    space = None
    if dataset_stats is not None:
        if not isinstance(source, Checkpoint):
            raise ReflowError("dataset_stats needs a teacher given as a checkpoint, which saves its own statistics.")
        space = change_of_space(source, dataset_stats)
    frozen = frozen_teacher(policy, source, num_steps)

    attachment = Attachment(base, frozen, None, ode, recipe, space, share_features(base, frozen), base.forward)
    _bind(attachment, strategy)
    _report_sharing(base, frozen, attachment.features)
    return attachment


def _check_shape(pairs: Pairs, policy: SmolVLAPolicy) -> None:
    for name in ("chunk_size", "max_action_dim"):
        ours, theirs = getattr(policy.config, name), getattr(pairs.manifest.provenance, name)
        if ours != theirs:
            raise ReflowError(f"The pairs do not fit the policy: {name} is {theirs} in them and {ours} in it.")


def _bind(attachment: Attachment, strategy: str) -> Attachment:
    base, model = attachment.policy, attachment.policy.model
    attachment.bindings = (
        *(attachment.features.bindings if attachment.features else ()),
        bind(base, forward=MethodType(PolicyMixin.forward, base), **{_STATE: attachment}),
        bind(
            model,
            training_mode=strategy,
            teacher=attachment.teacher,
            forward_standard=model.forward,
            forward=MethodType(ModelMixin.forward, model),
            forward_reflow=MethodType(ModelMixin.forward_reflow, model),
            generate_reflow_target=MethodType(ModelMixin.generate_reflow_target, model),
            forward_coupling=MethodType(ModelMixin.forward_coupling, model),
            **{_STATE: attachment},
        ),
    )
    _guard(model)
    return attachment


def detach(policy: nn.Module) -> None:
    """Undo `attach`: `vars()` of every module it touched is what it was.

    Raises:
        ReflowError: nothing is attached, or something else has replaced `policy.forward` since.
    """
    base = base_policy(policy)
    if not is_attached(base):
        raise ReflowError("This policy has no teacher attached; there is nothing to detach.")
    bound = {(base, "forward"): PolicyMixin.forward, (base.model, "forward"): ModelMixin.forward}
    for (module, name), function in bound.items():
        if getattr(vars(module).get(name), "__func__", None) is not function:
            raise ReflowError(
                f"{type(module).__name__}.forward was wrapped after attach; unwrap it first "
                "(for accelerate: accelerator.unwrap_model(policy, keep_fp32_wrapper=False))."
            )
    _unguard(base.model)
    for binding in vars(base)[_STATE].bindings:
        binding.undo()


def _report_sharing(student: SmolVLAPolicy, teacher: SmolVLAPolicy, features: SharedFeatures | None) -> None:
    ours = {id(parameter) for parameter in student.parameters()}
    theirs = list(teacher.parameters())
    logging.getLogger(__name__).info(
        "Teacher shares %d of its %d parameters with the student%s.",
        sum(parameter.numel() for parameter in theirs if id(parameter) in ours),
        sum(parameter.numel() for parameter in theirs),
        "" if features is None else ", and what the vision encoder makes of each image",
    )


def is_attached(policy: nn.Module) -> bool:
    """Whether `policy` has a teacher attached. Raises ReflowError if it is no SmolVLA policy."""
    return _STATE in vars(base_policy(policy))


# `policy.model.teacher = other_policy` would register the other policy as a submodule: checkpoints would double
# in size, the optimizer would train it. PyTorch's registration hook is where that can be stopped.
_guarded: WeakSet[nn.Module] = WeakSet()
_guard_handle: RemovableHandle | None = None


def _guard(model: nn.Module) -> None:
    global _guard_handle
    if _guard_handle is None:
        _guard_handle = register_module_module_registration_hook(_refuse_teacher_submodule)
    _guarded.add(model)


def _unguard(model: nn.Module) -> None:
    global _guard_handle
    _guarded.discard(model)
    if not _guarded and _guard_handle is not None:
        _guard_handle.remove()
        _guard_handle = None


def _refuse_teacher_submodule(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    attachment = vars(module).get(_STATE)
    if name == "teacher" and attachment is not None and submodule is not None:
        # nn.Module.__setattr__ has already removed the plain attribute of this name.
        vars(module)["teacher"] = attachment.teacher
        raise ReflowError(
            "Assigning policy.model.teacher would make the teacher a submodule of the student, saved and "
            "trained with it; call detach(policy) and attach(policy, teacher=...) instead."
        )
