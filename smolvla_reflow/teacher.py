"""The frozen teacher: a SmolVLA that carries noise along its flow, and shares every parameter it can with its student.

    frozen_source(teacher, student, solver, stats) -> FrozenTeacher, the source of couplings that `attach` uses

The teacher is built from the student's own module tree, so no second policy is loaded. All parameters start out shared,
and the teacher gets a copy of each parameter that the student trains, or that differs. So there is one vision-language
backbone in memory.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from smolvla_reflow.checkpoint.load import check_names, weights_of
from smolvla_reflow.checkpoint.read import (
    Checkpoint,
    open_checkpoint,
)
from smolvla_reflow.coupling import Coupling
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.smolvla.features import cameras_seen, saved_rename_map
from smolvla_reflow.smolvla.graph import SolveGraphs, solved
from smolvla_reflow.smolvla.normalization import SpaceMaps, space_maps
from smolvla_reflow.smolvla.observation import Observation, observe
from smolvla_reflow.smolvla.prefix import Prefix, encode
from smolvla_reflow.smolvla.statistics import Statistics
from smolvla_reflow.smolvla.velocity import Velocity
from smolvla_reflow.solver import Solver

TeacherSource: TypeAlias = Checkpoint | SmolVLAPolicy | None

# Student and teacher must agree in these config fields, which no tensor's shape shows: they decide how a batch is
# prepared, once for both, or how the shared module tree computes.
AGREEING_FIELDS = (
    "chunk_size",
    "max_state_dim",
    "max_action_dim",
    "normalization_mapping",
    "resize_imgs_with_padding",
    "adapt_to_pi_aloha",
    "add_image_special_tokens",
    "prefix_length",
    "attention_mode",
    "self_attn_every_n_layers",
    "num_vlm_layers",
    "expert_width_multiplier",
    "min_period",
    "max_period",
)


@dataclass(frozen=True, eq=False)
class FrozenTeacher:
    """A source of couplings: noise, and the end of its path along a teacher's flow.

    Attributes:
        policy: the teacher; it moves to the student's device by itself.
        solver: of the teacher's ODE.
        space: the maps into the teacher's normalised space and back, if that is not the student's.
        rename_map: from a dataset's own names to the teacher's, for batches that have none of the teacher's cameras.
        graphs: its recorded solves, None to solve kernel by kernel.
    """

    policy: SmolVLAPolicy
    solver: Solver
    space: SpaceMaps | None = None
    rename_map: Mapping[str, str] = field(default_factory=dict)
    graphs: SolveGraphs | None = None

    @torch.no_grad()
    def __call__(
        self,
        observation: Observation,
        *,
        frames: Tensor | None,
        noise: Tensor | None,
        per_frame: int,
        prefix: Prefix | None = None,
    ) -> Coupling:
        """See `CouplingSource`. Runs under the active autocast, as the teacher's stock sampler would.

        The whole width `max_action_dim` is solved and returned: the dimensions beyond the robot's own are part of the
        flow's state, and the student's sampler will see them too.

        Args:
            prefix: of the observation, if the student has encoded it as the teacher would.

        Raises:
            ReflowError: the student trains parameters that it shares with the teacher, or the solver fails.
        """
        config = self.policy.config
        if noise is None:
            shape = (len(observation.state) * per_frame, config.chunk_size, config.max_action_dim)
            noise = self.policy.model.sample_noise(shape, observation.state.device)
        velocity = self.velocity(observation, prefix).repeated(per_frame)
        actions = solved(self.solver.resolved(config.num_steps), velocity, noise, self.graphs)
        return Coupling(noise, actions if self.space is None else self.space.actions(actions))

    def velocity(self, observation: Observation, prefix: Prefix | None = None) -> Velocity:
        """The teacher's v(x, t) for the student's observations, in the teacher's own normalised space.

        Raises:
            ReflowError: the student trains parameters that it shares with the teacher.
        """
        follow(self.policy, observation.state.device)
        if prefix is None:
            with torch.no_grad():
                if self.space is not None and self.space.state is not None:
                    observation = observation._replace(state=self.space.state(observation.state))
                prefix = encode(self.policy.model, observation)
        return Velocity(self.policy.model, prefix)

    def observe(self, batch: Mapping[str, Any], student: SmolVLAPolicy, seen: Observation) -> Observation:
        """A batch as stock inference of the teacher's checkpoint sees it, still in the student's normalised space.

        Args:
            batch: as it came to the policy; empty if the model was called without its policy.
            student: the policy that the batch came to.
            seen: the student's view, which is returned unless the two list different cameras, or in another order.

        Raises:
            ReflowError: the cameras differ, and the batch does not say which images the student was given.
        """
        teachers, students = self.policy.config, student.config
        names = batch or {*teachers.image_features, *students.image_features}
        renames = {} if any(cameras_seen(teachers, names)) else self.rename_map
        by_teacher = {renames.get(name, name): name for name in names}
        images = tuple(by_teacher.get(name, name) for name in cameras_seen(teachers, by_teacher))
        if images == cameras_seen(students, names):
            return seen
        if not batch:
            raise ReflowError(
                "Teacher and student list different cameras in their configs, or in another order, and images without "
                "names cannot serve both; call policy.forward(batch)."
            )
        return observe(self.policy, {renamed: batch[name] for renamed, name in by_teacher.items()})

    @property
    def maps_state(self) -> bool:
        """True if a state differs in the two normalised spaces."""
        return self.space is not None and self.space.state is not None


def frozen_source(
    teacher: str | Path | Checkpoint | SmolVLAPolicy | None,
    student: nn.Module,
    solver: Solver,
    dataset_stats: Statistics | None,
    revision: str | None = None,
    *,
    cuda_graph: bool = False,
) -> FrozenTeacher:
    """Build the frozen teacher of a student that has none attached; arguments and errors as of `attach`."""
    if revision is not None:
        if not isinstance(teacher, str):
            raise ReflowError("revision has no effect on a teacher that is not named by its hub id; leave it out.")
        teacher = open_checkpoint(teacher, revision)
    origin = open_checkpoint(teacher) if isinstance(teacher, str | Path) else teacher
    space: SpaceMaps | None = None
    rename_map = saved_rename_map(origin) if isinstance(origin, Checkpoint) else {}
    if dataset_stats is not None:
        if not isinstance(origin, Checkpoint):
            raise ReflowError("dataset_stats needs a teacher given as a checkpoint, which saves its own statistics.")
        space = space_maps(origin, dataset_stats)
    policy = frozen_teacher(student, origin, solver.num_steps)
    resolved = solver.of_couplings(policy.config.num_steps)
    if isinstance(origin, Checkpoint):
        warn_of_distilled(origin, resolved)
    return FrozenTeacher(policy, resolved, space, rename_map, SolveGraphs() if cuda_graph else None)


def warn_of_distilled(teacher: Checkpoint, solver: Solver) -> None:
    """Warn if a teacher was trained for one step, and is solved in several."""
    if teacher.noted("reflow").get("strategy") == "distill" and (solver.method, solver.num_steps) != ("euler", 1):
        logging.getLogger(__name__).warning(
            "The teacher %s was trained by --reflow.strategy=distill, for one step only. Its flow is bad in between, "
            "and is solved by %s. To couple noise by its one step: --reflow.solver=euler --reflow.num_steps=1",
            *(teacher.source, solver.in_words()),
        )


def frozen_teacher(student: nn.Module, source: TeacherSource, num_steps: int | None = None) -> SmolVLAPolicy:
    """Build the teacher of `student` (a SmolVLAPolicy, or one wrapped by PEFT), in eval mode and without gradients.

    `source` is a checkpoint, a policy, or None for the student as it is now.
    """
    structure: nn.Module
    weights: Mapping[str, Tensor]
    if source is None:
        base = base_policy(student)
        structure, config = base, base.config
        weights = dict(base.named_parameters(remove_duplicate=False))
    else:
        structure, config = student, source.config
        weights = weights_of(source) if isinstance(source, Checkpoint) else source.state_dict()

    teacher = _copy_sharing_parameters(structure)
    check_agreement(teacher.config, config)
    _fill(teacher, weights)
    _configure(teacher, config, num_steps)
    return teacher


def base_policy(policy: nn.Module) -> SmolVLAPolicy:
    """The SmolVLAPolicy itself, out of a PEFT wrapper if there is one."""
    get_base_model = getattr(policy, "get_base_model", None)
    base: Any = policy if get_base_model is None else get_base_model()
    if not isinstance(base, SmolVLAPolicy):
        hint = "; attach before wrapping it" if hasattr(base, "module") else ""
        raise ReflowError(f"Only a SmolVLAPolicy can be attached, this is a {type(base).__name__}{hint}.")
    return base


def follow(teacher: SmolVLAPolicy, device: torch.device) -> None:
    """Move the teacher's own parameters to the student's device; the shared ones are there already."""
    elsewhere = False
    for parameter in teacher.parameters():
        elsewhere |= parameter.device != device
        if parameter.requires_grad:
            raise ReflowError(
                "A parameter that the teacher shares with the student was unfrozen after attach, so that "
                "training would change the teacher; detach, unfreeze it, and attach again."
            )
    if elsewhere or any(buffer.device != device for buffer in teacher.buffers()):
        teacher.to(device)


def check_agreement(student: SmolVLAConfig, teacher: SmolVLAConfig) -> None:
    """Raise ReflowError if one batch cannot serve both, or one module tree."""
    for name in AGREEING_FIELDS:
        of_student, of_teacher = getattr(student, name), getattr(teacher, name)
        if isinstance(of_student, list | tuple):
            of_student, of_teacher = list(of_student), list(of_teacher or ())
        if of_student != of_teacher:
            raise ReflowError(
                f"The teacher does not fit the student: {name} is {of_teacher} in the teacher's config and "
                f"{of_student} in the student's. Start the student from the teacher's checkpoint, or make the two "
                "agree."
            )


def keep_whole(teacher: SmolVLAPolicy) -> None:
    """Give the teacher new parameters over the same memory, before its student is sharded.

    FSDP1 copies a module's parameters into its shards and empties them in place, for everyone who holds them.
    After that the memory is the teacher's alone: each process has the full teacher, beside its shard of the student.
    """
    own: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay one
    for module in teacher.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, own.setdefault(parameter, nn.Parameter(parameter.detach(), requires_grad=False)))


def _copy_sharing_parameters(structure: nn.Module) -> SmolVLAPolicy:
    """A copy of the module tree whose parameters are still the student's own objects."""
    # `deepcopy` does not copy an object that its memo holds already. With the parameters in the memo, it copies the
    # modules around them alone: no second backbone is ever in memory, even for a moment.
    shared: list[object] = list(structure.parameters())
    shared += [m.processor for m in structure.modules() if hasattr(m, "processor")]
    duplicate: Any = copy.deepcopy(structure, {id(item): item for item in shared})
    # A PEFT student's teacher is its base model, without the adapter.
    policy = duplicate.unload() if hasattr(duplicate, "unload") else duplicate
    for module in (policy, policy.model):
        # Instance-level overrides (compiled or autocast forwards) are bound to the student.
        for name in [n for n in vars(module) if callable(getattr(type(module), n, None))]:
            del vars(module)[name]
    return policy


def _fill(teacher: SmolVLAPolicy, weights: Mapping[str, Tensor]) -> None:
    """Give every parameter the teacher's value; a parameter that is frozen and equal already stays shared."""
    check_names(teacher, weights.keys(), "The teacher's weights do not fit")
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in teacher.named_parameters(remove_duplicate=False):
        names[parameter].append(name)

    with torch.no_grad():
        for parameter, aliases in names.items():
            value = next(weights[name] for name in aliases if name in weights)
            if value.shape != parameter.shape:
                raise ReflowError(
                    f"The teacher's weights do not fit: {aliases[0]} has shape {tuple(value.shape)}, "
                    f"the student's has {tuple(parameter.shape)}."
                )
            if not torch.isfinite(value).all():
                raise ReflowError(
                    f"The teacher's weights are broken: {aliases[0]} holds NaN or infinity. Use an earlier checkpoint."
                )
            value = value.to(parameter)
            if not parameter.requires_grad and torch.equal(value, parameter):
                continue
            own = nn.Parameter(value.clone(), requires_grad=False)
            for name in aliases:
                owner, _, leaf = name.rpartition(".")
                setattr(teacher.get_submodule(owner), leaf, own)


def _configure(teacher: SmolVLAPolicy, config: SmolVLAConfig, num_steps: int | None) -> None:
    config = copy.deepcopy(config)
    config.num_steps = num_steps or config.num_steps
    config.input_features = config.input_features or teacher.config.input_features
    config.compile_model = False
    # Real-time chunking guides a sampler by the rest of the last chunk; a coupling has none.
    config.rtc_config = None
    teacher.config = teacher.model.config = config
    teacher.rtc_processor = teacher.model.rtc_processor = None
    teacher.eval()
    teacher.reset()
