"""Error of a teacher's couplings against the true ends of its paths, by solver and number of steps.

    smolvla-reflow-demo --output_dir=outputs/demo
    python examples/benchmarks/coupling_error.py --repo_id=smolvla-reflow/demo --root=outputs/demo/dataset \
        --teacher_path=outputs/demo/1rf/checkpoints/last/pretrained_model

The reference is 200 steps of rk4 in float32. The first line gives the distance of 100 steps from it. Errors are root
mean squares over frames, steps and the robot's action dimensions, in normalised units (standard deviations of the
action). The median is taken over the samples' own root mean squares: a few samples that end in another way of doing the
task do not change it. NFE is the number of velocity evaluations, the cost of a coupling.

`jittered` draws other times in each batch. Its rows show the mean over 16 draws, and the bias: the error of the mean
coupling, which is what a student learns. Any other solver's bias is its error.
"""

from dataclasses import dataclass

import draccus
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch.utils.data import DataLoader, Subset

from smolvla_reflow import Observation, Solver
from smolvla_reflow.smolvla.observation import observe
from smolvla_reflow.smolvla.velocity import velocity_of


@dataclass
class ErrorConfig:
    teacher_path: str
    repo_id: str
    root: str | None = None
    num_frames: int = 64
    num_noises: int = 4
    draws: int = 16
    device: str = "cpu"


def load_observation(cfg: ErrorConfig, policy: SmolVLAPolicy) -> Observation:
    """Evenly spaced frames of the dataset, as the policy sees them."""
    preprocessor, _ = make_pre_post_processors(
        policy.config, cfg.teacher_path, preprocessor_overrides={"device_processor": {"device": cfg.device}}
    )
    dataset = LeRobotDataset(cfg.repo_id, root=cfg.root)
    frames = torch.linspace(0, len(dataset) - 1, cfg.num_frames).long().tolist()
    batch = preprocessor(next(iter(DataLoader(Subset(dataset, frames), batch_size=cfg.num_frames))))
    return observe(policy, batch)


def rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


def median(difference: torch.Tensor) -> float:
    return difference.square().mean(dim=(1, 2)).sqrt().median().item()


def main() -> None:
    cfg = draccus.parse(ErrorConfig)
    policy = SmolVLAPolicy.from_pretrained(cfg.teacher_path).to(cfg.device).eval()
    config = policy.config
    observation = load_observation(cfg, policy)
    torch.manual_seed(0)
    noise = torch.randn(cfg.num_frames * cfg.num_noises, config.chunk_size, config.max_action_dim, device=cfg.device)
    width = config.action_feature.shape[0]

    @torch.no_grad()
    def end(solver: Solver, draw: int = 1) -> torch.Tensor:
        torch.manual_seed(draw)  # the same times in both precisions
        velocity = velocity_of(policy.model, observation).repeated(cfg.num_noises)
        return solver.resolved(config.num_steps).integrate(velocity, noise)[..., :width]

    @torch.no_grad()
    def nfe(solver: Solver) -> int:
        count, velocity = 0, velocity_of(policy.model, observation).repeated(cfg.num_noises)

        def counting(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return velocity(x, t)

        solver.integrate(counting, noise)
        return count

    reference = end(Solver("rk4", num_steps=200))
    print(f"reference: rk4 200; rk4 100 is off by {rms(end(Solver('rk4', num_steps=100)) - reference):.4f}")
    solvers = [Solver("euler", num_steps=n) for n in (1, 2, 5, 10, 20, 50)]
    solvers += [Solver("midpoint", num_steps=n) for n in (5, 10, 20)]
    solvers += [Solver("jittered", num_steps=n) for n in (5, 10)]
    solvers += [Solver("rk4", num_steps=n) for n in (2, 5)]
    solvers += [Solver("dopri5", rtol=tolerance, atol=tolerance) for tolerance in (1e-3, 1e-5)]
    print(f"{'solver':<15} {'NFE':>4} {'float32':>9} {'median':>9} {'bias':>9} {'bf16':>9} {'bf16 - fp32':>12}")
    for solver in solvers:
        exact = end(solver)
        draws = [exact] + [end(solver, k) for k in range(2, cfg.draws + 1 if solver.method == "jittered" else 2)]
        errors = torch.stack([each - reference for each in draws])
        # The mean of so few draws still has a share of their spread.
        spread = errors.var(dim=0).mean() / len(errors) if len(errors) > 1 else 0
        bias = (errors.mean(dim=0).square().mean() - spread).clamp(min=0).sqrt().item()
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16):
            rounded = end(solver)
        name = f"{solver.method} {solver.num_steps or f'{solver.rtol:g}'}"
        typical = sum(map(median, errors)) / len(errors)
        print(
            f"{name:<15} {nfe(solver):>4} {rms(errors):>9.4f} {typical:>9.4f} {bias:>9.4f} "
            f"{rms(rounded - reference):>9.4f} {rms(rounded - exact):>12.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
