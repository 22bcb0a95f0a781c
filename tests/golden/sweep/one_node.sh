#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=72
#SBATCH --error=FOLDER/out/submitit/%j/%j_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=dinoscale
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/out/submitit/%j/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@180
#SBATCH --time=1440
#SBATCH --wckey=submitit

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/out/submitit/%j/%j_%t_log.out --error FOLDER/out/submitit/%j/%j_%t_log.err --cpus-per-task=72 PYTHON -u -m submitit.core._submit FOLDER/out/submitit/%j
