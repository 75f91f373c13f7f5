#!/usr/bin/env bash
# Take all GPU measurements in one go. Copy the output into README.md, with the card's name.
#
#     bash examples/benchmarks/gpu.sh outputs/gpu
#
# Step cost at three batch sizes in bfloat16 autocast, in float32 and compiled; latency of a chunk; stored pairs; the demo's two
# trainings on the card; the tests.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?Name a folder for the results, such as outputs/gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/card.txt"
step_cost() {  # name of the output file, flags...
  python "$here/step_cost.py" --device=cuda --steps=7 "${@:2}" | tee "$out/step_cost_$1.txt"
}
step_cost autocast --batch_sizes='[2,8,32]' --autocast=true
step_cost float32 --batch_sizes='[32]' --variants='[standard, naive, reflow, by four]'
for mode in reduce-overhead max-autotune; do
  step_cost "$mode" --batch_sizes='[8]' --variants='[standard, reflow]' --autocast=true --compile_model=true --compile_mode=$mode
done
python "$here/chunk_latency.py" --device=cuda --repeats=20 | tee "$out/chunk_latency.txt"
python "$here/pairs_cost.py" --device=cuda --batch_size=32 --num_pairs=100000 --steps=10 | tee "$out/pairs_cost.txt"
# The demo's two trainings, on the card. They show that training works, since a network this small says nothing about speed.
python - "$out/demo" <<'EOF'
import sys
from pathlib import Path

from smolvla_reflow.demo.backbone import write_backbone
from smolvla_reflow.demo.flags import one_rectified_flow_flags, reflow_flags
from smolvla_reflow.demo.run import run_training
from smolvla_reflow.demo.task import DEMONSTRATIONS, write_dataset

folder = Path(sys.argv[1]).resolve()
write_dataset(folder / "dataset", DEMONSTRATIONS)
write_backbone(folder / "backbone")
for name, flags in (("lerobot-train", one_rectified_flow_flags(folder)), ("smolvla-reflow-train", reflow_flags(folder))):
    on_card = ["--policy.device=cuda" if flag.startswith("--policy.device=") else flag for flag in flags]
    run_training(name, on_card, folder / f"{name}.log")
EOF
(cd "$here/../.." && pytest)
