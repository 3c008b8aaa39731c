#!/usr/bin/env bash
# All that only a GPU can show, within ten minutes on one card: first whether the kernels are right,
# then what they cost beside their rivals, side by side in one run. Where there are two cards, a
# record over both is compared with that over one; else pytest counts that as skipped.
#
#   benchmarks/gpu_round.sh [FOLDER]      # what was printed is kept there, by default gpu_round/
#   benchmarks/gpu_round.sh --dry-run [FOLDER]
#
# liger-kernel and cut-cross-entropy, pinned, are installed into FOLDER if a package index can be
# reached, and take part if their kernels run here. The last line is one JSON
# object: each row of the table of what is to be reached, with the ratio found, and all figures. A
# part that fails or takes too long is named in it, the others go on, and the exit code is 1.
#
# With --dry-run every part runs on the CPU at small sizes, the kernels by Triton's interpreter, to
# show that nothing but a GPU is missing. Its figures mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
dry=0
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
folder=${1:-gpu_round}
python=${PYTHON:-python}
export PYTHONPATH=$PWD TRITON_INTERPRET=$dry LRMC_TRITON=1

if [ $dry = 0 ] &&
  ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_round.sh measures on an NVIDIA GPU, but torch sees none here;" \
    "run it on a machine with one, with a torch build for CUDA" >&2
  exit 2
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

part() { # NAME SECONDS COMMAND...: what it prints goes to FOLDER/NAME.txt
  local name=$1 limit=$(($2 * (1 + 9 * dry))) code=0  # a dry run may share its machine
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$folder/$name.txt" 2>&1 || code=$?
  echo "$code" >"$folder/$name.exit"
  tail -n 40 "$folder/$name.txt" | grep -v '^{' || true
}

bench=benchmarks
sizes="1024,576,49152,24 2048,576,49152,24 1024,640,262144,24 512,2560,151936,32"
small="16,576,49152,24 128,576,49152,24 128,64,1000,400 256,2560,151936,400"
device="--device cuda"
head="--repeats 9 --dtype bfloat16 --sizes $sizes $small"
wide="--repeats 5"
moclip= tests="-n 12"
step="--rounds 1 --steps 8"
make= qwen="--steps 2 --length 1024" record=
model=demo
if [ $dry = 1 ]; then
  device="--device cpu" tests=--collect-only make=--small record="--rows 2 --length 32"
  head="--repeats 1 --dtype bfloat16 --sizes 4,20,40,4 20,16,40,38"
  wide="--repeats 1 --sizes 4,20,40,4"
  moclip="--repeats 1 --layers 1 --vocabulary 64"
  step="--rounds 1 --steps 1 --batch-size 2 --length 24"
  qwen="--steps 1 --batch-size 2 --length 24"
  model=$folder/qwen
fi
# $sizes and the like are several words.
# shellcheck disable=SC2086
{
  part peers 30 "$python" $bench/fused_losses.py install "$folder/peers"
  export PYTHONPATH=$PWD:$folder/peers
  part fused 20 "$python" $bench/fused_losses.py check $device --dtype bfloat16
  part qwen_model 40 "$python" $bench/qwen_on_gpu.py make "$folder/qwen" $make
  part correctness 150 "$python" -m pytest -q $tests -p no:cacheprovider \
    tests/method/test_cuda.py tests/method/fast/test_fused_loss.py \
    tests/method/fast/test_dense_loss.py tests/method/fast/test_moclip_launch.py \
    tests/method/test_prepared_batches.py tests/record/test_spread.py
  part head 70 "$python" $bench/restricted_head.py $device $head
  part head_float32 40 "$python" $bench/restricted_head.py $device $wide
  part moclip 40 "$python" $bench/moclip_step.py $device $moclip
  part step 60 "$python" $bench/training_step.py $device $step --model "$model" \
    --micro-batches 1 --variants trainer default
  part qwen_step 100 "$python" $bench/training_step.py $device --precision bf16 --rounds 1 $qwen \
    --micro-batches 1 --model "$folder/qwen" --variants trainer default
  part qwen_record 50 "$python" $bench/qwen_on_gpu.py record "$folder/qwen" $record
}
rm -rf "$folder/qwen" "$folder/peers"
exec "$python" $bench/gpu_summary.py "$folder"
