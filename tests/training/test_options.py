"""LeRobot's own options together with reflow: each trains a few steps by the command, and what comes out acts."""

import subprocess
import sys

import pytest
import torch
from helpers import lerobot_train_main, make_batch, reflow_run, reflow_train_main, same_tensors, stock_flags
from lerobot.configs.train import TrainPipelineConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from oracle import reflow_losses

from smolvla_reflow import Recipe, attach
from smolvla_reflow.demo.flags import LAST

since_0_6_2 = pytest.mark.skipif(
    "parallelism" not in TrainPipelineConfig.__dataclass_fields__, reason="exists from LeRobot 0.6.2 on"
)


# Joints of two arms.
ALOHA = {
    "adapt_to_pi_aloha": True,
    "max_state_dim": 14,
    "max_action_dim": 14,
    "input_features": {
        "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
    },
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (14,))},
}


def acts(policy, **observation):
    """The policy samples a chunk of finite actions."""
    policy.reset()
    batch = {
        "observation.state": torch.zeros(1, 2),
        "observation.images.top": torch.zeros(1, 3, 32, 32),
        "observation.language.tokens": torch.zeros(1, 4, dtype=torch.long),
        "observation.language.attention_mask": torch.ones(1, 4, dtype=torch.bool),
    }
    torch.manual_seed(0)
    actions = policy.predict_action_chunk({**batch, **observation})
    return actions.ndim == 3 and bool(torch.isfinite(actions).all())


def tensors(folder):
    return SmolVLAPolicy.from_pretrained(folder).state_dict()


def test_lora(workshop, tmp_path):
    """The student trains an adapter; its teacher is the base, without one."""
    from peft import PeftModel

    run = tmp_path / "run"
    reflow_train_main(reflow_run(workshop, run, peft__method_type="LORA", peft__r=4))
    assert (run / LAST / "adapter_model.safetensors").is_file()
    assert not (run / LAST / "model.safetensors").exists()
    base = SmolVLAPolicy.from_pretrained(workshop / "1rf" / LAST)
    student = PeftModel.from_pretrained(base, run / LAST)
    adapter = [p for n, p in student.named_parameters() if "lora_B" in n]
    assert adapter
    assert any(p.abs().max() > 0 for p in adapter)  # PEFT starts them at zero
    assert acts(student.get_base_model())
    reflow_train_main([f"--config_path={run}", "--resume=true", "--steps=6"])
    assert (run / "checkpoints/000006").is_dir()


def test_real_time_chunking_stays_configured(workshop, tmp_path):
    rtc = '{"enabled": true, "execution_horizon": 3}'
    reflow_train_main(reflow_run(workshop, tmp_path / "run", steps=1, policy__rtc_config=rtc))
    student = SmolVLAPolicy.from_pretrained(tmp_path / "run" / LAST)
    assert isinstance(student.config.rtc_config, RTCConfig)
    assert student.config.rtc_config.execution_horizon == 3
    assert student.rtc_processor is not None
    assert acts(student)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [{"compile_model": "true", "compile_mode": "default", "num_steps": 1}, {"use_amp": "true"}],
    ids=["compile_model", "use_amp"],
)
def test_an_option_of_the_policy(workshop, tmp_path, option):
    # In a process of its own: accelerate allows one kind of precision for each.
    flags = reflow_run(workshop, tmp_path / "run", steps=2, **{f"policy__{name}": v for name, v in option.items()})
    command = [sys.executable, "-m", "smolvla_reflow.commands.train", *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    student = SmolVLAPolicy.from_pretrained(tmp_path / "run" / LAST)
    assert getattr(student.config, next(iter(option))) is True
    assert not same_tensors(student.state_dict(), tensors(workshop / "1rf" / LAST))
    assert acts(student)


def test_adapt_to_pi_aloha(make_policy):
    """The state is decoded once, for both, and no target is encoded."""
    policy, teacher = (make_policy(seed=seed, **ALOHA) for seed in (0, 1))
    batch = make_batch(4) | {"observation.state": torch.rand(4, 14), "action": torch.rand(4, 5, 14)}
    noise, time = torch.randn(4, 5, 14), torch.rand(4)
    attach(policy, teacher, solver="midpoint", recipe=Recipe(weighting="none"))
    policy.train()
    loss, _ = policy.forward({k: v.clone() for k, v in batch.items()}, noise=noise, time=time)
    decoded = {**batch, "observation.state": policy._pi_aloha_decode_state(batch["observation.state"].clone())}
    right, wrong = (reflow_losses(policy, teacher, b, noise, time, 10).mean() for b in (decoded, batch))
    torch.testing.assert_close(loss, right, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(loss, wrong, rtol=1e-3)
    policy.eval()
    assert acts(policy, **{"observation.state": torch.rand(1, 14)})


@pytest.mark.parametrize("share", ["all", "half"])
def test_recorded_actions_of_an_aloha_are_converted_as_lerobot_does(make_policy, share):
    """The stock loss for recorded frames. LeRobot converts its batch in place; the caller's batch is left as it was."""
    policy = make_policy(**ALOHA).train()
    batch = make_batch(4) | {"observation.state": torch.rand(4, 14), "action": torch.rand(4, 5, 14)}
    fixed = {"noise": torch.randn(4, 5, 14), "time": torch.rand(4), "reduction": "none"}

    def losses():
        left = {name: value.clone() for name, value in batch.items()}
        return policy.forward(left, **fixed)[0], left

    expected, _ = losses()
    attach(policy, recipe=Recipe(real_data_ratio=0.5))
    policy.model.training_mode = "standard" if share == "all" else "reflow"
    found, left = losses()
    count = 4 if share == "all" else 2
    torch.testing.assert_close(found[:count], expected[:count])
    assert all(torch.equal(left[name], batch[name]) for name in batch)


@since_0_6_2
def test_ema(workshop, tmp_path):
    """Two stock checkpoints come out: the weights as trained, and LeRobot's average of them, without the teacher's."""
    run, decay = tmp_path / "run", 0.25
    reflow_train_main(reflow_run(workshop, run, steps=2, save_freq=1, ema__enable="true", ema__decay=decay))
    first, second = (tensors(run / f"checkpoints/00000{step}/pretrained_model") for step in (1, 2))
    averaged = tensors((run / LAST).with_name("pretrained_model_ema"))
    assert first.keys() == second.keys() == averaged.keys() == tensors(workshop / "1rf" / LAST).keys()
    assert not same_tensors(first, second)
    for name, value in averaged.items():  # diffusers' average starts with the weights after the first step
        torch.testing.assert_close(value, decay * first[name] + (1 - decay) * second[name])


@since_0_6_2
def test_gradient_accumulation(workshop, tmp_path):
    """As in LeRobot's own training; a reflow step takes as many backward passes."""
    options = {"steps": 2, "accelerator__gradient_accumulation__steps": 2}
    flags = reflow_run(workshop, tmp_path / "run", **options, reflow__strategy="standard")
    reflow_train_main(flags)
    lerobot_train_main(stock_flags(workshop, flags, tmp_path / "run", tmp_path / "stock"))
    reflow_train_main(reflow_run(workshop, tmp_path / "reflow", **options))
    trained, stock, reflowed = (tensors(tmp_path / run / LAST) for run in ("run", "stock", "reflow"))
    assert same_tensors(trained, stock)
    assert not same_tensors(trained, reflowed)
