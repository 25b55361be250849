# Sourced by demo.sh, local.sh and tests/run.sh, from the repository's root: makes .venv, installs requirements.txt.
# shellcheck shell=bash

VENV=.venv
STAMP="$VENV/.requirements.sha256" # of the requirements.txt that was installed last

stop() { # message
    echo "error: $*" >&2
    exit 2
}

# The first interpreter that is new enough, in PYTHON.
find_python() {
    for PYTHON in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return
        fi
    done
    stop "Python 3.11 or newer is needed, found $(python3 --version 2>&1 || true); on Debian 12 and later:" \
        "apt-get install python3 python3-venv"
}

make_venv() {
    find_python
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$PYTHON comes without venv; on Debian: apt-get install python3-venv"
    echo "making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$VENV" || stop "$PYTHON -m venv $VENV failed"
}

# Leaves a working .venv whose packages are those of requirements.txt, its programs first in PATH.
set_up() {
    # Caches of matplotlib, wandb and others go below HOME; where it cannot be written they go into .venv.
    local wanted
    if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        make_venv
    fi
    if [ ! -d "${HOME:-}" ] || [ ! -w "$HOME" ]; then
        export HOME="$PWD/$VENV/home"
        mkdir -p "$HOME"
    fi
    wanted=$(sha256sum requirements.txt)
    if [ "$(cat "$STAMP" 2>/dev/null)" != "$wanted" ]; then
        echo "installing requirements.txt into $VENV"
        "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -r requirements.txt ||
            stop "pip could not install requirements.txt (see above)"
        echo "$wanted" >"$STAMP"
    fi
    export PATH="$PWD/$VENV/bin:$PATH"
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    export MPLBACKEND=${MPLBACKEND:-Agg}
}

# Prints the number of GPUs that torch can use; torch is asked only where a driver is there.
count_gpus() {
    if compgen -G '/dev/nvidia[0-9]*' >/dev/null || [ -e /dev/kfd ]; then
        python -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0
    fi
}

# Runs bitmar.train on N ranks of this machine: launch_local RANKS ARGUMENTS... Returns the run's exit code.
# The processes form a group of their own, so that Ctrl-C ends all of them, from the ranks upwards. TERM and HUP are
# passed on to the ranks, which save and end with 75; a second one ends them as Ctrl-C does.
launch_local() {
    local ranks=$1 port launcher code=0
    shift
    [ "$(count_gpus)" -gt 0 ] || export DS_ACCELERATOR=cpu
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    export BITMAR_LAUNCHER_PID=$$ # the ranks end with this script, even by kill -9
    set -m
    (
        trap '' INT # DeepSpeed's inner launcher still takes it: it ends the ranks and then itself
        exec deepspeed --log_level critical --num_accelerators "$ranks" --master_port "$port" \
            --module bitmar.train "$@" </dev/null
    ) &
    launcher=$!
    set +m
    trap 'end_launch "$launcher"' INT
    trap 'save_launch "$launcher"' TERM HUP
    while :; do # a trapped signal ends wait, not the launcher
        code=0
        wait "$launcher" || code=$?
        kill -0 "$launcher" 2>/dev/null || break
    done
    trap - INT TERM HUP
    if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$code" -ne 75 ]; then
        echo "error: the run ended with exit code $code; see the messages above" >&2
    fi
    return "$code"
}

save_launch() { # launcher
    local stat pid group found=
    # shellcheck disable=SC2064  # the launcher's number of now
    trap "end_launch $1" TERM HUP
    for stat in /proc/[0-9]*/stat; do
        pid=${stat#/proc/}
        pid=${pid%/stat}
        { read -r group <"$stat"; } 2>/dev/null || continue
        read -r _ _ group _ <<<"${group##*) }" # after the name: state, parent, group
        if [ "$group" = "$1" ] && grep -aq -- '--local_rank=' "/proc/$pid/cmdline" 2>/dev/null; then
            kill -TERM "$pid" 2>/dev/null && found=yes
        fi
    done
    [ -n "$found" ] || end_launch "$1"
}

end_launch() { # launcher
    local tries
    trap '' INT TERM HUP
    echo >&2
    for tries in {0..79}; do
        [ $((tries % 10)) -ne 0 ] || kill -INT -- "-$1" 2>/dev/null || true
        kill -0 -- "-$1" 2>/dev/null || break
        sleep 0.5
    done
    kill -KILL -- "-$1" 2>/dev/null || true
    echo "stopped; the same command goes on from the last checkpoint" >&2
    exit 130
}
