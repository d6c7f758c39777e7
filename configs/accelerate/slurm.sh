#!/bin/bash
# Several machines with several GPUs each, started by Slurm; any number of both.
#   sbatch --nodes 2 --gpus-per-node 8 configs/accelerate/slurm.sh CONFIG [key=value ...]
# Before the time limit the stage saves and ends; the same command again goes on where it stopped.
#SBATCH --job-name=mmllm
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=mmllm-%j.log
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN="${hosts%%$'\n'*}" # the first line
# One launcher a machine; what is in quotes is read there, with that machine's own variables.
# shellcheck disable=SC2016
srun bash -c 'exec accelerate launch \
	--config_file configs/accelerate/multi-node.yaml \
	--num_machines "$SLURM_NNODES" \
	--num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
	--machine_rank "$SLURM_NODEID" \
	--main_process_ip "$MAIN" \
	train/train.py "$@" --resume' _ "$@"
