"""Attach a teacher and a loss strategy to one SmolVLA policy, and detach them again.

    attach(policy, teacher="outputs/1rf/checkpoints/last/pretrained_model")
    loss, metrics = policy.forward(batch)       # the reflow loss in train mode, the stock loss in eval mode
    detach(policy)

In train mode a batch takes this way:  policy.forward -> Step -> loss strategy -> Losses -> loss.
What the step tells of the student beside the loss is in the metrics (`monitor.py`).

Teacher and student share the prefix (images, language, state) wherever they can: `attach` freezes the student's
`state_proj`, the one part of it that a fine-tuned SmolVLA trains, and `detach` thaws it.

No class is subclassed or changed. `attach` binds the functions of the two mixins below onto this one instance,
in the slot LeRobot itself uses when it compiles a policy (`self.forward = ...`), and puts the teacher where
`nn.Module` does not look for submodules. `detach` restores what `vars()` of each module held.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from torch import Tensor, nn

from smolvla_reflow.checkpoint.read import Checkpoint, open_checkpoint
from smolvla_reflow.compat import check_signatures
from smolvla_reflow.coupling import Coupling, CouplingSource
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.losses import LossStrategy, get_loss_strategy
from smolvla_reflow.pairs.store import Pairs
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.reduction import PolicyForward, reduce
from smolvla_reflow.smolvla.binding import Binding, bind
from smolvla_reflow.smolvla.normalization import action_deviations
from smolvla_reflow.smolvla.observation import Observation, observe, recorded_actions, with_one_state
from smolvla_reflow.smolvla.prefix import is_trained, trained_part
from smolvla_reflow.smolvla.sharing import Sharing, share
from smolvla_reflow.smolvla.statistics import Statistics
from smolvla_reflow.smolvla.velocity import compile_velocity
from smolvla_reflow.solver import JITTERED, Solver
from smolvla_reflow.step import Losses, Step
from smolvla_reflow.step_metrics import Monitor
from smolvla_reflow.teacher import FrozenTeacher, base_policy, frozen_source

_STATE = "_reflow"  # the name under which policy and model keep their Attachment


@dataclass(frozen=True, eq=False)
class Attachment:
    """What `attach` returns; as a context manager it detaches on leaving.

    Attributes:
        policy: the attached SmolVLAPolicy (inside a PEFT wrapper, the base policy).
        source: of couplings, a frozen teacher or stored pairs.
        recipe: where on the couplings' lines the student learns, how many for a frame, with how much recorded data.
        sharing: of the prefix, or of the images' features, by student and teacher.
        policy_forward: the policy's forward as it was before.
        bindings: what is to be undone.
        monitor: what the metrics of a step are, beside the loss.
        reports: asked before each forward pass in training for numbers that are to stand in its metrics, too: always
            the same names.
    """

    policy: SmolVLAPolicy
    source: CouplingSource
    recipe: Recipe
    sharing: Sharing
    policy_forward: PolicyForward
    bindings: tuple[Binding, ...]
    monitor: Monitor
    reports: list[Callable[[], Mapping[str, float]]] = field(default_factory=list)

    @property
    def teacher(self) -> SmolVLAPolicy | None:
        """The frozen teacher; None if pairs stand in for it."""
        return self.source.policy if isinstance(self.source, FrozenTeacher) else None

    @property
    def own_prefix(self) -> str | None:
        """Why the student encodes the prefix for itself, with gradient, in words; None if it does not."""
        return self.sharing.own_prefix

    def step(
        self,
        observation: Observation,
        actions: Tensor,
        noise: Tensor | None,
        time: Tensor | None,
        batch: Mapping[str, Any] | None = None,
        *,
        strategy: str,
    ) -> Step:
        """What the loss of this name sees of one forward pass."""
        seen = self.sharing.in_encoder_dtype(observation)
        by_teacher = self.teachers(seen, batch or {})
        joint = bool(self.own_prefix or get_loss_strategy(strategy).joint_forward or trained_part(self.policy))
        return Step(
            model=self.policy.model,
            forward=self.policy.model.forward_standard,
            observation=seen,
            actions=actions,
            source=self.source.in_batch(batch or {}) if isinstance(self.source, Pairs) else self.source,
            recipe=self.recipe,
            batch=batch or {},
            noise=noise,
            time=time,
            joint_forward=joint,
            one_prefix=self.teacher is not None and by_teacher is None and not joint,
            teachers_observation=by_teacher,
            deviations=self.monitor.deviations_on(actions.device),
        )

    def teachers(self, seen: Observation, batch: Mapping[str, Any]) -> Observation | None:
        """What the teacher sees of a batch of which the student sees this, None if it is the same."""
        if not isinstance(self.source, FrozenTeacher):
            return None
        by_teacher = self.source.observe(batch, self.policy, seen)
        return None if by_teacher is seen else self.sharing.in_encoder_dtype(by_teacher)

    def losses(self, step: Step, strategy: str) -> Losses:
        """The losses of one step, in which each image is encoded once."""
        with self.sharing.once():
            return get_loss_strategy(strategy)(step)

    def detach(self) -> None:
        detach(self.policy)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: object) -> None:
        if is_attached(self.policy):
            self.detach()


class PolicyMixin:
    """Bound onto the SmolVLAPolicy; never inherited."""

    training: bool
    model: VLAFlowMatching

    def forward(
        self, batch: dict[str, Any], noise: Tensor | None = None, time: Tensor | None = None, reduction: str = "mean"
    ) -> tuple[Tensor, dict[str, Any]]:
        """In train mode the loss of `model.training_mode`, otherwise the stock one.

        Returns:
            The loss, a scalar or with `reduction="none"` one per frame `(B,)`, and the metrics that LeRobot logs:
            of couplings also `one_step_error` and the loss by tenths of t, `loss_t0` to `loss_t9` (`monitor.py`).
        """
        attachment = attachment_of(self)
        if not self.training:
            return attachment.policy_forward(batch, noise, time, reduction)
        reported = {name: value for report in attachment.reports for name, value in report().items()}
        batch = with_one_state(attachment.policy, batch)
        observation, actions = observe(attachment.policy, batch), recorded_actions(attachment.policy, batch)
        step = attachment.step(observation, actions, noise, time, batch, strategy=self.model.training_mode)
        losses = attachment.losses(step, self.model.training_mode)
        loss, metrics = reduce(losses, step, attachment.policy, attachment.policy_forward, reduction)
        return loss, attachment.monitor.read(metrics, {**step.metrics, **reported}, step.lines)


class ModelMixin:
    """Bound onto `policy.model` (a VLAFlowMatching); never inherited. Signatures are the stock forward's."""

    training: bool
    training_mode: str
    teacher: SmolVLAPolicy | None
    config: SmolVLAConfig
    forward_standard: Callable[..., Tensor]

    def forward(self, images, img_masks, lang_tokens, lang_masks, state, actions, noise=None, time=None) -> Tensor:
        """Unreduced losses `(B, chunk_size, max_action_dim)` of `training_mode`; in eval mode the stock ones."""
        attachment = attachment_of(self)
        observation = Observation(images, img_masks, lang_tokens, lang_masks, state)
        if not self.training:
            return self.forward_standard(*observation, actions, noise, time)
        step = attachment.step(observation, actions, noise, time, strategy=self.training_mode)
        return attachment.losses(step, self.training_mode).values

    def forward_reflow(
        self, images, img_masks, lang_tokens, lang_masks, state, actions, noise=None, time=None
    ) -> Tensor:
        """Unreduced reflow losses `(B, chunk_size, max_action_dim)`, whatever `training_mode` says."""
        attachment = attachment_of(self)
        observation = Observation(images, img_masks, lang_tokens, lang_masks, state)
        return attachment.losses(attachment.step(observation, actions, noise, time, strategy="reflow"), "reflow").values

    def generate_reflow_target(self, images, img_masks, lang_tokens, lang_masks, state, noise=None) -> Coupling:
        """Couple noise to the teacher's actions, both `(B, chunk_size, max_action_dim)`, without gradient.

        `noise` is drawn as the stock sampler draws it unless it is given.
        """
        attachment = attachment_of(self)
        observation = Observation(images, img_masks, lang_tokens, lang_masks, state)
        attachment.teachers(observation, batch={})  # which raises where they cannot serve the teacher
        return attachment.source(observation, frames=None, noise=noise, per_frame=1)


def attach(
    policy: nn.Module,
    teacher: str | Path | Checkpoint | SmolVLAPolicy | None = None,
    *,
    revision: str | None = None,
    pairs: str | Path | CouplingSource | None = None,
    strategy: str = "reflow",
    recipe: Recipe | None = None,
    solver: Solver | str | None = None,
    dataset_stats: Statistics | None = None,
    train_state_proj: bool = False,
) -> Attachment:
    """Make `policy.forward` compute a strategy's loss, on couplings of a frozen teacher or stored pairs.

    After this `policy.model` has `training_mode` (assignable), `teacher`, `forward_standard` (the forward it
    had, compiled or not), `forward_reflow` and `generate_reflow_target`. The teacher is no submodule: it is
    in no `state_dict()`, `parameters()` or checkpoint, and shares the memory of every parameter that is frozen
    in the policy and equal in both, so load the policy's weights before; and compile or wrap `model.forward` before,
    or it will not be asked.

    Where all that encodes the prefix is frozen, but for `state_proj`, and equal in both, that is frozen too, until
    `detach`, and the prefix is encoded once per training step for both. Otherwise each encodes it, and where the vision
    encoder is shared each image goes through it once. What is the case and why is logged, and in `own_prefix`.

    Args:
        policy: a SmolVLAPolicy, or one wrapped by PEFT.
        teacher: a checkpoint folder or hub id, a SmolVLAPolicy (its present weights are taken), or None for
            the policy as it is now.
        revision: of a hub id, a branch, tag or commit; its main branch if None.
        pairs: couplings in the teacher's place: a folder of `smolvla-reflow-pairs`, or any `CouplingSource`. That they
            fit the dataset the batches come from is for the caller to know; the training command checks it.
        strategy: a name from `available_loss_strategies()`, or a loss in a file, `path/to/file.py:name`.
        recipe: distribution of t, couplings for a frame, share of recorded data; the default recipe if None.
        solver: of the teacher's ODE, or a method's name; by default `jittered`, with as many velocity evaluations as
            the teacher's stock sampler takes, but at least 10. An error of the couplings is one that training cannot
            undo.
        dataset_stats: what the batches are normalised by (LeRobot's `dataset.meta.stats`), if that may differ from
            the statistics saved in the teacher's checkpoint; state and actions are then mapped. Pairs know what they
            are normalised by, and are refused if it is not this. They also make `one_step_error` one in standard
            deviations where the batches are not normalised by those; without them it is in normalised units.
        train_state_proj: train `state_proj` with the rest, if the policy's config does, for which the student has to
            encode the prefix itself, with gradient.

    Raises:
        ReflowError: the policy is no SmolVLA, not one of a supported LeRobot, or attached already; the strategy or
            solver is unknown; an argument has no effect beside the others; the teacher or the pairs cannot be loaded
            or do not fit; or the statistics cannot be mapped.
    """
    base = base_policy(policy)
    if is_attached(base):
        raise ReflowError("This policy already has a teacher attached; call detach(policy) first.")
    check_signatures(base)
    recipe = Recipe() if recipe is None else recipe
    if revision is not None:
        if not isinstance(teacher, str):
            raise ReflowError("revision has no effect on a teacher that is not named by its hub id; leave it out.")
        teacher = open_checkpoint(teacher, revision)
    loss = get_loss_strategy(strategy)
    _check_effect(loss, recipe, teacher=teacher, pairs=pairs, solver=solver)
    if train_state_proj and not is_trained(base.model.state_proj):
        raise ReflowError("train_state_proj has no effect on a policy whose own state_proj is frozen; leave it out.")
    source: CouplingSource
    if pairs is not None:
        source = _stored(pairs, base, dataset_stats)
    else:
        ode = solver if isinstance(solver, Solver) else Solver(solver or JITTERED)
        source = frozen_source(teacher, policy, ode, dataset_stats)
    sharing = share(base, source, loss, per_frame=recipe.couplings_per_frame, train_state_proj=train_state_proj)
    monitor = Monitor(action_deviations(base, dataset_stats or {}))
    attachment = _bind(base, source, strategy, recipe, sharing, monitor)
    logging.getLogger(__name__).info(sharing.described(base, attachment.teacher))
    return attachment


def detach(policy: nn.Module) -> None:
    """Undo `attach`, so that `vars()` of every module it touched is what it was.

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
    attachment: Attachment = vars(base)[_STATE]
    _take_back_teacher(base.model, attachment)
    for binding in attachment.bindings:
        binding.undo()
    attachment.sharing.undo()
    for module in (base, base.model):
        del vars(module)[_STATE]


def is_attached(policy: nn.Module) -> bool:
    """Whether `policy` has a teacher attached. Raises ReflowError if it is no SmolVLA policy."""
    return _STATE in vars(base_policy(policy))


def attachment_of(module: object) -> Attachment:
    """The attachment of an attached policy, or of its model.

    Raises:
        ReflowError: `model.teacher` was replaced, which is undone.
    """
    attachment: Attachment = vars(module)[_STATE]
    if vars(attachment.policy.model).get("teacher", attachment) is not attachment.teacher:
        _take_back_teacher(attachment.policy.model, attachment)
        raise ReflowError(
            "policy.model.teacher was replaced, where a policy would be a submodule of the student, saved and trained "
            "with it. That is undone; call detach(policy) and attach(policy, teacher=...) instead."
        )
    return attachment


def _take_back_teacher(model: nn.Module, attachment: Attachment) -> None:
    """Undo an assignment of `model.teacher`."""
    if "teacher" in dict(model.named_children()):
        del model.teacher
    vars(model)["teacher"] = attachment.teacher


def _check_effect(
    loss: LossStrategy,
    recipe: Recipe,
    *,
    teacher: str | Path | Checkpoint | SmolVLAPolicy | None,
    pairs: str | Path | CouplingSource | None,
    solver: Solver | str | None,
) -> None:
    """Raise ReflowError if an argument of `attach` has no effect beside the others."""
    if not isinstance(recipe, Recipe):
        raise ReflowError(f"recipe is a {type(recipe).__name__}; give a Recipe.")
    loss.check_recipe(recipe)
    if not loss.couples and (solver is not None or pairs is not None):
        name = "pairs" if solver is None else "solver"
        raise ReflowError(f"{name} has no effect with strategy={loss.name}, which asks for no couplings; leave it out.")
    if pairs is not None and teacher is not None:
        raise ReflowError("Attach either a teacher or the pairs it made, not both.")
    if pairs is not None and solver is not None:
        raise ReflowError("The teacher's ODE was solved when the pairs were made, so that solver has no effect.")


def _stored(
    pairs: str | Path | CouplingSource, policy: SmolVLAPolicy, dataset_stats: Statistics | None
) -> CouplingSource:
    """Open the couplings that stand in for a teacher, and check that they fit."""
    source = Pairs(pairs) if isinstance(pairs, str | Path) else pairs
    if not callable(source):
        raise ReflowError(f"pairs is a {type(pairs).__name__}; give a folder of pairs, or a function that couples.")
    if isinstance(source, Pairs):
        source.check_fits(policy.config, dataset_stats)
    elif dataset_stats is not None:
        raise ReflowError("dataset_stats has no effect on couplings of another source than a teacher or stored pairs.")
    return source


def _bind(
    base: SmolVLAPolicy, source: CouplingSource, strategy: str, recipe: Recipe, sharing: Sharing, monitor: Monitor
) -> Attachment:
    model = base.model
    policy_forward, teacher = base.forward, source.policy if isinstance(source, FrozenTeacher) else None
    models = (model,) if teacher is None else (model, teacher.model)
    bindings = (
        *(compile_velocity(*models) if base.config.compile_model else ()),
        bind(base, forward=MethodType(PolicyMixin.forward, base)),
        bind(
            model,
            training_mode=strategy,
            teacher=teacher,
            forward_standard=model.forward,
            forward=MethodType(ModelMixin.forward, model),
            forward_reflow=MethodType(ModelMixin.forward_reflow, model),
            generate_reflow_target=MethodType(ModelMixin.generate_reflow_target, model),
        ),
    )
    attachment = Attachment(base, source, recipe, sharing, policy_forward, bindings, monitor)
    for module in (base, model):
        vars(module)[_STATE] = attachment
    return attachment
