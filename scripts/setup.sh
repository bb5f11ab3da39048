#!/usr/bin/env bash
# Makes the virtual environment .venv with the package (editable) and its checks. A second call takes no time; a call
# after an interrupted one starts anew. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
python=$venv/bin/python
stamp=$venv/nextscale-ready       # set-up ended; holds what environment.py printed then
unfinished=$venv/nextscale-making # this script began the environment and did not end it
log=$venv/nextscale-setup.log
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(python3 python3.12 python3.13 python3.11); fi

say() { printf '[set-up] %s\n' "$*"; }
fail() { printf '[set-up] error: %s\n' "$*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
can_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}
apt_install() {
    local get=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120)
    as_root "${get[@]}" install -y --no-install-recommends "$@" >/dev/null 2>&1 ||
        { as_root "${get[@]}" update && as_root "${get[@]}" install -y --no-install-recommends "$@"; } >/dev/null 2>&1
}

in_range='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'

# Sets `chosen` to the first interpreter of a fitting version that can make environments. A name on the path is no
# proof that it runs (version managers leave such names), so each is tried.
choose_python() {
    local candidate without_venv=""
    for candidate in "${candidates[@]}"; do
        "$candidate" -c "$in_range" >/dev/null 2>&1 || continue
        chosen=$(command -v "$candidate")
        "$chosen" -c 'import ensurepip, venv' >/dev/null 2>&1 && return
        without_venv=${without_venv:-$chosen}
    done
    [ -n "$without_venv" ] || fail "no Python 3.11, 3.12 or 3.13 found (tried ${candidates[*]}); install one and name it: make setup PYTHON=/path/to/python"
    chosen=$without_venv
    local package
    package=$("$chosen" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if can_install; then
        say "installing the system package $package"
        apt_install "$package" || true
    fi
    "$chosen" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$chosen cannot make virtual environments: install the system package $package (sudo apt-get install $package), then run make again"
}

# open3d loads these libraries; without them the 3D parts fail, the rest works.
system_libraries() {
    [ "$(uname -s)" = Linux ] || return 0
    local ldconfig known missing=()
    ldconfig=$(PATH=$PATH:/sbin:/usr/sbin command -v ldconfig) || return 0
    known=$("$ldconfig" -p)
    [[ $known == *libusb-1.0.so.0* ]] || missing+=(libusb-1.0-0)
    [[ $known == *libGL.so.1* ]] || missing+=(libgl1)
    [[ $known == *libgomp.so.1* ]] || missing+=(libgomp1)
    [ ${#missing[@]} -gt 0 ] || return 0
    if can_install && apt_install "${missing[@]}"; then
        say "installed the system packages ${missing[*]}"
    else
        say "open3d needs system packages that are missing: ${missing[*]} (sudo apt-get install ${missing[*]}); going on without them"
    fi
}

# Without an NVIDIA GPU, PyTorch's own index has a build that is a tenth of the size of the default one.
torch_index() {
    [ "$(uname -s)" = Linux ] || return 0
    if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || command -v nvidia-smi >/dev/null; then return 0; fi
    local index=https://download.pytorch.org/whl/cpu
    "$python" -c "import urllib.request as r; r.urlopen(r.Request('$index/torch/', method='HEAD'), timeout=3)" \
        >/dev/null 2>&1 && printf '%s' "$index"
    return 0
}

# The mark goes first and stays, so that a call that is cut off here is taken up again.
start_anew() {
    mkdir -p $venv
    touch $unfinished
    find $venv -mindepth 1 -maxdepth 1 ! -path $unfinished -exec rm -rf {} +
}

pip_install() {
    if ! "$python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; then
        # pip takes back what it began: an environment that worked before still does, with the old list of packages.
        [ -z "$outdated" ] || mv $unfinished $stamp
        tail -n 15 "$log" >&2
        fail "pip could not install the packages; the whole output is in $log"
    fi
}

# One set-up at a time, where the system can tell.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock -n 9 || { say "another set-up is running; waiting for it"; flock 9; }
fi

trap 'say "interrupted; the next make starts the set-up anew"; exit 130' INT TERM
began=$SECONDS
outdated=""

if [ -n "${PYTHON:-}" ] && [ -e $venv ]; then
    version='import sys; print("%d.%d" % sys.version_info[:2])'
    has=$("$python" -c "$version" 2>/dev/null || true)
    wanted=$("$PYTHON" -c "$version" 2>/dev/null) || fail "PYTHON=$PYTHON does not run"
    [ -z "$has" ] || [ "$has" = "$wanted" ] ||
        fail "$venv has Python $has and PYTHON=$PYTHON is $wanted: remove the environment first (rm -r $venv)"
fi

anew=""
if [ ! -e $venv ]; then
    anew=yes
elif [ -e $unfinished ]; then
    say "an earlier set-up was cut off; starting anew"
    anew=yes
elif ! "$python" -c "" 2>/dev/null; then
    say "the interpreter of $venv does not run; starting anew"
    anew=yes
elif [ -f $stamp ]; then
    # -I: what the caller's PYTHONPATH holds is not part of the environment.
    now=$("$python" -I scripts/environment.py || true)
    if [ "$now" = "$(cat $stamp)" ]; then
        say "ready ($venv)"
        exit 0
    elif [ "${now%%$'\n'*}" = "$(head -n 1 $stamp)" ]; then
        say "the list of packages changed; bringing $venv up to date"
        mv $stamp $unfinished
        outdated=yes
    else
        say "$venv is damaged, or the interpreter or the folder changed; starting anew"
        anew=yes
    fi
elif ! "$python" -c "$in_range"; then
    fail "$venv has $("$python" -V), and 3.11 to 3.13 is needed: remove it (rm -r $venv) and run make again"
elif ! "$python" -I scripts/environment.py >/dev/null; then
    say "$venv is damaged; starting anew"
    anew=yes
fi

if [ -n "$anew" ]; then
    choose_python
    start_anew
    "$chosen" -m venv $venv || fail "$chosen could not make an environment in $venv"
    say "made $venv with $("$python" -V) from $chosen ($((SECONDS - began)) s)"
fi

system_libraries
: >"$log"
say "installing the packages; the first time this takes a minute or more, most of it for torch (log: $log)"
step=$SECONDS
index=$(torch_index)
if [ -n "$index" ]; then
    torch=$("$python" -c 'import tomllib; print(next(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch>")))')
    pip_install --extra-index-url "$index" "$torch"
fi
pip_install --editable ".[dev]"
say "packages installed ($((SECONDS - step)) s)"

"$python" -I scripts/environment.py >$stamp.tmp || fail "$venv is damaged; remove it (rm -r $venv) and run make again"
mv $stamp.tmp $stamp
rm -f $unfinished
say "ready in $((SECONDS - began)) s ($venv)"
