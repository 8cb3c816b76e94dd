#!/bin/sh
# Weights like those that ship, `small` (whose own runs the log tells): both networks on phantoms, two cores, no GPU.
#
#     sh training/recipes/small.sh WORK [DATA]     # about four and a half hours, the sum of its parts; called again, it goes on where it stopped
#
# DATA, a folder with sarcoma scans as sts.py reads it, adds those. WORK/weights is then a folder for
# `sh predict.sh --weights WORK/weights IN OUT`.
set -eu
work=${1:?name a folder to work in}
run="python -m training"
# glibc gives memory back after every step and faults it in again, page by page: a fifth of the time
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=500000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# Patients to learn from, as the networks see them, more for a second round, and others to choose the thresholds on.
[ -e "$work/phantoms/cases.csv" ] || $run phantoms --out "$work/phantoms" --count 743 --seed 1000 --network-grid --jobs 2
[ -e "$work/more/cases.csv" ] || $run phantoms --out "$work/more" --count 480 --seed 4000 --network-grid --jobs 2
[ -e "$work/held_out/cases.csv" ] || $run phantoms --out "$work/held_out" --count 48 --seed 2000 --network-grid --jobs 2
data="$work/phantoms"
if [ $# -gt 1 ]; then
    [ -e "$work/sarcomas/cases.csv" ] || python "$(dirname "$0")/sts.py" "$2" "$work/sarcomas" --crops 8
    data="$data $work/sarcomas"
fi

# Many steps on small patches teach what a lesion is; batch norm lets larger ones finish the work.
# shellcheck disable=SC2086  # one word a folder
$run unet --data $data --out "$work/unet" --minutes 50 --jobs 2 \
    --batch 3 --small-share 0.7 --small 32 64 64 --patch 48 96 96 --validation 8

# The CNN by itself on crops around lesions, many times as fast as whole slices; then the whole network. The classifier's
# loss counts 1.0, not the paper's 0.1, which suits 80 epochs.
# shellcheck disable=SC2086
$run hybrid --data $data --out "$work/hybrid" --minutes 80 --jobs 2 --learning-rate 2e-3 \
    --crop-share 0.5 --crop-stacks 6 --stacks 2 --targets 4 --classifier-weight 1 --validation 8 --validations 3

# Both go on with other patients, at a lower rate. They see lesions by now, which need not weigh ten times as much.
$run unet --data "$work/more" --out "$work/unet_2" --weights "$work/unet/unet.safetensors" --minutes 40 --jobs 2 \
    --learning-rate 3e-3 --lesion-weight 3 --batch 3 --small-share 0.5 --small 32 64 64 --patch 48 96 96 --validation 8
$run hybrid --data "$work/more" --out "$work/hybrid_2" --weights "$work/hybrid/hybrid.safetensors" --minutes 45 --jobs 2 \
    --learning-rate 1.2e-3 --lesion-weight 3 --crop-share 0.45 --crop-stacks 6 --stacks 2 --targets 4 \
    --classifier-weight 1 --validation 8 --validations 3

$run release --hybrid "$work/hybrid_2/hybrid.safetensors" --unet "$work/unet_2/unet.onnx" --out "$work/weights"
$run calibrate --data "$work/held_out" --weights "$work/weights"
