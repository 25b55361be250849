# Sourced by each host's shell (DeepSpeed's --venv_script) before the host's ranks start: they end with the launcher.
# shellcheck shell=bash
#
# The ssh connection's end of file says that the launching side has gone, however it went; sshd itself would leave
# the ranks alone. So would DeepSpeed's launcher of this host ($$) where it is killed. sshd makes a session and
# process group of each command, so that group is all of the run on this host.
exec 3<&0 </dev/null
(
    trap '' INT TERM HUP
    read -r statistics </proc/self/stat
    read -r _ _ group _ <<<"${statistics##*) }" # after the name: state, parent, group
    while [ -e "/proc/$$" ]; do
        read -r -t 2 -u 3 _
        code=$?
        [ "$code" -eq 0 ] || [ "$code" -gt 128 ] || break # 1: end of file; above 128: nothing came
    done
    for _ in {1..25}; do # ranks that notice it themselves have five seconds to save (engine/faults.py, GRACE_S)
        [ -e "/proc/$$" ] || break
        sleep 0.2
    done
    kill -KILL -- "-$group"
) >/dev/null 2>&1 &
exec 3<&-
