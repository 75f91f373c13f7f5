#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in one go; what it prints belongs into README.md, with the card's name.
#
#     bash examples/benchmarks/gpu.sh outputs/gpu
#
# The cost of a step at three batch sizes, in bfloat16 autocast, plain and compiled; the latency of a chunk; pairs; the demo's
# two trainings on the card; and the tests that need one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?Name a folder for the results, such as outputs/gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/card.txt"
for compile in false true; do
  python "$here/step_cost.py" --device=cuda --batch_sizes='[2,8,32]' --autocast=true --compile_model=$compile \
    | tee "$out/step_cost_compile_$compile.txt"
done
python "$here/chunk_latency.py" --device=cuda | tee "$out/chunk_latency.txt"
python "$here/pairs_cost.py" --device=cuda | tee "$out/pairs_cost.txt"
# The demo's two trainings, on the card; speed is not the point of a network this small.
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
