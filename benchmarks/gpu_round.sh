#!/usr/bin/env bash
# All that only a GPU can show, within ten minutes on one card: first whether the kernels are right,
# then what they cost beside their rivals, side by side in one run.
#
#   benchmarks/gpu_round.sh [FOLDER]      # what was printed is kept there, by default gpu_round/
#
# liger-kernel and cut-cross-entropy take part where they are installed. The last line is one JSON
# object: each row of the table of what is to be reached, with the ratio found, and all figures. A
# part that fails or takes too long is named in it, the others go on, and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu_round}
python=${PYTHON:-python}
export PYTHONPATH=$PWD TRITON_INTERPRET=0 LRMC_TRITON=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_round.sh measures on an NVIDIA GPU, but torch sees none here;" \
    "run it on a machine with one, with a torch build for CUDA" >&2
  exit 2
fi
mkdir -p "$folder"

part() { # NAME SECONDS COMMAND...: what it prints goes to FOLDER/NAME.txt
  local name=$1 limit=$2 code=0
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$folder/$name.txt" 2>&1 || code=$?
  echo "$code" >"$folder/$name.exit"
  tail -n 40 "$folder/$name.txt" | grep -v '^{' || true
}

bench=benchmarks
sizes="1024,576,49152,24 2048,576,49152,24 1024,640,262144,24 512,2560,151936,32"
small="16,576,49152,24 128,576,49152,24 128,64,1000,400"
part correctness 170 "$python" -m pytest -q -n 6 -p no:cacheprovider tests/method/test_cuda.py \
  tests/method/fast/test_fused_loss.py tests/method/fast/test_moclip_launch.py \
  tests/method/test_prepared_batches.py
part head 80 "$python" $bench/restricted_head.py --device cuda --dtype bfloat16 --repeats 9 \
  --sizes $sizes $small
part head_float32 50 "$python" $bench/restricted_head.py --device cuda --repeats 5
part moclip 50 "$python" $bench/moclip_step.py --device cuda
part step 70 "$python" $bench/training_step.py --device cuda --rounds 1 --steps 8 \
  --micro-batches 1 --variants trainer default
part qwen_model 60 "$python" $bench/qwen_on_gpu.py make "$folder/qwen"
part qwen_step 100 "$python" $bench/training_step.py --device cuda --precision bf16 --rounds 1 \
  --steps 2 --length 1024 --micro-batches 1 --model "$folder/qwen" --variants trainer default
part qwen_record 60 "$python" $bench/qwen_on_gpu.py record "$folder/qwen"
rm -rf "$folder/qwen"
exec "$python" $bench/gpu_summary.py "$folder"
