"""What a policy achieves in a simulated environment, by LeRobot's own evaluation, at any number of steps.

Contestant, --env.*  ->  lerobot-eval's rollouts  ->  Success, with a 95 % confidence interval
"""

from collections.abc import Sequence

from lerobot.configs.default import EvalConfig
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.envs.utils import close_envs, env_to_policy_features
from lerobot.scripts.lerobot_eval import eval_policy_all
from lerobot.utils.random_utils import set_seed

from smolvla_reflow.checkpoint import Checkpoint
from smolvla_reflow.errors import ReflowError
from smolvla_reflow.evaluation import Contestant
from smolvla_reflow.metrics import Success
from smolvla_reflow.preflight import check_features


def check_env(env: EnvConfig, checkpoints: Sequence[Checkpoint], rename_map: dict[str, str]) -> None:
    """Raise ReflowError unless this environment is installed and shows these policies what they need."""
    features = {name: {"shape": feature.shape} for name, feature in env_to_policy_features(env).items()}
    for checkpoint in checkpoints:
        check_features(checkpoint, features, rename_map, where=f"--env.type={env.type}")
    try:
        close_envs(make_env(env, n_envs=1))
    except Exception as error:  # each simulator has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReflowError(f"--env.type={env.type} cannot be started ({reason.rstrip('.')}).") from error


def drive(contestant: Contestant, env: EnvConfig, settings: EvalConfig, num_steps: int, seed: int) -> Success:
    """Success over `settings.n_episodes` episodes of each task, the episodes of `lerobot-eval --seed`.

    Args:
        num_steps: Euler steps of the stock sampler.
        seed: of the noise and of the first episode; the same seed shows every policy the same episodes.
    """
    # Made anew each time, so that no episode depends on those that another policy drove before.
    envs = make_env(env, n_envs=settings.batch_size, use_async_envs=settings.use_async_envs)
    before, after = make_env_pre_post_processors(env, contestant.policy.config)
    set_seed(seed)
    try:
        with contestant.inference(num_steps):
            info = eval_policy_all(
                envs=envs,
                policy=contestant.policy,
                env_preprocessor=before,
                env_postprocessor=after,
                preprocessor=contestant.preprocessor,
                postprocessor=contestant.postprocessor,
                n_episodes=settings.n_episodes,
                start_seed=seed,
                max_parallel_tasks=env.max_parallel_tasks,
            )
    finally:
        close_envs(envs)
    tasks = sorted(info["per_task"], key=lambda task: (task["task_group"], task["task_id"]))
    return Success.count({f"{t['task_group']}/{t['task_id']}": t["metrics"]["successes"] for t in tasks})
