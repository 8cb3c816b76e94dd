#!/bin/sh
# Weights like those that ship, `small` (whose own runs the log tells): both networks on phantoms, then on phantoms and
# real scans; two cores, no GPU.
#
#     sh training/recipes/small.sh WORK DATA     # about seven hours, the sum of its parts; called again, it goes on where it stopped
#
# DATA is a folder with real scans as real.py reads it. WORK/weights is then a folder for
# `sh predict.sh --weights WORK/weights IN OUT`.
set -eu
work=${1:?name a folder to work in} data=${2:?name the folder of the real scans}
run="python -m training"
# glibc gives memory back after every step and faults it in again, page by page: a fifth of the time
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=500000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# Patients to learn from, as the networks see them, others for each round, and others to choose the thresholds on, as clinics scan them
# in slices of 2.5 mm and more.
phantoms() {
    folder=$1 count=$2 seed=$3
    shift 3
    $run phantoms --out "$work/$folder" --count "$count" --seed "$seed" --jobs 2 "$@"
}
phantoms phantoms_1 743 1000 --network-grid
phantoms phantoms_2 480 4000 --network-grid
phantoms phantoms_3 540 5000 --network-grid
phantoms phantoms_clinical 100 2200 --healthy-share 0.5 --thinnest-mm 2.5
[ -e "$work/real/abdomen/cases.csv" ] || python "$(dirname "$0")/real.py" "$data" "$work/real"

# Many steps on small patches teach what a lesion is; batch norm lets larger ones finish the work.
patches="--jobs 2 --batch 3 --small 32 64 64 --patch 48 96 96"
# shellcheck disable=SC2086  # one word a setting
$run unet --data "$work/phantoms_1" --out "$work/unet_1" --minutes 50 $patches --small-share 0.7 --validation 8

# The CNN by itself on crops around lesions, many times as fast as whole slices; then the whole network. The classifier's
# loss counts 1.0, not the paper's 0.1, which suits 80 epochs.
slices="--jobs 2 --crop-stacks 6 --stacks 2 --targets 4 --classifier-weight 1 --validations 3"
# shellcheck disable=SC2086
$run hybrid --data "$work/phantoms_1" --out "$work/hybrid_1" --minutes 80 $slices --learning-rate 2e-3 --crop-share 0.5 \
    --validation 8

# Both go on with other patients, at a lower rate. They see lesions by now, which need not weigh ten times as much.
# shellcheck disable=SC2086
$run unet --data "$work/phantoms_2" --out "$work/unet_2" --weights "$work/unet_1/unet.safetensors" --minutes 40 $patches \
    --learning-rate 3e-3 --lesion-weight 3 --small-share 0.5 --validation 8
# shellcheck disable=SC2086
$run hybrid --data "$work/phantoms_2" --out "$work/hybrid_2" --weights "$work/hybrid_1/hybrid.safetensors" --minutes 45 \
    $slices --learning-rate 1.2e-3 --lesion-weight 3 --crop-share 0.45 --validation 8

# And once more, now with real tumours and a real scanner's texture in a fixed share of every batch.
third="--data $work/phantoms_3 $work/real/implants $work/real/sarcomas --shares 0.6 0.08 0.32 --validation 18 \
    --lesion-weight 3 --frozen-norms 0.2"
# shellcheck disable=SC2086
$run unet $third --out "$work/unet_3" --weights "$work/unet_2/unet.safetensors" --minutes 45 $patches \
    --learning-rate 3e-3 --small-share 0.35
# shellcheck disable=SC2086
$run hybrid $third --out "$work/hybrid_3" --weights "$work/hybrid_2/hybrid.safetensors" --minutes 50 $slices \
    --learning-rate 1.2e-3 --crop-share 0.45

$run release --hybrid "$work/hybrid_3/hybrid.safetensors" --unet "$work/unet_3/unet.onnx" --out "$work/weights"
$run calibrate --data "$work/phantoms_clinical" "$work/real/sarcomas_held_out" --weights "$work/weights"
