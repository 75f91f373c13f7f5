"""The frozen teacher: the parameters that it shares with the student, and the teachers that are refused."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import assert_equal, loss_of
from lerobot.configs.types import NormalizationMode
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel
from people import edit_json
from safetensors.torch import load_file, save_file

from smolvla_reflow import ReflowError, Solver, attach
from smolvla_reflow.checkpoint.read import open_checkpoint
from smolvla_reflow.checkpoint.tensors import StoredTensors
from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.teacher import frozen_teacher


def storage(parameter):
    return parameter.untyped_storage().data_ptr()


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_frozen_and_equal_parameters_are_held_once(policy, teacher):
    """The backbone is in memory once."""
    frozen = frozen_teacher(policy, teacher)
    student = dict(policy.named_parameters())
    for name, parameter in frozen.named_parameters():
        assert (storage(parameter) == storage(student[name])) is not student[name].requires_grad, name
    extra = {storage(p): p.numel() for p in frozen.parameters()}
    for parameter in policy.parameters():
        extra.pop(storage(parameter), None)
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(extra.values()) == trainable


def test_a_teacher_builds_no_second_backbone_and_draws_no_random_numbers(policy, teacher, tmp_path, monkeypatch):
    """Architecture and weights of the VLM are loaded once."""
    teacher.save_pretrained(tmp_path)

    def built_again(*args, **kwargs):
        raise AssertionError("a second backbone was built")

    monkeypatch.setattr(SmolVLMWithExpertModel, "__init__", built_again)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    attach(policy, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_differing_backbone_gets_its_own_copy(policy, teacher):
    name = "model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight"
    before = policy.get_parameter(name).clone()
    teacher.get_parameter(name).data.mul_(2.0)
    assert torch.equal(frozen_teacher(policy, teacher).get_parameter(name), 2.0 * before)
    assert torch.equal(policy.get_parameter(name), before)


def test_a_trained_backbone_is_not_shared(make_policy):
    student = make_policy(seed=0, train_expert_only=False, freeze_vision_encoder=False)
    frozen = frozen_teacher(student, None)
    trained = {storage(p) for p in student.parameters() if p.requires_grad}
    assert not trained & {storage(p) for p in frozen.parameters()}
    assert sum(p.requires_grad for p in student.parameters()) > 50  # the copy froze itself, not the student


@pytest.mark.parametrize("source", ["folder", "policy"])
def test_training_the_policy_that_the_teacher_was_taken_from_does_not_change_it(policy, teacher, tmp_path, source):
    """And building it does not change that policy."""
    teacher.save_pretrained(tmp_path)
    frozen = frozen_teacher(policy, open_checkpoint(tmp_path) if source == "folder" else teacher)
    assert_equal(frozen.state_dict(), teacher.state_dict())
    assert teacher.training is False
    assert any(p.requires_grad for p in teacher.parameters())
    before = copy.deepcopy(frozen.state_dict())
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(1.0)
    teacher.config.num_steps = 3
    assert_equal(frozen.state_dict(), before)
    assert frozen.config.num_steps == 10


@pytest.mark.parametrize("stored", ["first", "second"])
def test_tied_parameters_stay_tied(policy, teacher, tmp_path, stored):
    """One tensor has two names, and a checkpoint one of the names."""
    names = ["model.state_proj.bias", "model.action_in_proj.bias"]
    torch.nn.init.ones_(teacher.model.state_proj.bias)
    for one in (policy, teacher):
        one.model.action_in_proj.bias = one.model.state_proj.bias
    teacher.save_pretrained(tmp_path)
    bias = teacher.model.state_proj.bias.detach()
    kept, left_out = names if stored == "first" else reversed(names)
    edit_weights(tmp_path, lambda w: (w.update({kept: bias.clone()}), w.pop(left_out, None)))
    assert not torch.equal(bias, policy.model.state_proj.bias)
    frozen = frozen_teacher(policy, open_checkpoint(tmp_path))
    assert frozen.model.state_proj.bias is frozen.model.action_in_proj.bias
    assert torch.equal(frozen.model.state_proj.bias, bias)


def test_a_teacher_whose_config_names_no_features_has_the_students(policy, teacher):
    """LeRobot's guide to PEFT says `--policy.input_features=null`."""
    teacher.config.input_features = None
    assert frozen_teacher(policy, teacher).config.input_features == policy.config.input_features


def test_what_guides_or_compiles_a_sampler_stays_with_the_policy(policy, teacher):
    """Real-time chunking would guide the couplings by a chunk that does not exist."""
    for one in (policy, teacher):
        one.config.rtc_config, one.config.compile_model = RTCConfig(enabled=True), True
        one.init_rtc_processor()
    guides = [one.model.rtc_processor for one in (policy, teacher)]
    assert None not in guides
    frozen = frozen_teacher(policy, teacher)
    assert frozen.rtc_processor is frozen.model.rtc_processor is frozen.config.rtc_config is None
    assert frozen.config.compile_model is False
    assert frozen.model.config is frozen.config
    assert [one.model.rtc_processor for one in (policy, teacher)] == guides
    assert None not in (policy.config.rtc_config, teacher.config.rtc_config)


@pytest.mark.parametrize(
    "move", [lambda p: p.to("cpu"), lambda p: p.to(torch.float64), lambda p: Accelerator(cpu=True).prepare(p)]
)
def test_sharing_survives_what_is_done_to_the_student(policy, teacher, move):
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    attach(policy, teacher)
    move(policy)
    frozen = dict(policy.model.teacher.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (storage(frozen[name]) == storage(parameter)) is (name not in trained), name


def test_unfreezing_what_is_shared_is_refused(policy, teacher, batch):
    """It would train the teacher along with the student."""
    attach(policy, teacher)
    policy.requires_grad_(True)
    with pytest.raises(ReflowError, match="unfrozen after attach.*detach, unfreeze it, and attach again"):
        loss_of(policy, batch)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
def test_a_checkpoint_is_never_in_memory_whole(tmp_path):
    megabyte, count = 2**20, 100
    save_file({f"w{i}": torch.full((megabyte // 4,), float(i)) for i in range(count)}, tmp_path / "w.safetensors")

    def in_use() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    weights, before, peak = StoredTensors(tmp_path / "w.safetensors"), in_use(), 0
    assert len(weights) == count
    for i in range(count):
        assert weights[f"w{i}"].sum() == i * megabyte // 4
        peak = max(peak, in_use())
    assert peak - before < 20 * megabyte


def test_num_steps_defaults_to_the_teachers_own(policy, teacher):
    teacher.config.num_steps = 7
    assert frozen_teacher(policy, teacher).config.num_steps == 7
    assert frozen_teacher(policy, teacher, num_steps=3).config.num_steps == 3
    assert (policy.config.num_steps, teacher.config.num_steps) == (10, 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk_size", 7),
        ("max_action_dim", 8),
        ("max_state_dim", 8),
        ("normalization_mapping", {"STATE": NormalizationMode.MIN_MAX}),
        ("resize_imgs_with_padding", [64, 64]),
        ("adapt_to_pi_aloha", True),
        ("add_image_special_tokens", True),
        ("prefix_length", 40),
        ("attention_mode", "self_attn"),
        ("self_attn_every_n_layers", 1),
        ("num_vlm_layers", 1),
        ("expert_width_multiplier", 0.5),
        ("min_period", 1.0),
        ("max_period", 2.0),
    ],
)
def test_a_teacher_of_another_shape_is_refused(policy, make_policy, field, value):
    """Also where all tensors have the same shapes."""
    other = make_policy(**{field: value, **({"n_action_steps": value} if field == "chunk_size" else {})})
    with pytest.raises(ReflowError, match="in the teacher's config and .*. Start the student") as error:
        attach(policy, other)
    assert f"The teacher does not fit the student: {field} is {value} in the teacher's config" in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.state_proj.weight"), "they lack model.state_proj.weight"),
        (lambda w: w.update({"model.extra.x": torch.zeros(1)}), "have the unknown model.extra.x"),
        (lambda w: w.update({"model.state_proj.bias": torch.zeros(3)}), r"state_proj.bias has shape \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(policy, teacher, tmp_path, edit, message):
    teacher.save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ReflowError, match=message):
        attach(policy, tmp_path)


def test_weights_of_an_older_library_hold_buffers_that_are_derived_now(policy, teacher, tmp_path):
    """Such as a rotary embedding's frequencies; LeRobot ignores them."""
    derived = dict(teacher.named_buffers()).keys() - teacher.state_dict().keys()
    assert derived
    teacher.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({name: torch.zeros(1) for name in derived}))
    assert_equal(frozen_teacher(policy, open_checkpoint(tmp_path)).state_dict(), teacher.state_dict())


def test_truncated_weights_are_refused(policy, teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ReflowError, match="While reading .*model.safetensors: SafetensorError"):
        attach(policy, tmp_path)


@pytest.mark.parametrize(("solver", "warned"), [(None, True), (Solver("euler", 1), False), (Solver("euler", 2), True)])
def test_a_teacher_of_one_step_that_is_solved_in_several(workshop, tmp_path, caplog, solver, warned):
    """Its run's config says that it was distilled. A teacher with another loss is never warned of."""
    teacher = Path(shutil.copytree(workshop / "1rf" / LAST, tmp_path / "teacher"))
    policy = SmolVLAPolicy.from_pretrained(teacher)
    for strategy in ("reflow", "distill"):
        edit_json(teacher / "train_config.json", reflow={"strategy": strategy})
        caplog.clear()
        with attach(policy, teacher, solver=solver):
            said = "for one step only" in caplog.text and "--reflow.solver=euler --reflow.num_steps=1" in caplog.text
            assert said is (warned and strategy == "distill")
