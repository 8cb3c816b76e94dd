#!/bin/sh
# SAMCancer as published, on a FLARE folder of partly labelled scans: five folds complete each other's labels, then both
# networks train on the completed ones.
#
#     sh training/recipes/paper.sh FLARE_FOLDER WORK        # called again, it goes on where it stopped
#
# Made for GPUs: PROCESSES=4 trains on four of them once the labels are complete. STEPS are those of one training; the paper's 80 epochs are
# 80 × slices / 16 of them.
set -eu
data=${1:?name a FLARE folder} work=${2:?name a folder to work in}
steps=${STEPS:?how many steps are a training}
run="torchrun --standalone --nproc-per-node ${PROCESSES:-1} -m training"

# Table 2 of the paper: Adam 5e-4, periodic decay, 16 windows a batch, He initialisation, no pre-trained weights; coronal
# slices as they are, each axis stretched to 256.
table2="--preset paper --plane coronal --resize stretch --slice-mm 0 --stacks 16 --targets 1 --schedule step --learning-rate 5e-4 \
    --device cuda --steps $steps"

python -m training pseudo-labels --data "$data" --out "$work/pseudo" --folds 5 $table2
$run hybrid --data "$work/pseudo/completed" --out "$work/hybrid" $table2
$run unet --data "$work/pseudo/completed" --out "$work/unet" --features 32 --patch 96 128 128 --steps "$steps" --device cuda

python -m training release --hybrid "$work/hybrid/hybrid.safetensors" --unet "$work/unet/unet.onnx" --out "$work/weights"
# On cases whose every lesion is annotated: with partial labels alone, true findings would count as false ones.
echo "now: python -m training calibrate --data COMPLETELY_LABELLED_FOLDER --weights $work/weights"
