#!/usr/bin/env bash
# The whole path on drawn pictures: data, two networks, EMA, guidance, scores. Results go to demo-out/ in the checkout,
# or to the folder given as argument. Run again, it goes on where it stopped and repeats nothing that is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
out=${1:-demo-out}

# Chosen on seeds 1,000,000 and above; the pictures and scores below are of other seeds.
main_ema=0.050
guide_ema=0.100
sampling=(--steps 8 --sigma_min 0.06) # the best for the main network alone
guidance=(--guidance 1.6 --interval 0.25,inf)
num=400
score_seeds=10000,20000 # first of --num seeds each

say() {
    printf '\n== %s (%d s)\n' "$1" "$SECONDS"
}

run() {
    printf '$ python %s\n' "$*"
    "$python" "$@"
}

network() { # network main 0.100: the snapshot that reconstruct_phema.py made
    ls "$out/ema/$1"/*-"$2".safetensors
}

mkdir -p "$out"
SECONDS=0

say "Drawing pictures of ten kinds: a training set, and fresh ones to know how far real is from real"
[[ -d $out/pictures ]] || run scripts/draw_pictures.py --dest "$out/pictures" --num 20000 --seed 0
[[ -d $out/fresh ]] || run scripts/draw_pictures.py --dest "$out/fresh" --num 5000 --seed 1
[[ -e $out/pictures.zip ]] || run scripts/dataset_tool.py convert --source "$out/pictures" --dest "$out/pictures.zip"

say "Training the main network"
run train.py --preset pictures32 --data "$out/pictures.zip" --outdir "$out/train-main"
say "Training the guide: smaller, and for less time"
run train.py --preset pictures32-guide --data "$out/pictures.zip" --outdir "$out/train-guide"

say "Rebuilding the EMA lengths that suit guidance"
run reconstruct_phema.py --indir "$out/train-main" --outdir "$out/ema/main" --outstd "$main_ema" --skip
run reconstruct_phema.py --indir "$out/train-guide" --outdir "$out/ema/guide" --outstd "$guide_ema" --skip
alone=(--net "$(network main "$main_ema")" "${sampling[@]}")
guided=("${alone[@]}" --gnet "$(network guide "$guide_ema")" "${guidance[@]}")

say "Drawing the same seeds without and with the guide"
run generate.py "${alone[@]}" --seeds 0-79 --balanced --outdir "$out/unguided"
run generate.py "${guided[@]}" --seeds 0-79 --balanced --outdir "$out/autoguided"

say "Scoring both, and fresh real pictures, against the training set"
[[ -e $out/reference.npz ]] ||
    run calculate_metrics.py ref --data "$out/pictures.zip" --dest "$out/reference.npz" --metrics fd_random
score=(--ref "$out/reference.npz" --metrics fd_random --num "$num")
[[ -e $out/real.json ]] ||
    run calculate_metrics.py calc --images "$out/fresh" "${score[@]}" --seed 0,1 --record "$out/real.json"
[[ -e $out/unguided.json ]] ||
    run calculate_metrics.py gen "${alone[@]}" "${score[@]}" --seed "$score_seeds" --record "$out/unguided.json"
[[ -e $out/autoguided.json ]] ||
    run calculate_metrics.py gen "${guided[@]}" "${score[@]}" --seed "$score_seeds" --record "$out/autoguided.json"

say "The outcome"
run scripts/demo_report.py --out "$out"
say "Done"
