#!/usr/bin/env bash
# The claims of the README, measured: bash tests/claims.sh [CLAIM ...], by default those of the toy world.
# .github/results.md is made of what it prints. Two runs at a time, one thread each; a finished run only
# reports, so the script can be started again. *-photos want BABYLM=the folder of text and captions,
# FULL_EVAL=its evaluation_data/full_eval, UPOS=a table of parts of speech (columns word and upos).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
mkdir -p out

go() {  # name, flags: a run in the background
  while (( $(jobs -rp | wc -l) >= 2 )); do wait -n; done
  python train.py --resume --out "out/$1" "${@:2}" > "out/$1.log" 2>&1 &
}
runs() {  # the same with every seed
  for seed in ${SEEDS:-1 2 3}; do go "$1-$seed" "${@:2}" --seed "$seed"; done
}
finish() {
  while (( $(jobs -rp | wc -l) > 0 )); do wait -n; done
}
table() {  # columns, runs
  finish
  python tests/claims.py table "$@"
}
data() {  # name, arguments of prepare_data.py
  [ -d "data/$1" ] || python prepare_data.py "${@:2}" --out "data/$1"
}
score() {  # runs on photos, whose data bring no evaluation sets
  finish
  python eval.py "$@" --tasks winoground,vqa --babylm_eval "$FULL_EVAL" --upos "$UPOS" > out/score.log
}
published() {  # name, steps, flags of a dense run: every token, chance, the paper
  runs "$1-dense" $3 --max_steps "$2"
  runs "$1-random" $3 --max_steps "$2" --elide random
  runs "$1-target" $3 --max_steps "$2" --elide_by target --teacher "out/${1%init}-text"
}
elide() {  # and the paper's other reading, a mild choice of ours: on photos as long as the dense run
  published "$@"
  local teacher="--teacher out/${1%init}-text"
  runs "$1-own" $3 --max_steps "$2" $teacher --elide_by own
  runs "$1-mild" $3 --max_steps $(($2 * 17 / 15)) $teacher --keep_ratio 0.8 --elide_visible \
    --elide_warmup 0
}

toy="--preset patches --curriculum caption-only --epochs 2"
photos="--preset laptop --curriculum caption-only --epochs 8"
small="--n_layer 2 --max_steps 450 --eval_interval 1000"
loss=val_loss_caption,val_loss_text,visual_information_captured
words="val_loss_caption,loss of content,loss of function,winoground,vqa"
gates="gate of function,gate of content"
toy_text() {  # the teacher, which never sees a picture
  data toy16 toy --n_image_token 16
  go toy-text --preset patches --curriculum caption-only --no-images --epochs 1
  finish
}
photos_text() {
  data babylm babylm "$BABYLM" --words 200000 --caption_sets flickr8k --vocab_size 4096
  go photos-text --preset laptop --no-images --curriculum caption-only
  finish
}

python -c "import torch; print('torch', torch.__version__, torch.backends.cpu.get_cpu_capability())"
(( $# )) || set -- 1 2 3 4 5 6 9 10
for claim; do
  echo; echo "### $claim"; echo
  case $claim in
    1)  # also 7, 8 and 11
      data toy toy
      toy_text
      runs toy
      finish
      python eval.py out/toy-? --teacher out/toy-text > out/score.log
      table "$gates,$loss,rho teacher,vqa: image decides,vqa: image decides blind" out/toy-?
      python tests/claims.py explain out/toy-? ;;
    2)
      data toy toy
      runs soft-token $small
      for g in soft-feature none hard-token hard-feature; do runs $g $small --gate $g; done
      table "$loss,winoground" out/{soft-token,soft-feature,none,hard-token,hard-feature}-? ;;
    3)
      data toy toy
      runs soft-token $small
      for m in film dyintra; do
        for at in cross text image; do runs $m-$at $small --modulation $m --modulate_at $at; done
      done
      runs channel $small --channel_attention
      table "$loss,blimp,supplement,ewok,winoground,vqa" out/{soft-token,film-*,dyintra-*,channel}-? ;;
    4)  # the same pixels and kind of encoder: a vector of all, or one for each of 16 patches
      toy_text
      [ -d data/toy16-flat ] || python tests/claims.py flat data/toy16 data/toy16-flat
      runs patches --preset patches --epochs 1
      runs flat --preset patches --epochs 1 --data data/toy16-flat --n_image_token 1
      table "$loss,ewok,winoground,$gates" out/{patches,flat}-? ;;
    5)
      data toy toy
      runs soft-token $small
      for c in clip lcg; do runs $c $small --contrastive $c; done
      table "$loss,blimp,supplement,ewok,winoground,vqa" out/{soft-token,clip,lcg}-? ;;
    6)  # half of the pictures, so that a caption epoch is four text epochs long
      data toy-20k toy --n_image 20000
      for order in mixed alternate; do
        runs $order --data data/toy-20k --n_layer 2 --mix 4 --curriculum $order --eval_interval 1000 \
          --keep_checkpoints
      done
      table "$loss,blimp,winoground" out/{mixed,alternate}-?
      python tests/claims.py swing out/alternate-? ;;
    9)
      data toy toy
      data toy-10k toy --n_image 10000
      runs toy
      runs shorter --epochs 1
      runs fewer --data data/toy-10k --epochs 8
      table "$loss,$gates" out/{toy,shorter,fewer}-? ;;
    10)
      toy_text
      published toy 488 "$toy"
      table "$words,processed_ratio" out/toy-{dense,random,target}-? ;;
    10-toy)
      toy_text
      elide toy 488 "$toy"
      elide toyinit 488 "$toy --init out/toy-text"
      table "$words,processed_ratio" out/toy{,init}-{dense,random,own,target,mild}-? ;;
    10-photos)
      photos_text
      elide photos 600 "$photos"
      elide photosinit 600 "$photos --init out/photos-text"
      score out/photos{,init}-{dense,random,own,target,mild}-?
      table "$words,processed_ratio" out/photos{,init}-{dense,random,own,target,mild}-? ;;
    10-why)
      toy_text
      photos_text
      rm -rf out/{toy,photos}-begin  # resumed, they would not stop
      go toy-begin $toy --max_steps 488 --stop_after 100
      go photos-begin $photos --max_steps 600 --stop_after 100
      finish
      python tests/claims.py why out/why.png out/{toy,photos}-{begin,dense-1}/last.pt ;;
    2-photos)
      photos_text
      runs photos-dense $photos --max_steps 600
      for gate in soft-feature none hard-token hard-feature; do
        runs "photos-$gate" $photos --max_steps 600 --gate $gate
      done
      score out/photos-{dense,soft-feature,none,hard-token,hard-feature}-?
      table "$words,$gates" out/photos-{dense,soft-feature,none,hard-token,hard-feature}-? ;;
    5-photos)
      photos_text
      for c in none clip lcg; do runs "photos-mixed-$c" --preset laptop --max_steps 600 --contrastive $c; done
      score out/photos-mixed-{none,clip,lcg}-?
      table "val_loss_text,$words" out/photos-mixed-{none,clip,lcg}-? ;;
    6-photos)
      photos_text
      for order in mixed alternate; do
        runs "photos-$order" --preset laptop --epochs 2 --curriculum $order --eval_interval 1000 \
          --keep_checkpoints
      done
      score out/photos-{mixed,alternate}-?
      table "val_loss_text,$words" out/photos-{mixed,alternate}-?
      python tests/claims.py swing out/photos-alternate-? ;;
    *) echo "claims.sh: there is no claim $claim here" >&2; exit 2 ;;
  esac
done
