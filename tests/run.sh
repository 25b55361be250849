#!/usr/bin/env bash
# Every check and test of the repository, fast ones first; the last lines are pytest's own.
#
#     bash tests/run.sh          all but the soak tests
#     bash tests/run.sh quick    without those marked slow (a few minutes)
#     bash tests/run.sh soak     all, the soak tests too
#
# Makes .venv where it is missing. Exit code 0: everything passed; 1: something failed; 2: it could not start.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
. launch/setup.sh

case "${1:-}" in
    "") marks='not soak' ;;
    quick) marks='not slow and not soak' ;;
    soak) marks='' ;;
    *) stop "usage: bash tests/run.sh [quick|soak], got $1" ;;
esac
set_up

# Tests over several hosts, over clocks that differ, and in a browser need programs that only root can install. Not on a
# machine with services, where Debian would start the sshd for all the world.
install_programs() {
    local missing=()
    command -v ip >/dev/null || missing+=(iproute2)
    [ -x /usr/sbin/sshd ] || missing+=(openssh-server)
    command -v ssh >/dev/null || missing+=(openssh-client)
    command -v pdsh >/dev/null || missing+=(pdsh)
    compgen -G '/usr/lib/*/faketime/libfaketimeMT.so.1' >/dev/null || missing+=(faketime)
    command -v chromium >/dev/null || missing+=(chromium fonts-dejavu-core)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null && [ ! -d /run/systemd/system ]; then
        echo "installing ${missing[*]}"
        apt-get update -qq
        local package
        for package in "${missing[@]}"; do # one by one: not every distribution has each
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null
        done
    else
        echo "the tests over several hosts and clocks and in a browser are skipped; they need root and: apt-get install ${missing[*]}" >&2
    fi
}
[ "$marks" = 'not slow and not soak' ] || install_programs

failed=()
check() { # name, command...
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same files
export WANDB_MODE=offline WANDB_SILENT=true PYRIGHT_PYTHON_IGNORE_WARNINGS=1
[ "$(count_gpus)" -gt 0 ] || export DS_ACCELERATOR=cpu

check "ruff check" ruff check
check "ruff format" ruff format --check
check "shellcheck" shellcheck -x launch/*.sh launch/*.sbatch tests/run.sh .ci/run

tests=(python -m pytest -m "$marks" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = quick ]; then
    tests+=(--hypothesis-profile quick)
    last=(tests/unit tests/numerics tests/integration)
else
    check "pytest tests/unit tests/numerics" "${tests[@]}" tests/unit tests/numerics
    last=(tests/integration)
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED before the last tests: ${failed[*]}"
fi
echo "== pytest ${last[*]}"
"${tests[@]}" "${last[@]}"
code=$?
[ $code -eq 0 ] && [ ${#failed[@]} -eq 0 ]
