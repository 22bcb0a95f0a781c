#!/bin/bash

# Parameters
#SBATCH --account='vision lab'
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=48
#SBATCH --error=FOLDER/out/submitit/%j/%j_0_log.err
#SBATCH --gpus-per-node=h100:4
#SBATCH --job-name=dinoscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/out/submitit/%j/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@180
#SBATCH --time=90
#SBATCH --wckey=submitit

# setup
module load cuda
source ~/venv/bin/activate

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/out/submitit/%j/%j_%t_log.out --error FOLDER/out/submitit/%j/%j_%t_log.err --cpus-per-task=48 PYTHON -u -m submitit.core._submit FOLDER/out/submitit/%j
