#!/usr/bin/env bash
# A Slurm of two nodes on this machine, for tests: real slurmctld, slurmd and munged on ports and in a folder of
# their own. Needs root on Debian or Ubuntu; neither systemd nor cgroups.
#
#   tools/slurm_two_nodes.sh install      munge and slurm-wlm by apt, where they are missing
#   tools/slurm_two_nodes.sh start        starts what is not running; prints the line that makes it the Slurm of a shell:
#                                         export SLURM_CONF=DIR/slurm.conf
#   tools/slurm_two_nodes.sh kill NODE    the node dies with all that runs on it, as if its power were cut
#   tools/slurm_two_nodes.sh stop         ends everything and takes the names of the nodes out of /etc/hosts
#
# DIR is $SCJAX_SLURM, /tmp/scjax-slurm by default. The nodes are scjax-node1 and scjax-node2.
set -euo pipefail

dir=${SCJAX_SLURM:-/tmp/scjax-slurm}
nodes=(scjax-node1 scjax-node2)
mark='# scjax: Slurm of two nodes'
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

install_packages() {
    [ "$(id -u)" = 0 ] || { echo "slurm_two_nodes: needs root" >&2; return 1; }
    type -P slurmctld slurmd munged sbatch srun >/dev/null && return
    type -P apt-get >/dev/null || { echo "slurm_two_nodes: no Slurm here, and no apt-get to install it" >&2; return 1; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -q --no-install-recommends munge slurm-wlm >&2 ||
        { apt-get update -q >&2 && apt-get install -y -q --no-install-recommends munge slurm-wlm >&2; }
}

configure() {
    mkdir -p "$dir"/{state,munge} "${nodes[@]/#/$dir/}"
    chmod 755 "$dir" && chmod 700 "$dir/munge"
    [ -s "$dir/munge/key" ] || { head -c 128 /dev/urandom >"$dir/munge/key" && chmod 600 "$dir/munge/key"; }
    # jobs find each other by the names of nodes, as on a cluster
    grep -qF "$mark" /etc/hosts || echo "127.0.0.1 ${nodes[*]} $mark" >>/etc/hosts
    cat >"$SLURM_CONF" <<EOF
ClusterName=scjax
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
# a machine without cgroups, whose nodes claim what they like
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# all that waits for something waits little
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
JobRequeue=1
NodeName=scjax-node[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[26818-26819] CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
}

alive() { [ -s "$1" ] && running "$(cat "$1")"; }
gone() { ! running "$1"; }
running() { [ -d "/proc/$1" ] && ! grep -q '^State:.Z' "/proc/$1/status"; }

wait_for() { # a command that is to succeed within half a minute
    for _ in $(seq 150); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
    echo "slurm_two_nodes: gave up on: $*; see the logs in $dir" >&2
    return 1
}

idle() { [ "$(sinfo -h -N -t idle -o %N | sort -u | wc -l)" = ${#nodes[@]} ]; }

start() {
    install_packages
    configure
    alive "$dir/munged.pid" || munged --force --key-file="$dir/munge/key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    wait_for test -S "$dir/munge.socket"
    alive "$dir/slurmctld.pid" || slurmctld
    wait_for scontrol ping
    for node in "${nodes[@]}"; do
        alive "$dir/$node.pid" || slurmd -N "$node"
    done
    wait_for idle
    echo "export SLURM_CONF=$SLURM_CONF"
}

tasks_of() { # the processes of jobs on a node, and the slurmstepd above each
    local file pid parent
    for file in /proc/[0-9]*/environ; do
        pid=${file//[!0-9]/}
        grep -qzxF "SLURMD_NODENAME=$1" "$file" 2>/dev/null || continue
        parent=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null) || continue
        echo "$pid"
        [ "$(cat "/proc/$parent/comm" 2>/dev/null)" = slurmstepd ] && echo "$parent"
    done | sort -un
}

kill_node() {
    local pids
    pids=$(tasks_of "$1")
    if alive "$dir/$1.pid"; then pids="$(cat "$dir/$1.pid") $pids"; fi
    echo $pids
    kill -KILL $pids 2>/dev/null || true
    rm -f "$dir/$1.pid"
}

stop() {
    for node in "${nodes[@]}"; do kill_node "$node" >/dev/null; done
    for daemon in slurmctld munged; do
        alive "$dir/$daemon.pid" || continue
        pid=$(cat "$dir/$daemon.pid")
        kill "$pid"
        wait_for gone "$pid"
    done
    rm -rf "$dir"
    # in place: in a container /etc/hosts is a mount and cannot be renamed over
    [ ! -w /etc/hosts ] || { hosts=$(grep -vF "$mark" /etc/hosts) && echo "$hosts" >/etc/hosts; }
}

case ${1:-} in
install) install_packages ;;
start) start ;;
kill) kill_node "${2:?the name of a node}" ;;
stop) stop ;;
*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
