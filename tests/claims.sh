#!/usr/bin/env bash
# Claims of the README, measured: bash tests/claims.sh [10-toy] [10-photos] [10-why]
# Two runs at a time, one thread each. A finished run only reports, so the script can be started again.
# 10-photos wants BABYLM=the folder of text and captions, and FULL_EVAL=its evaluation_data/full_eval,
# UPOS=a table of parts of speech (columns word and upos). 10-why draws a picture of runs of the other two.
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

# name, teacher, steps, flags of a dense run: dense, both readings of the paper, chance, a mild choice of ours
methods() {
  local name=$1 teacher=$2 steps=$3 dense=$4 seed by
  for seed in $seeds; do
    # shellcheck disable=SC2086
    set -- $dense --seed "$seed"
    go "$name-dense-$seed" "$@" --max_steps "$steps"
    go "$name-random-$seed" "$@" --max_steps "$steps" --elide random
    set -- "$@" --teacher "$teacher"
    for by in own target; do
      go "$name-$by-$seed" "$@" --max_steps "$steps" --elide_by "$by"
    done
    # on photos as many steps as take about as long as the dense run
    go "$name-mild-$seed" "$@" --max_steps $((steps * 17 / 15)) --elide_by target --keep_ratio 0.8 \
      --elide_visible --elide_warmup 0
  done
  finish
}

toy="--preset patches --curriculum caption-only --epochs 2"
photos="--preset laptop --curriculum caption-only --epochs 8"
for claim in "${@:-10-toy}"; do
  case $claim in
    10-toy)
      go toy-text --preset patches --curriculum caption-only --no-images --epochs 1
      finish
      methods toy out/toy-text 488 "$toy"
      methods toyinit out/toy-text 488 "$toy --init out/toy-text"
      python eval.py out/toy{,init}-{dense,own,target,random,mild}-? --tasks winoground,vqa ;;
    10-photos)
      [ -d data/babylm ] || python prepare_data.py babylm "$BABYLM" --words 200000 \
        --caption_sets flickr8k --vocab_size 4096
      go photos-text --preset laptop --no-images --curriculum caption-only
      finish
      methods photos out/photos-text 600 "$photos"
      methods photosinit out/photos-text 600 "$photos --init out/photos-text"
      python eval.py out/photos{,init}-{dense,own,target,random,mild}-? --tasks winoground,vqa \
        --babylm_eval "$FULL_EVAL" --upos "$UPOS" ;;
    10-why)
      rm -rf out/{toy,photos}-begin  # resumed, they would not stop
      go toy-begin $toy --max_steps 488 --stop_after 100
      go photos-begin $photos --max_steps 600 --stop_after 100
      finish
      python tests/claims.py why out/why.png out/{toy,photos}-{begin,dense-1}/last.pt ;;
    *) echo "claims.sh: $claim: expected 10-toy, 10-photos or 10-why" >&2; exit 2 ;;
  esac
done
