#!/usr/bin/env bash
# The complete path on small generated pictures: data, two networks, EMA, guidance, scores; 4 to 15 minutes on 2 cores.
#   bash scripts/demo.sh                 results in demo-out/
#   bash scripts/demo.sh FOLDER          results in FOLDER
#   bash scripts/demo.sh --tiny          only tests that every step runs, in a minute or two; results in demo-out-tiny/
# Run the same command again to resume; complete steps are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

num_pictures=20000
num_fresh=5000
train_options="" # several words, no quotes below
# Chosen with seeds from 1,000,000 on; the pictures and scores below use other seeds.
main_ema=0.050
guide_ema=0.100
sampling=(--steps 8 --sigma_min 0.06) # the best for the main network alone
guidance=(--guidance 1.6 --interval 0.25,inf)
num_scored=400
score_seeds=10000,20000 # first of --num seeds each
if [[ ${1:-} == --tiny ]]; then
    shift
    set -- "${1:-demo-out-tiny}"
    num_pictures=200
    num_fresh=100
    train_options="--duration 2000 --batch 50 --snapshot 1000 --status 1000 --samples 0 --workers 0"
    num_scored=24
fi
out=${1:-demo-out}

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

say "Drawing pictures of ten kinds: a training set, and fresh ones to measure how far real is from real"
[[ -d $out/pictures ]] || run scripts/draw_pictures.py --dest "$out/pictures" --num "$num_pictures" --seed 0
[[ -d $out/fresh ]] || run scripts/draw_pictures.py --dest "$out/fresh" --num "$num_fresh" --seed 1
[[ -e $out/pictures.zip ]] || run scripts/dataset_tool.py convert --source "$out/pictures" --dest "$out/pictures.zip"

say "Training the main network"
run train.py --preset pictures32 --data "$out/pictures.zip" --outdir "$out/train-main" $train_options
say "Training the guide: a smaller network, for less time"
run train.py --preset pictures32-guide --data "$out/pictures.zip" --outdir "$out/train-guide" $train_options

say "Rebuilding the EMA lengths that work best with guidance"
run reconstruct_phema.py --indir "$out/train-main" --outdir "$out/ema/main" --outstd "$main_ema" --skip
run reconstruct_phema.py --indir "$out/train-guide" --outdir "$out/ema/guide" --outstd "$guide_ema" --skip
alone=(--net "$(network main "$main_ema")" "${sampling[@]}")
guided=("${alone[@]}" --gnet "$(network guide "$guide_ema")" "${guidance[@]}")

say "Generating the same seeds without and with guidance"
run generate.py "${alone[@]}" --seeds 0-79 --balanced --outdir "$out/unguided"
run generate.py "${guided[@]}" --seeds 0-79 --balanced --outdir "$out/autoguided"

say "Scoring both, and pictures of the training set, against fresh pictures: ImageNet features, which see content"
[[ -e $out/reference.npz ]] ||
    run calculate_metrics.py ref --data "$out/fresh" --dest "$out/reference.npz" --metrics fd_lite0,fd_random
score=(--ref "$out/reference.npz" --metrics fd_lite0,fd_random --num "$num_scored")
[[ -e $out/real.json ]] ||
    run calculate_metrics.py calc --images "$out/pictures.zip" "${score[@]}" --seed 0,1 --record "$out/real.json"
[[ -e $out/unguided.json ]] ||
    run calculate_metrics.py gen "${alone[@]}" "${score[@]}" --seed "$score_seeds" --record "$out/unguided.json"
[[ -e $out/autoguided.json ]] ||
    run calculate_metrics.py gen "${guided[@]}" "${score[@]}" --seed "$score_seeds" --record "$out/autoguided.json"

say "Results"
run scripts/demo_report.py --out "$out"
say "Done"
