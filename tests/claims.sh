#!/usr/bin/env bash
# The claims of the README, measured: bash tests/claims.sh [CLAIM ...], by default those of the toy world.
# .github/results.md is made of what it prints. Two runs at a time, one thread each, in out/claims; what is
# finished only reports, so the script can be started again. SEEDS="1 2 3" are the default.
# *-photos and 10-why want BABYLM=the folder of text and captions, FULL_EVAL=its evaluation_data/full_eval,
# NORMS=a table of words and numbers, UPOS=one of their parts of speech (columns word and upos).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=out/claims queue=
mkdir -p $out data

go() {  # name, flags: a run to be made
  [ -f "$out/$1/summary.json" ] || queue+="--out $out/$1 ${*:2}"$'\n'
}
runs() {  # the same with every seed
  for seed in ${SEEDS:-1 2 3}; do go "$1-$seed" "${@:2}" --seed "$seed"; done
}
finish() {  # make them
  [ -z "$queue" ] || printf %s "$queue" | xargs -P 2 -L 1 python train.py --resume >> $out/log
  queue=
}
paths() {  # names -> folders of all seeds, of runs that are made
  for name; do printf '%s\n' $out/$name-?; done
}
table() {  # columns, names
  finish
  python tests/claims.py table "$1" $(paths "${@:2}")
  echo
}
data() {  # name, arguments of prepare_data.py
  [ -d "data/$1" ] || python prepare_data.py "${@:2}" --out "data/$1" >> $out/log
}
score() {  # runs on photos, whose data bring no evaluation sets
  finish
  paths "$@" | xargs -P 2 -L 1 python eval.py --tasks winoground,vqa --babylm_eval "$FULL_EVAL" \
    --norms "$NORMS" --upos "$UPOS" --teacher $out/photos-text >> $out/log
}
swing() {  # sets, names; without what evaluation says of each of the checkpoints
  python tests/claims.py swing "$1" $(paths "${@:2}") | sed -n "/^|/p"
}
published() {  # name, steps, flags of a dense run: every token, chance, the paper
  runs "$1-dense" $3 --max_steps "$2"
  runs "$1-random" $3 --max_steps "$2" --elide random
  runs "$1-target" $3 --max_steps "$2" --elide_by target --teacher "$out/${1%%-*}-text"
}
elide() {  # and the paper's other reading, a mild choice of ours: on photos as long as the dense run
  published "$@"
  local teacher="--teacher $out/${1%%-*}-text"
  runs "$1-own" $3 --max_steps "$2" $teacher --elide_by own
  runs "$1-mild" $3 --max_steps $(($2 * 17 / 15)) $teacher --keep_ratio 0.8 --elide_visible \
    --elide_warmup 0
}

toy="--preset patches --curriculum caption-only --epochs 2"
laptop="--preset laptop --data data/claims-photos"
photos="$laptop --curriculum caption-only --epochs 8"
orders="$laptop --epochs 2 --eval_interval 1000 --keep_checkpoints"
small="--n_layer 2 --max_steps 450 --eval_interval 1000"
loss=val_loss_caption,val_loss_text,visual_information_captured
words="val_loss_caption,loss of content,loss of function,winoground,vqa"
sets=blimp,supplement,ewok,winoground,vqa
gates="gate of function,gate of content"
toy_text() {  # the teacher, which never sees a picture
  data toy16 toy --n_image_token 16
  go toy-text --preset patches --curriculum caption-only --no-images --epochs 1
  finish
}
photos_text() {
  data claims-photos babylm "$BABYLM" --words 200000 --caption_sets flickr8k --vocab_size 4096
  go photos-text $laptop --no-images --curriculum caption-only
  finish
}

echo "seeds ${SEEDS:-1 2 3}"
python -c "import torch; print('torch', torch.__version__, torch.backends.cpu.get_cpu_capability())"
(( $# )) || set -- 1 2 3 4 5 6 9 10
case $* in *photos* | *why*) : "${BABYLM:?}" "${FULL_EVAL:?}" "${NORMS:?}" "${UPOS:?}" ;; esac
data toy toy  # before two runs at once make it
for claim; do
  echo; echo "### $claim"; echo
  case $claim in
    1 | 7 | 8 | 11)
      toy_text
      runs toy
      finish
      python eval.py $(paths toy) --teacher $out/toy-text >> $out/log
      table "$gates,$loss,rho teacher,vqa: image decides,vqa: image decides blind" toy
      python tests/claims.py explain $(paths toy) ;;
    2)
      runs soft-token $small
      for g in soft-feature none hard-token hard-feature; do runs $g $small --gate $g; done
      table "$loss,winoground" soft-token soft-feature none hard-token hard-feature ;;
    3)
      runs soft-token $small
      for m in film dyintra; do
        for at in cross text image; do runs $m-$at $small --modulation $m --modulate_at $at; done
      done
      runs channel $small --channel_attention
      table "$loss,$sets" soft-token {film,dyintra}-{cross,text,image} channel ;;
    4)  # the same pixels and kind of encoder: a vector of all, or one for each of 16 patches
      toy_text
      [ -d data/toy16-flat ] || python tests/claims.py flat data/toy16 data/toy16-flat
      runs patches --preset patches --epochs 1
      runs flat --preset patches --epochs 1 --data data/toy16-flat --n_image_token 1
      table "$loss,ewok,winoground,$gates" patches flat ;;
    5)
      runs soft-token $small
      for c in clip lcg; do runs $c $small --contrastive $c; done
      table "$loss,$sets" soft-token clip lcg ;;
    6)  # half of the pictures, so that a caption epoch is four text epochs long
      data toy-20k toy --n_image 20000
      for order in mixed alternate; do
        runs $order --data data/toy-20k --n_layer 2 --mix 4 --curriculum $order --eval_interval 1000 \
          --keep_checkpoints
      done
      table "$loss,blimp,winoground" mixed alternate
      swing "" alternate ;;
    9)
      data toy-10k toy --n_image 10000
      runs toy
      runs shorter --epochs 1
      runs fewer --data data/toy-10k --epochs 8
      table "$loss,$gates" toy shorter fewer ;;
    10)
      toy_text
      published toy 488 "$toy"
      table "$words,processed_ratio" toy-{dense,random,target} ;;
    10-toy)
      toy_text
      elide toy 488 "$toy"
      elide toy-init 488 "$toy --init $out/toy-text"
      published toy-long 1464 "--preset patches --curriculum caption-only --epochs 3"
      table "$words,processed_ratio" toy{,-init}-{dense,random,own,target,mild} \
        toy-long-{dense,random,target} ;;
    10-photos)
      photos_text
      elide photos 600 "$photos"
      elide photos-init 600 "$photos --init $out/photos-text"
      score photos{,-init}-{dense,random,own,target,mild}
      table "$words,processed_ratio" photos{,-init}-{dense,random,own,target,mild} ;;
    10-why)
      toy_text
      photos_text
      SEEDS=1 runs toy-dense $toy --max_steps 488
      SEEDS=1 runs photos-dense $photos --max_steps 600
      rm -rf $out/{toy,photos}-begin  # resumed, they would not stop
      go toy-begin $toy --max_steps 488 --stop_after 100
      go photos-begin $photos --max_steps 600 --stop_after 100
      finish
      python tests/claims.py why $out/why.png $out/{toy,photos}-{begin,dense-1}/last.pt ;;
    1-photos | 7-photos | 8-photos | 11-photos)
      photos_text
      runs photos-mixed $orders --curriculum mixed
      score photos-mixed
      table "$gates,gate of NOUN,gate of ADJ,gate of VERB,gate of DET,gate of AUX,gate of PRON,gate of ADP,\
gate of PART,rho concreteness,rho teacher" photos-mixed
      table "val_loss_text,val_loss_caption,val_loss_caption_other_image,val_loss_caption_none_image,\
winoground,winoground: Object,winoground: Relation,vqa,vqa blind" photos-mixed
      python tests/claims.py explain $(paths photos-mixed) ;;
    2-photos)
      photos_text
      runs photos-dense $photos --max_steps 600
      for gate in soft-feature none hard-token hard-feature; do
        runs "photos-$gate" $photos --max_steps 600 --gate $gate
      done
      score photos-{dense,soft-feature,none,hard-token,hard-feature}
      table "$words,$gates" photos-{dense,soft-feature,none,hard-token,hard-feature} ;;
    5-photos)
      photos_text
      for c in none clip lcg; do runs "photos-mixed-$c" $laptop --max_steps 400 --contrastive $c; done
      score photos-mixed-{none,clip,lcg}
      table "val_loss_text,$words" photos-mixed-{none,clip,lcg} ;;
    6-photos)
      photos_text
      for order in mixed alternate; do runs "photos-$order" $orders --curriculum $order; done
      score photos-{mixed,alternate}
      table "val_loss_text,$words" photos-{mixed,alternate}
      swing "$FULL_EVAL" photos-alternate ;;
    *) echo "claims.sh: there is no claim $claim here" >&2; exit 2 ;;
  esac
done
