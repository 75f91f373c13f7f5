#!/usr/bin/env bash
# PushT from end to end: train a small SmolVLA on human demonstrations, reflow it, and measure both in closed loop at several
# numbers of steps.
#
#     pip install . 'gym-pusht>=0.1.8,<0.2' 'pymunk<7'
#     DATASET_ROOT=path/to/pusht_pose bash examples/pusht/run.sh outputs/pusht
#     TASK=image DATASET=lerobot/pusht DEVICE=cuda bash examples/pusht/run.sh outputs/pusht_image
#
# TASK=pose (the default) has the block's pose in the state and an image of 32 pixels, and runs on a CPU. TASK=image is LeRobot's
# own PushT, 96 pixels and the agent's position, for a GPU. A stage is left out if its folder exists.
set -euo pipefail
give_up() { echo "run.sh: error: $1" >&2; exit 2; }
[ $# -eq 1 ] || give_up "Name one folder for the output, such as outputs/pusht."
examples=$(cd "$(dirname "$0")/.." && pwd) out=$1
task=${TASK:-pose} device=${DEVICE:-cpu} last=checkpoints/last/pretrained_model
export PYTHONPATH="$examples${PYTHONPATH:+:$PYTHONPATH}"

data=(--dataset.repo_id="${DATASET:-local/pusht}")
[ -z "${DATASET_ROOT:-}" ] || data+=(--dataset.root="$DATASET_ROOT")

case $task in
  pose)
    size=32 backbone="hidden_size=128, num_layers=3"
    teacher_steps=${TEACHER_STEPS:-8000} teacher_batch=128 student_steps=${STUDENT_STEPS:-1300}
    env=(--env.discover_packages_path=pusht --env.type=pusht_pose --env.image_every=8) ;;
  image)
    size=96 backbone="hidden_size=256, num_layers=3, vision_hidden_size=192, vision_num_layers=4"
    teacher_steps=${TEACHER_STEPS:-40000} teacher_batch=64 student_steps=${STUDENT_STEPS:-6000}
    env=(--env.type=pusht --env.observation_height=96 --env.observation_width=96) ;;
  *) give_up "TASK=$task is unknown; known are: pose, image." ;;
esac
[ -n "${DATASET:-}${DATASET_ROOT:-}" ] || give_up "Name the demonstrations: DATASET_ROOT=FOLDER, or DATASET=HUB_ID."
[ -z "${DATASET_ROOT:-}" ] || [ -e "$DATASET_ROOT/meta/info.json" ] || give_up "DATASET_ROOT=$DATASET_ROOT has no dataset."
python -c "import gym_pusht, smolvla_reflow" 2>/dev/null || give_up "Install what it needs: pip install . 'gym-pusht<0.2' 'pymunk<7'"

# A backbone that is small enough to train from scratch; the code is the real SmolVLA's.
[ -e "$out/backbone" ] || python -c "
from pathlib import Path
from smolvla_reflow.demo.backbone import write_backbone
write_backbone(Path('$out/backbone'), image_size=$size, $backbone)"

[ -e "$out/1rf" ] || lerobot-train "${data[@]}" --output_dir="$out/1rf" --steps="$teacher_steps" --batch_size=$teacher_batch \
  --policy.type=smolvla --policy.vlm_model_name="$out/backbone" --policy.load_vlm_weights=false --policy.num_vlm_layers=3 \
  --policy.resize_imgs_with_padding="[$size,$size]" --policy.chunk_size=16 --policy.n_action_steps=8 \
  --policy.freeze_vision_encoder=false --policy.train_expert_only=false --policy.push_to_hub=false \
  --policy.optimizer_lr=1e-3 --policy.scheduler_decay_lr=2.5e-5 \
  --policy.scheduler_warmup_steps=$((teacher_steps / 30)) --policy.scheduler_decay_steps="$teacher_steps" \
  --policy.device="$device" --num_workers=2 --log_freq=200 --save_freq=1000000

[ -e "$out/2rf" ] || smolvla-reflow-train "${data[@]}" --output_dir="$out/2rf" --steps="$student_steps" --batch_size=64 \
  --reflow.teacher_path="$out/1rf/$last" --policy.freeze_vision_encoder=true --policy.train_expert_only=true \
  --policy.optimizer_lr=5e-4 --policy.device="$device" --num_workers=2 --log_freq=100 --save_freq=1000000

# Set SENTENCE if the demonstrations have a sentence ("Push the T-shaped block ..."): the environment shows none.
if [ ! -e "$out/evaluation/report.md" ] || [ -e "$out/evaluation/unfinished" ]; then
  episodes=${EPISODES:-100}
  smolvla-reflow-eval "${data[@]}" --output_dir="$out/evaluation" --policy.device="$device" \
    --policy.path="$out/2rf/$last" --teacher_path="$out/1rf/$last" --num_steps='[1,2,10]' --num_frames=128 --seed=1000 \
    --decide_by=best_reward "${env[@]}" ${SENTENCE:+--env_task="$SENTENCE"} \
    --eval.n_episodes="$episodes" --eval.batch_size=$((episodes < 50 ? episodes : 50)) --eval.use_async_envs=false
fi
