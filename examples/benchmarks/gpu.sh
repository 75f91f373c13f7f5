#!/usr/bin/env bash
# Take all GPU measurements in one go, in the order of their worth, in under ten minutes. Copy the output into README.md, with the
# card's name.
#
#     bash examples/benchmarks/gpu.sh outputs/gpu
#
# A recorded solve changes nothing; cost of a step; latency of a chunk, compiled too; stored pairs; the tests that need a GPU.
# A part that fails or takes too long is left out, and the next one begins.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?Name a folder for the results, such as outputs/gpu}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/card.txt"
part() {  # name of the output file, most seconds, command...
  local start=$SECONDS
  timeout "$2" "${@:3}" 2>"$out/$1.log" | tee "$out/$1.txt"
  echo "[$1: exit ${PIPESTATUS[0]}, $((SECONDS - start)) s]" | tee -a "$out/$1.txt"
}
graphs='[standard, reflow, cuda graph, "by four, cuda graph"]'
part graph_check 200 python "$here/graph_check.py" --device=cuda
part step_cost_float32 90 python "$here/step_cost.py" --device=cuda --steps=7 --batch_sizes='[32]' --variants="$graphs" --memory=false
part step_cost_autocast 90 python "$here/step_cost.py" --device=cuda --steps=7 --batch_sizes='[32]' --variants="$graphs" --memory=false \
  --autocast=true
part chunk_latency 40 python "$here/chunk_latency.py" --device=cuda --repeats=20
part pairs_cost 40 python "$here/pairs_cost.py" --device=cuda --batch_size=32 --num_pairs=20000 --steps=10 --cuda_graph=true
part gpu_tests 40 pytest "$here/../../tests/method/test_graph.py" "$here/../../tests/method/test_precision.py" -k 'gpu or cuda'
part chunk_latency_compiled 100 python "$here/chunk_latency.py" --device=cuda --repeats=20 --compile_model=true \
  --compile_mode=reduce-overhead --num_steps='[10,1]'
