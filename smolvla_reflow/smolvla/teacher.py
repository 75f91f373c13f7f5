"""The frozen teacher: a SmolVLA that shares with its student every parameter it can.

It is built from the student's own module tree, not by loading a second policy: all parameters start out shared,
and only those that the student trains, or that differ, get a copy of their own. So the vision-language
backbone is neither loaded nor held twice.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from smolvla_reflow.errors import ReflowError
from smolvla_reflow.smolvla.checkpoint import STATISTICS_AMONG_WEIGHTS, Checkpoint

TeacherSource: TypeAlias = Checkpoint | SmolVLAPolicy | None

# Config fields that the shape of no tensor gives away, but in which student and teacher must agree: they decide
# how a batch is prepared, which is done once for both, or how the shared module tree computes.
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


def frozen_teacher(student: nn.Module, source: TeacherSource, num_steps: int | None = None) -> SmolVLAPolicy:
    """Build the teacher of `student`.

    Args:
        student: a SmolVLAPolicy, or one wrapped by PEFT.
        source: a checkpoint, a policy, or None for the student as it is now.
        num_steps: steps of the teacher's ODE; None for its own `config.num_steps`.

    Returns:
        A policy in eval mode none of whose parameters requires a gradient.

    Raises:
        ReflowError: the configuration or weights of `source` do not fit the student.
    """
    structure: nn.Module
    weights: Mapping[str, Tensor]
    if source is None:
        base = base_policy(student)
        structure, config = base, base.config
        weights = dict(base.named_parameters(remove_duplicate=False))
    else:
        structure, config = student, source.config
        weights = source.weights() if isinstance(source, Checkpoint) else source.state_dict()

    teacher = _copy_sharing_parameters(structure)
    check_agreement(teacher.config, config)
    _fill(teacher, weights)
    _configure(teacher, config, num_steps)
    return teacher


def base_policy(policy: nn.Module) -> SmolVLAPolicy:
    """The SmolVLAPolicy itself, out of a PEFT wrapper if there is one.

    Raises:
        ReflowError: there is none.
    """
    get_base_model = getattr(policy, "get_base_model", None)
    base: Any = policy if get_base_model is None else get_base_model()
    if not isinstance(base, SmolVLAPolicy):
        hint = "; attach before wrapping it" if hasattr(base, "module") else ""
        raise ReflowError(f"Only a SmolVLAPolicy can be attached, this is a {type(base).__name__}{hint}.")
    return base


def _copy_sharing_parameters(structure: nn.Module) -> SmolVLAPolicy:
    """A copy of the module tree whose parameters are still the student's own objects."""
    # `deepcopy` leaves alone what its memo holds already. Prefilled with the parameters, it copies the modules around
    # them and nothing of their size: no second backbone is ever in memory, not even for a moment.
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


def check_agreement(student: SmolVLAConfig, teacher: SmolVLAConfig) -> None:
    """Raise ReflowError if one batch cannot serve both, or one module tree."""
    for field in AGREEING_FIELDS:
        of_student, of_teacher = getattr(student, field), getattr(teacher, field)
        if isinstance(of_student, list | tuple):
            of_student, of_teacher = list(of_student), list(of_teacher or ())
        if of_student != of_teacher:
            raise ReflowError(
                f"The teacher does not fit the student: {field} is {of_teacher} in the teacher's config and "
                f"{of_student} in the student's. Start the student from the teacher's checkpoint, or make the two "
                "agree."
            )


def _fill(teacher: SmolVLAPolicy, weights: Mapping[str, Tensor]) -> None:
    """Give every parameter the teacher's value; keep it shared where it is frozen and equal already."""
    # Tied parameters are one object under several names, of which a checkpoint stores one.
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in teacher.named_parameters(remove_duplicate=False):
        names[parameter].append(name)

    missing = [aliases[0] for aliases in names.values() if not any(n in weights for n in aliases)]
    known = {name for aliases in names.values() for name in aliases} | dict(teacher.named_buffers()).keys()
    unexpected = [name for name in weights if name not in known and not name.startswith(STATISTICS_AMONG_WEIGHTS)]
    for problem, found in (("lack", missing), ("have the unknown", unexpected)):
        if found:
            raise ReflowError(
                f"The teacher's weights do not fit: they {problem} {found[0]}"
                + (f" and {len(found) - 1} more." if len(found) > 1 else ".")
            )

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


def keep_whole(teacher: SmolVLAPolicy) -> None:
    """Give the teacher parameters of its own, over the same memory, before its student is sharded.

    FSDP1 copies a module's parameters into its shards and empties them in place, with everyone who holds them. From
    then on the memory is the teacher's alone: each process has the teacher whole, beside its shard of the student.
    """
    own: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay one
    for module in teacher.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, own.setdefault(parameter, nn.Parameter(parameter.detach(), requires_grad=False)))


def _configure(teacher: SmolVLAPolicy, config: SmolVLAConfig, num_steps: int | None) -> None:
    config = copy.deepcopy(config)
    config.num_steps = num_steps or config.num_steps
    config.input_features = config.input_features or teacher.config.input_features
    config.compile_model = False
    # Real-time chunking guides a sampler by the last chunk's left-over; a coupling has none.
    config.rtc_config = None
    teacher.config = teacher.model.config = config
    teacher.rtc_processor = teacher.model.rtc_processor = None
    teacher.eval()
    teacher.reset()
