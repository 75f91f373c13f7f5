"""Attach a teacher and a loss strategy to one SmolVLA policy, and detach them again.

    attach(policy, teacher="outputs/1rf/checkpoints/last/pretrained_model")
    loss, metrics = policy.forward(batch)       # the reflow loss in train mode, the stock loss in eval mode
    detach(policy)

In train mode a batch takes this way:  policy.forward -> Step -> loss strategy -> losses (reduction.py) -> loss.

No class is subclassed or changed. `attach` binds the functions of the two mixins below onto this instance, in the slot
that LeRobot uses when it compiles a policy (`self.forward = ...`). The teacher goes where `nn.Module` does not look for
submodules. `detach` restores `vars()` of each module.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from torch import Tensor, nn

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.compat import check_signatures
from smolvla_reflow.coupling import Coupling, CouplingSource
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.losses import get_loss_strategy
from smolvla_reflow.pairs.store import Pairs, open_source
from smolvla_reflow.recipe import Recipe
from smolvla_reflow.reduction import PolicyForward, losses_of, reduced_loss
from smolvla_reflow.smolvla.binding import Binding, bind
from smolvla_reflow.smolvla.graph import check_recordable
from smolvla_reflow.smolvla.normalization import action_deviations
from smolvla_reflow.smolvla.observation import Observation, observe, recorded_actions, with_one_state
from smolvla_reflow.smolvla.prefix import compile_encoding, is_trained, trained_part
from smolvla_reflow.smolvla.sharing import Sharing, share
from smolvla_reflow.smolvla.statistics import Statistics
from smolvla_reflow.smolvla.velocity import compile_velocity
from smolvla_reflow.solver import Solver
from smolvla_reflow.step import Step
from smolvla_reflow.step_metrics import StepMetrics
from smolvla_reflow.teacher import FrozenTeacher, base_policy, frozen_source

_STATE = "_reflow"  # the attribute of policy and model that holds their Attachment


@dataclass(frozen=True, eq=False)
class Attachment:
    """The result of `attach`; as a context manager it detaches on leaving.

    Attributes:
        policy: the attached SmolVLAPolicy (inside a PEFT wrapper, the base policy).
        source: of couplings, a frozen teacher or stored pairs.
        recipe: times, weights and number of couplings, and the share of recorded data.
        sharing: of the prefix, or of the images' features, by student and teacher.
        policy_forward: the policy's forward as it was before.
        bindings: that `detach` undoes.
        step_metrics: running means that are reported beside the loss.
    """

    policy: SmolVLAPolicy
    source: CouplingSource
    recipe: Recipe
    sharing: Sharing
    policy_forward: PolicyForward
    bindings: tuple[Binding, ...]
    step_metrics: StepMetrics

    @property
    def teacher(self) -> SmolVLAPolicy | None:
        """The frozen teacher; None if pairs stand in for it."""
        return self.source.policy if isinstance(self.source, FrozenTeacher) else None

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
        """The step of one forward pass, for the loss of this name."""
        batch = batch or {}
        seen = self.sharing.in_encoder_dtype(observation)
        by_teacher = self.source.observe(batch, self.policy, seen) if isinstance(self.source, FrozenTeacher) else seen
        own_prefix = self.sharing.why_not_shared or trained_part(self.policy)
        joint = own_prefix is not None or get_loss_strategy(strategy).joint_forward
        return Step(
            model=self.policy.model,
            forward=self.policy.model.forward_standard,
            observation=seen,
            actions=actions,
            source=self.source.in_batch(batch) if isinstance(self.source, Pairs) else self.source,
            recipe=self.recipe,
            batch=batch,
            noise=noise,
            time=time,
            joint_forward=joint,
            one_prefix=self.teacher is not None and by_teacher is seen and not joint,
            teachers_observation=None if by_teacher is seen else self.sharing.in_encoder_dtype(by_teacher),
            deviations=self.step_metrics.deviations_on(actions.device),
        )

    def losses(self, strategy: str, *inputs: Any) -> Tensor:
        """Unreduced losses `(B, chunk_size, max_action_dim)` of a strategy, from the inputs of the model's forward."""
        *observation, actions, noise, time = inputs
        step = self.step(Observation(*observation), actions, noise, time, strategy=strategy)
        with self.sharing.once():
            return losses_of(get_loss_strategy(strategy), step)[0]

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: object) -> None:
        if is_attached(self.policy):
            detach(self.policy)


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
            for couplings also `one_step_error` and the velocity's error by tenths of t (`step_metrics.py`).
        """
        attachment = attachment_of(self)
        if not self.training:
            return attachment.policy_forward(batch, noise, time, reduction)
        reports = attachment.step_metrics.reports
        reported = {name: value for report in reports for name, value in report().items()}
        policy, mode = attachment.policy, self.model.training_mode
        batch = with_one_state(policy, batch)
        observation, actions = observe(policy, batch), recorded_actions(policy, batch)
        step = attachment.step(observation, actions, noise, time, batch, strategy=mode)
        with attachment.sharing.once():
            loss, metrics = reduced_loss(get_loss_strategy(mode), step, policy, attachment.policy_forward, reduction)
        numbers = attachment.step_metrics.read(metrics, {**step.metrics, **reported}, step.lines)
        finite = math.isfinite(numbers.get("loss", 0.0))
        attachment.step_metrics.not_finite = None if finite else step.not_finite()
        return loss, numbers


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
        inputs = (images, img_masks, lang_tokens, lang_masks, state, actions, noise, time)
        return attachment.losses(self.training_mode, *inputs) if self.training else self.forward_standard(*inputs)

    def forward_reflow(
        self, images, img_masks, lang_tokens, lang_masks, state, actions, noise=None, time=None
    ) -> Tensor:
        """Unreduced reflow losses `(B, chunk_size, max_action_dim)`, in any `training_mode`."""
        inputs = (images, img_masks, lang_tokens, lang_masks, state, actions, noise, time)
        return attachment_of(self).losses("reflow", *inputs)

    def generate_reflow_target(self, images, img_masks, lang_tokens, lang_masks, state, noise=None) -> Coupling:
        """Couple noise to the teacher's actions, both `(B, chunk_size, max_action_dim)`, without gradient.

        `noise` is drawn as the stock sampler draws it unless it is given.
        """
        attachment, observation = attachment_of(self), Observation(images, img_masks, lang_tokens, lang_masks, state)
        if isinstance(attachment.source, FrozenTeacher):  # raises if these images cannot serve the teacher
            attachment.source.observe({}, attachment.policy, observation)
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
    cuda_graph: bool = False,
) -> Attachment:
    """Make `policy.forward` compute a strategy's loss, on couplings of a frozen teacher or stored pairs.

    After this `policy.model` has `training_mode` (assignable), `teacher`, `forward_standard` (the forward it had,
    compiled or not), `forward_reflow` and `generate_reflow_target`. The teacher is no submodule: `state_dict()`,
    `parameters()` and checkpoints do not contain it. It shares the memory of every parameter that is frozen in the
    policy and equal in both, so load the policy's weights before, and compile or wrap `model.forward` before.

    If everything that encodes the prefix, except `state_proj`, is frozen and equal in both, `state_proj` is frozen
    until `detach`, and one encoding serves both. Else each policy encodes the prefix; the log and
    `sharing.why_not_shared` say why.

    Args:
        policy: a SmolVLAPolicy, or one wrapped by PEFT.
        teacher: a checkpoint folder or hub id, a SmolVLAPolicy as it is now, or None for the policy as it is now.
        revision: of a hub id, a branch, tag or commit; default its main branch.
        pairs: couplings in the teacher's place: a folder of `smolvla-reflow-pairs`, or any `CouplingSource`. The caller
            makes sure that they belong to the dataset of the batches; the training command checks it.
        strategy: a name from `available_loss_strategies()`, or a loss in a file, `path/to/file.py:name`.
        recipe: times, weights, couplings for a frame, share of recorded data; default `Recipe()`.
        solver: of the teacher's ODE, or a method's name; default `Solver()`. Without `num_steps` it evaluates the
            velocity as often as the teacher's stock sampler, but at least 10 times.
        dataset_stats: statistics that normalise the batches (LeRobot's `dataset.meta.stats`), if they may differ from
            those saved in the teacher's checkpoint; state and actions are then mapped. Stored pairs of other
            statistics are refused. They also set the unit of `one_step_error`, standard deviations.
        train_state_proj: train `state_proj` too. The student then encodes the prefix itself, with gradient.
        cuda_graph: on a GPU, solve the teacher's ODE as one CUDA graph (`smolvla/graph.py`). A policy with
            `compile_model` keeps its compiled velocity instead.

    Raises:
        ReflowError: the policy is no SmolVLA of a supported LeRobot, or attached already; a name is unknown; an
            argument has no effect; or teacher, pairs or statistics do not fit.
    """
    base = base_policy(policy)
    if is_attached(base):
        raise ReflowError("This policy already has a teacher attached; call detach(policy) first.")
    check_signatures(base)
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise ReflowError(f"recipe is a {type(recipe).__name__}; give a Recipe.")
    loss = get_loss_strategy(strategy)
    loss.check_effect(recipe, teacher=teacher, pairs=pairs, solver=solver, cuda_graph=cuda_graph)
    if train_state_proj and not is_trained(base.model.state_proj):
        raise ReflowError("train_state_proj has no effect on a policy whose own state_proj is frozen; leave it out.")
    source: CouplingSource
    if pairs is not None:
        source = open_source(pairs, base.config, dataset_stats)
    else:
        ode = solver if isinstance(solver, Solver) else Solver(solver or Solver.method)
        if cuda_graph:
            check_recordable(ode)
        graphs = cuda_graph and not base.config.compile_model
        source = frozen_source(teacher, policy, ode, dataset_stats, revision, cuda_graph=graphs)
        if cuda_graph and not graphs:
            logging.getLogger(__name__).info("cuda_graph is not used beside compile_model=true.")
    frozen = source.policy if isinstance(source, FrozenTeacher) else None
    reasons = {
        f"strategy={loss.name} trains it with the rest": loss.joint_forward,
        "train_state_proj=true": train_state_proj,
        "the state is normalised otherwise than the teacher's": isinstance(source, FrozenTeacher) and source.maps_state,
    }
    why_not = next((reason for reason, holds in reasons.items() if holds), None)
    sharing = share(base, frozen, several=recipe.couplings_per_frame > 1, why_not=why_not)
    step_metrics = StepMetrics(action_deviations(base, dataset_stats or {}))
    policy_forward = base.forward
    bindings = _bind(base, frozen, strategy)
    attachment = Attachment(base, source, recipe, sharing, policy_forward, bindings, step_metrics)
    for module in (base, base.model):
        vars(module)[_STATE] = attachment
    logging.getLogger(__name__).info(sharing.described(base, frozen))
    return attachment


def detach(policy: nn.Module) -> None:
    """Undo `attach`, so that `vars()` of every module is as before.

    Raises:
        ReflowError: nothing is attached, or something has replaced `policy.forward` since.
    """
    base = base_policy(policy)
    if not is_attached(base):
        raise ReflowError("This policy has no teacher attached; there is nothing to detach.")
    for module, function in ((base, PolicyMixin.forward), (base.model, ModelMixin.forward)):
        if getattr(vars(module).get("forward"), "__func__", None) is not function:
            raise ReflowError(
                f"{type(module).__name__}.forward was wrapped after attach; unwrap it first "
                "(for accelerate: accelerator.unwrap_model(policy, keep_fp32_wrapper=False))."
            )
    attachment: Attachment = vars(base)[_STATE]
    _undo_assigned_teacher(attachment)
    for binding in attachment.bindings:
        binding.undo()
    attachment.sharing.undo()
    for module in (base, base.model):
        del vars(module)[_STATE]


def is_attached(policy: nn.Module) -> bool:
    """True if `policy` has a teacher attached. Raises ReflowError if it is no SmolVLA policy."""
    return _STATE in vars(base_policy(policy))


def attachment_of(module: object) -> Attachment:
    """The attachment of an attached policy, or of its model."""
    attachment: Attachment = vars(module)[_STATE]
    if _undo_assigned_teacher(attachment):
        raise ReflowError(
            "Do not assign policy.model.teacher: the new teacher would be trained and saved with the student. Call "
            "detach(policy), then attach(policy, teacher=...). The assignment was undone."
        )
    return attachment


def _undo_assigned_teacher(attachment: Attachment) -> bool:
    """Undo an assignment of `model.teacher`; returns True if there was one."""
    model = attachment.policy.model
    assigned = vars(model).get("teacher", attachment) is not attachment.teacher
    model._modules.pop("teacher", None)
    vars(model)["teacher"] = attachment.teacher
    return assigned


def _bind(base: SmolVLAPolicy, teacher: SmolVLAPolicy | None, strategy: str) -> tuple[Binding, ...]:
    """Bind the mixins' functions onto this policy and its model."""
    model = base.model
    models = (model,) if teacher is None else (model, teacher.model)
    return (
        *((*compile_velocity(*models), *compile_encoding(*models)) if base.config.compile_model else ()),
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
