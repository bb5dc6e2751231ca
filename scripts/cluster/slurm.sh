#!/usr/bin/env bash
# A sweep on several Slurm nodes: `sbatch scripts/cluster/slurm.sh`. Two minutes before its time is
# up the running epochs end, the job goes back into the queue, and then the sweep goes on.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
# ---- Edit this block -----------------------------------------------------------------------------
#SBATCH --job-name=mnist
#SBATCH --output=%x-%j.log
#SBATCH --time=12:00:00
#SBATCH --nodes=2
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
##SBATCH --gpus-per-node=4
VENV=$HOME/sparsetune/.venv
STORAGE=$HOME/sweeps # a folder that all nodes share
NAME=mnist
SWEEP=(set dsr dense density=0.05 trials=100 epochs=20)
# ---- The rest can stay ---------------------------------------------------------------------------
set -euo pipefail
export PATH=$VENV/bin:$PATH
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 { print $1 }'):$((20000 + SLURM_JOB_ID % 10000))
# Others on these machines can reach the port: only who knows the token may use the cluster.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

# One Ray node on each of the job's; one that is lost does not end the others.
export address temp=/tmp/ray-$SLURM_JOB_ID
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  --cpus-per-task="$SLURM_CPUS_PER_TASK" --no-kill --kill-on-bad-exit=0 bash -c '
    options=(--block --temp-dir="$temp" --disable-usage-stats)
    options+=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
    [ "$SLURM_NODEID" != 0 ] || exec ray start --head --port="${address##*:}" \
      --node-ip-address="${address%:*}" --include-dashboard=false "${options[@]}"
    until ray start --address="$address" "${options[@]}"; do sleep 5; done' &
cluster=$!
until ray status --address="$address" >/dev/null 2>&1; do
  kill -0 $cluster # ends the job where Ray could not be started
  sleep 2
done

# Time is nearly up: the sweep is told to end in good order, and the job to come again.
again=""
trap 'again=1; kill -USR1 $driver' USR1
trap 'kill -TERM $driver' TERM
if [ -d "$STORAGE/$NAME" ]; then words=(resume "$NAME"); else words=(sweep "${SWEEP[@]}" "name=$NAME"); fi
sparsetune "${words[@]}" "storage=$STORAGE" "ray.address=$address" &
driver=$!
while kill -0 $driver 2>/dev/null; do wait $driver || true; done
status=0
wait $driver || status=$?
kill $cluster || true
wait $cluster || true
if [ -n "$again" ] && [ $status = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
