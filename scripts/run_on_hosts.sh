#!/usr/bin/env bash
# Runs one process of a training run on each host of a list, over SSH, and waits for all of them.
#
#   scripts/run_on_hosts.sh hosts.txt moe-jax train --config /shared/mine.py --workdir /shared/runs/mine
#
# hosts.txt has one name or address a line; the first is that of process 0, which all others must
# reach at the port PORT (default 8476). The command runs in the present folder, which all hosts
# share. Ctrl-C or SIGTERM to this script saves and stops the run; the same command resumes it.
# REMOTE_SHELL replaces ssh: it is called with a host and a command.
set -uo pipefail

list=$1
shift
port=${PORT:-8476}
mapfile -t hosts < <(grep -vE '^\s*(#|$)' "$list")
command=$(printf '%q ' "$@")
folder=$(printf '%q' "$PWD")
# In the folder that all hosts share.
pid_file=.run_on_hosts.$$

on() { "${REMOTE_SHELL:-ssh}" "$@" < /dev/null; }

processes=()
for i in "${!hosts[@]}"; do
    on "${hosts[$i]}" "cd $folder && echo \$\$ > $pid_file.$i && exec $command --distributed \
        --coordinator ${hosts[0]}:$port --num-processes ${#hosts[@]} --process-id $i" &
    processes+=($!)
done

# One process that is told to stop stops all of them after the same step.
trap 'on "${hosts[0]}" "cd $folder && kill -TERM \$(cat $pid_file.0)"' INT TERM
trap 'rm -f "$pid_file".*' EXIT

status=0
for process in "${processes[@]}"; do
    while kill -0 "$process" 2> /dev/null; do # `wait` returns early when a signal comes
        wait "$process"
    done
    wait "$process" || status=$?
done
exit "$status"
