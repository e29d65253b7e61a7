#!/bin/bash
# A Slurm of several nodes on one machine: for tests, and as a queue on a workstation.
#
#   mini_slurm.sh install                 Debian packages; root
#   mini_slurm.sh up DIR [NODES [CPUS]]   starts nodes n1, n2, ...; prints the settings
#   mini_slurm.sh down DIR                ends them
#
# Everything lies in DIR and listens on 127.0.0.1 alone, without munge, cgroups or a
# database. JAX finds a node by its name, so root writes the names into /etc/hosts, and
# takes them out again. `eval "$(mini_slurm.sh up DIR)"` makes sbatch find the cluster.
# MINI_SLURM_PORT is the first of 1 + NODES ports. Partitions: main, and urgent, which
# preempts it.
set -eu
USAGE="usage: $0 install | up DIR [NODES [CPUS]] | down DIR"
COMMAND=${1:?$USAGE}
MARK="# mini_slurm"

install() {
  if command -v slurmctld slurmd sbatch >/dev/null; then return; fi
  if [ "$(id -u)" != 0 ]; then echo "installing Slurm needs root" >&2; exit 1; fi
  if ! command -v apt-get >/dev/null; then echo "there is no apt-get" >&2; exit 1; fi
  # The packages would start services of their own.
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  packages() { apt-get install -qq -y --no-install-recommends slurm-wlm; }
  packages >&2 || { apt-get update -qq >&2 && packages >&2; }
}

configure() {
  local host
  host=$(hostname -s)
  cat > "$DIR/etc/slurm.conf" <<EOF
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/none
CredType=cred/none
# A requeued job waits for its old credential to lapse: two minutes by default.
AuthInfo=cred_expire=5
SlurmctldPort=$PORT
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile=$DIR/pid/slurmctld.pid
SlurmdPidFile=$DIR/pid/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/state/spool.%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=15
MinJobAge=600
ReturnToService=2
# The nodes claim cores that the machine need not have.
SlurmdParameters=config_overrides
NodeName=n[1-$NODES] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=$CPUS RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
EOF
}

idle() { sinfo -h -N -t idle -p main 2>/dev/null | wc -l; }

up() {
  if [ -e "$DIR/etc/slurm.conf" ]; then down; fi
  rm -rf "$DIR"/{etc,state,log,pid}
  mkdir -p "$DIR"/{etc,state,log,pid}
  configure
  export SLURM_CONF="$DIR/etc/slurm.conf"
  local names=""
  for i in $(seq "$NODES"); do names="$names n$i"; done
  if [ "$(id -u)" = 0 ]; then
    echo "127.0.0.1$names $MARK $DIR" >> /etc/hosts
  elif ! getent hosts $names >/dev/null; then
    echo "node names do not resolve; jobs of several nodes must be given" \
      "JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT" >&2
  fi
  slurmctld -c
  for i in $(seq "$NODES"); do slurmd -N "n$i"; done
  for _ in $(seq 300); do [ "$(idle)" -lt "$NODES" ] || break; sleep 0.1; done
  if [ "$(idle)" -lt "$NODES" ]; then
    tail -n 20 "$DIR"/log/*.log >&2
    down
    exit 1
  fi
  echo "export SLURM_CONF=$SLURM_CONF"
}

# Where nothing reaps orphans, what has ended stays as a zombie.
alive() { [ -e "/proc/$1" ] && ! grep -q "^State:.Z" "/proc/$1/status" 2>/dev/null; }

down() {
  local pid pids=()
  export SLURM_CONF="$DIR/etc/slurm.conf"
  # A daemon that goes before its jobs leaves their processes behind.
  if scancel --quiet --user="$(id -un)" 2>/dev/null; then
    for _ in $(seq 300); do
      [ -n "$(squeue --noheader 2>/dev/null)" ] || break
      sleep 0.1
    done
  fi
  for file in "$DIR"/pid/*.pid; do
    if [ -s "$file" ]; then pids+=("$(cat "$file")"); fi
  done
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for _ in $(seq 100); do
    for pid in "${pids[@]}"; do
      if alive "$pid"; then sleep 0.1; continue 2; fi
    done
    break
  done
  for pid in "${pids[@]}"; do
    if alive "$pid"; then kill -9 "$pid" 2>/dev/null || true; fi
  done
  if [ "$(id -u)" = 0 ]; then
    # In a container the file is a mount: it can be written, but not replaced.
    local others
    others=$(grep -vF "$MARK $DIR" /etc/hosts || true)
    printf '%s\n' "$others" > /etc/hosts
  fi
}

case $COMMAND in
  install) install ;;
  up | down)
    DIR=$(realpath -m "${2:?$USAGE}")
    NODES=${3:-4}
    CPUS=${4:-2}
    PORT=${MINI_SLURM_PORT:-26817}
    "$COMMAND"
    ;;
  *) echo "$USAGE" >&2; exit 2 ;;
esac
