#!/usr/bin/env bash
# From a fresh clone to a training run on what this machine has.
#
#   ./run.sh                                # 1, 2, 4 or 8 GPUs: FineWeb to 3.28; none: the demo
#   ./run.sh --optimizer aurora --trials 2  # all arguments go to train_gpt.py, see --help
#   ./run.sh --preset prose --data DIR      # a chosen preset or folder stays as it is
#
# The first run installs missing packages into .venv, those of tools/ and records/ too, and fetches
# missing shards into data/. Relative paths start at the repository. The exit code is the trainer's:
# 0, 1 if the run failed, or 2 for a mistake, which it names.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tools/setup.sh

help() {  # print the trainer's help or, without a torch to run it, the texts in the files
    local field='^    \([a-z0-9_]*\): [a-z]* = setting(\(.*\), "[a-z]*", "\([^"]*\)".*)$'
    for python in python3 .venv/bin/python; do
        "$python" train_gpt.py --help 2>/dev/null && exit
    done
    sed -n 's/^#\( \|$\)//p' run.sh
    sed -n "s/$field/\1|\3 [\2]/p" train_gpt.py | while IFS='|' read -r name text; do
        printf '  --%-13s %s\n' "${name//_/-}" "$text"
    done
    exit 0
}

plan() {  # ARGUMENTS: print usable GPUs, the origin of the data, the reason for no GPU
    "$python" - "$@" <<'END'
import sys
import torch
from train_gpt import parse_config
try:
    config = parse_config(sys.argv[1:])  # finds a mistyped flag before anything is fetched
except ValueError as error:
    sys.exit(print(f"train_gpt.py: {error}", file=sys.stderr) or 2)
given = {argument.partition("=")[0] for argument in sys.argv[1:]}
choice = "data" if "--data" in given else config.preset if "--preset" in given else "default"
gpus, reason = torch.cuda.device_count(), f"PyTorch {torch.__version__} sees none"
if config.device not in ("", "cuda"):
    gpus, reason = 0, f"--device {config.device}"
elif gpus:
    try:
        torch.ones(1, device="cuda").sum().item()  # GPUs are counted even without a working driver
    except RuntimeError as error:
        gpus, reason = 0, str(error).split("\n")[0]
print(min(gpus, 1) if config.preset == "demo" else gpus, choice, reason)
END
}

embedded_default() {  # REASON: fall back to the demo
    say "$1, so this is the embedded default: a small model on Python's own source, --preset demo"
    choice=demo gpus=1 fallback=yes
}

fineweb() {  # fetch the benchmark's shards, unless they are here
    setup numpy tools
    "$python" data/cached_fineweb10B.py 18 --offline 2>/dev/null && return
    if [ "$choice" = default ] && ! reachable "${HF_ENDPOINT:-https://huggingface.co}"; then
        embedded_default "FineWeb is not here and huggingface.co does not answer"
    else
        setup 'numpy|huggingface_hub' tools
        "$python" data/cached_fineweb10B.py 18
    fi
}

launch() {  # ARGUMENTS: train on the largest usable number of GPUs
    local n=8
    while ((n > 1 && n > gpus)); do ((n /= 2)); done
    ((n > 1)) || exec "$python" train_gpt.py "$@"
    say "training on $n of $gpus GPUs"
    # This is torchrun. Without -- it would read our --log as an abbreviation of its --log-dir.
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node=$n -- train_gpt.py "$@"
}

[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || help
setup torch tools
plan=$(plan "$@")
read -r gpus choice reason <<<"$plan"
fallback=
((gpus)) || [ "$choice" != default ] || embedded_default "No usable GPU ($reason)"
case $choice in default | track3) fineweb ;; esac
if [ "$choice" = demo ]; then
    setup numpy tools
    "$python" data/embedded.py
fi
[ -z "$fallback" ] || set -- --preset demo "$@"
launch "$@"
