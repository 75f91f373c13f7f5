"""Episodes in a simulated environment, at any number of steps, by LeRobot's own evaluation.

MeasuredPolicy, --env.*  ->  drive: the episodes of lerobot-eval, by task
"""

import contextlib
from collections.abc import Sequence

from lerobot.configs.default import EvalConfig as ClosedLoopConfig
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_pre_post_processors
from lerobot.envs.utils import close_envs, env_to_policy_features
from lerobot.scripts.lerobot_eval import eval_policy_all
from lerobot.utils.random_utils import set_seed

from smolvla_reflow.checkpoint.read import Checkpoint
from smolvla_reflow.errors import doing
from smolvla_reflow.evaluation.late import LateChunks, executing
from smolvla_reflow.evaluation.policy import MeasuredPolicy
from smolvla_reflow.evaluation.success import Episodes
from smolvla_reflow.evaluation.task_sentence import shown_sentences, with_sentence
from smolvla_reflow.smolvla.features import fitted


def check_env(env: EnvConfig, checkpoints: Sequence[Checkpoint], rename_map: dict[str, str], seed: int) -> list[str]:
    """Start an environment for these policies; returns the sentences that it shows (`task_sentence.py`)."""
    for checkpoint in checkpoints:
        fitted(checkpoint, env_to_policy_features(env), rename_map, where=f"--env.type={env.type}")
    with doing(f"starting --env.type={env.type}"):
        return shown_sentences(env, seed)


def drive(
    policy: MeasuredPolicy,
    env: EnvConfig,
    settings: ClosedLoopConfig,
    num_steps: int,
    seed: int,
    task: str | None = None,
    late: LateChunks | None = None,
) -> dict[str, Episodes]:
    """Run the episodes of `lerobot-eval --seed`, the same for every policy; returns them by task.

    Args:
        task: the sentence to show the policy, None for the environment's own.
        late: the policy's chunks that arrive late; None for a simulator that waits for the policy.
    """
    # New environments each time, so that no episode depends on earlier episodes of another policy.
    envs = make_env(env, n_envs=settings.batch_size, use_async_envs=settings.use_async_envs)
    before, after = make_env_pre_post_processors(env, policy.policy.config)
    before = before if task is None else with_sentence(before, task)
    set_seed(seed)
    try:
        with policy.inference(num_steps), contextlib.nullcontext() if late is None else executing(late):
            info = eval_policy_all(
                envs=envs,
                policy=policy.policy,
                env_preprocessor=before,
                env_postprocessor=after,
                preprocessor=policy.preprocessor,
                postprocessor=policy.postprocessor,
                n_episodes=settings.n_episodes,
                start_seed=seed,
                max_parallel_tasks=env.max_parallel_tasks,
            )
    finally:
        close_envs(envs)
    tasks = sorted(info["per_task"], key=lambda task: (task["task_group"], task["task_id"]))
    return {
        f"{task['task_group']}/{task['task_id']}": Episodes(
            [bool(success) for success in task["metrics"]["successes"]],
            [float(reward) for reward in task["metrics"]["max_rewards"]],
        )
        for task in tasks
    }
