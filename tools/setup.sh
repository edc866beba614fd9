# shellcheck shell=bash
# run.sh and test.sh source this at the root, under set -e. It finds or makes a Python that has
# their packages, and names it in $python. If python3 has them (in a container, on a cluster, in an
# active environment) it is used as it is; otherwise .venv is, and the console says so, as other
# commands must find the packages too. .venv/installed is written last and lists the complete
# packages. An empty one marks an interrupted installation, which is made again. A .venv without
# this file belongs to the user; packages are only added to it.

python=python3

say() { echo "${0##*/}: $*" >&2; }

wanted() {  # [EXTRA...]: print requirements.txt and extras of pyproject.toml, one per line
    python3 - "$@" <<'END'
import sys, tomllib
lines = [line.partition("#")[0].strip() for line in open("requirements.txt")]
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
lines += [line for name in sys.argv[1:] for line in extras[name]]
lines = [line.partition(";")[0] for line in lines if "linux" not in line or sys.platform == "linux"]
print(*dict.fromkeys(filter(None, lines)), sep="\n")
END
}

has() {  # LINES: succeed if python3 fulfils these requirements
    python3 - "$1" 2>/dev/null <<'END'
import importlib.metadata, re, sys
def parts(version): return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]
for line in sys.argv[1].split():
    name, low, high = re.match(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?$", line).groups("9999")
    assert parts(low) <= parts(importlib.metadata.version(name)) < parts(high)
    if name == "torch":
        import torch  # a broken installation fails here and is replaced
END
}

reachable() {  # URL: succeed if a server answers, even with an error
    python3 -c 'import sys, urllib.error, urllib.request
try: urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=3)
except urllib.error.HTTPError: pass' "$1" 2>/dev/null
}

finished() {  # LINES: succeed if .venv works and has these requirements
    .venv/bin/python -c 'from importlib import util; assert util.find_spec("torch")' 2>/dev/null &&
        [ -s .venv/installed ] && ! grep -Fxvq -f .venv/installed <<<"$1"
}

install() {  # LINES: install these requirements into .venv
    local lines=$1 cpu=https://download.pytorch.org/whl/cpu
    if [ ! -e .venv ] || { [ -e .venv/installed ] && [ ! -s .venv/installed ]; }; then
        rm -rf .venv && mkdir .venv && touch .venv/installed
    fi
    [ ! -e .venv/installed ] || : >.venv/installed
    python3 -m venv .venv
    if has "$(grep ^torch <<<"$lines")"; then  # torch is gigabytes: .venv shares python3's
        lines=$(grep -v ^torch <<<"$lines") cpu=
        python3 -c 'import sys
with open(".venv/lib/python{}.{}/site-packages/outer.pth".format(*sys.version_info), "w") as file:
    print(*(path for path in sys.path if "-packages" in path), sep="\n", file=file)'
        # python3's own torchrun would start python3, which lacks the packages of .venv.
        printf '#!/bin/sh\nexec "${0%%/*}/python" -m torch.distributed.run "$@"\n' \
            >.venv/bin/torchrun
        chmod +x .venv/bin/torchrun
    elif nvidia-smi -L >/dev/null 2>&1 || [ "$(uname)" != Linux ] || ! reachable $cpu/torch/; then
        cpu=  # the index of torch without CUDA, a tenth of the size
    fi
    say "installing into .venv from PyPI${cpu:+ and $cpu}, once: ${lines//$'\n'/ }"
    .venv/bin/python -m pip install -q --disable-pip-version-check \
        ${cpu:+--extra-index-url "$cpu"} -r /dev/stdin <<<"$lines"
    echo "$1" >.venv/installed
    say "installed after $SECONDS s"
}

setup() {  # NAMES [EXTRA...]: make $python have the packages that match NAMES, a regular expression
    local lines
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "Python 3.11 or newer is needed, but python3 is $(python3 --version 2>&1 || true):" \
            "activate an environment that has it and run this again"
        exit 2
    fi
    lines=$(wanted "${@:2}")
    [ $python != python3 ] || ! has "$(grep -E "^($1)" <<<"$lines")" || return 0
    exec 9>>requirements.txt  # a lock: if two start at once, only one installs
    ! command -v flock >/dev/null || flock 9
    finished "$lines" || install "$lines"
    exec 9>&-
    if [ $python = python3 ] && [ ! "${VIRTUAL_ENV:-}" -ef .venv ]; then
        say "packages are in .venv: run \`source .venv/bin/activate\` before other commands of the" \
            "README"
    fi
    python=.venv/bin/python
}
