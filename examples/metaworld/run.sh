#!/usr/bin/env bash
# Meta-World from end to end: record, train a small SmolVLA, reflow it, and see in closed loop what each number of steps gives.
#
#     pip install . 'metaworld==3.0.0' 'mujoco<3.4'
#     bash examples/metaworld/run.sh outputs/metaworld
#
# On 2 CPU cores: 15 minutes to record, 10 to train, 15 to reflow, 45 to evaluate, mostly rendering. With a
# GPU, set MUJOCO_GL=egl and DEVICE=cuda. Each stage is left out if its folder exists.
set -euo pipefail
here=$(dirname "$0") out=${1:?Give a folder for the output.}
export MUJOCO_GL=${MUJOCO_GL:-osmesa} LP_NUM_THREADS=${LP_NUM_THREADS:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
device=${DEVICE:-cpu} last=checkpoints/last/pretrained_model
data=(--dataset.repo_id=smolvla-reflow/metaworld --dataset.root="$out/dataset")
loader=(--policy.device="$device" --batch_size=32 --num_workers=2 --log_freq=200 --save_freq=1000000)

[ -e "$out/dataset" ] || python "$here/record.py" --output_dir="$out/dataset" --episodes=50

# The real SmolVLA code with a backbone small enough to train on a laptop.
[ -e "$out/backbone" ] || python -c "
from pathlib import Path
from smolvla_reflow.demo.backbone import write_backbone
write_backbone(Path('$out/backbone'), image_size=64)"

[ -e "$out/1rf" ] || lerobot-train "${data[@]}" "${loader[@]}" --output_dir="$out/1rf" --steps=3000 \
  --policy.type=smolvla --policy.vlm_model_name="$out/backbone" --policy.load_vlm_weights=false \
  --policy.num_vlm_layers=2 --policy.resize_imgs_with_padding='[64,64]' \
  --policy.chunk_size=16 --policy.n_action_steps=16 --policy.max_action_dim=4 --policy.max_state_dim=4 \
  --policy.freeze_vision_encoder=false --policy.train_expert_only=false --policy.push_to_hub=false \
  --policy.optimizer_lr=2e-3 --policy.scheduler_decay_lr=5e-5 \
  --policy.scheduler_warmup_steps=100 --policy.scheduler_decay_steps=3000

[ -e "$out/2rf" ] || smolvla-reflow-train "${data[@]}" "${loader[@]}" --output_dir="$out/2rf" --steps=3000 \
  --reflow.teacher_path="$out/1rf/$last" --policy.freeze_vision_encoder=true --policy.train_expert_only=true \
  --policy.optimizer_lr=1e-3

[ -e "$out/evaluation" ] || smolvla-reflow-eval "${data[@]}" --output_dir="$out/evaluation" \
  --policy.path="$out/2rf/$last" --teacher_path="$out/1rf/$last" --policy.device="$device" \
  --num_steps='[1,2,10]' --num_frames=32 --seed=1000 \
  --env.type=metaworld --env.task=button-press-wall-v3 --eval.n_episodes="${EPISODES:-10}" --eval.batch_size=1
