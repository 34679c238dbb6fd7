#!/usr/bin/env bash
# Claims of the README, measured: bash tests/claims.sh [10-toy] [10-photos]
# Two runs at a time, one thread each. A finished run only reports, so the script can be started again.
# 10-photos wants BABYLM=the folder of text and captions, and FULL_EVAL=its evaluation_data/full_eval,
# UPOS=a table of parts of speech (columns word and upos).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
seeds=${SEEDS:-1 2 3}
mkdir -p out

go() {  # name, flags: a run in the background
  while (( $(jobs -rp | wc -l) >= 2 )); do wait -n; done
  python train.py --resume --out "out/$1" "${@:2}" > "out/$1.log" 2>&1 &
}
finish() {
  while (( $(jobs -rp | wc -l) > 0 )); do wait -n; done
}

# name, flags of a dense run, its steps: dense, both readings of the paper, chance, a mild choice of ours
methods() {
  local name=$1 dense=$2 steps=$3 seed by
  for seed in $seeds; do
    # shellcheck disable=SC2086
    set -- $dense --seed "$seed"
    go "$name-dense-$seed" "$@" --max_steps "$steps"
    go "$name-random-$seed" "$@" --max_steps "$steps" --elide random
    set -- "$@" --teacher "out/$name-text"
    for by in own target; do
      go "$name-$by-$seed" "$@" --max_steps "$steps" --elide_by "$by"
    done
    # as many steps as take about as long as the dense run
    go "$name-mild-$seed" "$@" --max_steps $((steps * 17 / 15)) --elide_by target --keep_ratio 0.8 \
      --elide_visible --elide_warmup 0
  done
  finish
}

for claim in "${@:-10-toy}"; do
  case $claim in
    10-toy)
      go toy-text --preset patches --curriculum caption-only --no-images --epochs 1
      finish
      methods toy "--preset patches --curriculum caption-only --epochs 2" 488
      python eval.py out/toy-{dense,own,target,random,mild}-? --tasks winoground,vqa ;;
    10-photos)
      [ -d data/babylm ] || python prepare_data.py babylm "$BABYLM" --words 200000 \
        --caption_sets flickr8k --vocab_size 4096
      go photos-text --preset laptop --no-images --curriculum caption-only
      finish
      methods photos "--preset laptop --curriculum caption-only --epochs 8 --init out/photos-text" 600
      python eval.py out/photos-{dense,own,target,random,mild}-? --tasks winoground,vqa \
        --babylm_eval "$FULL_EVAL" --upos "$UPOS" ;;
    *) echo "claims.sh: $claim: expected 10-toy or 10-photos" >&2; exit 2 ;;
  esac
done
