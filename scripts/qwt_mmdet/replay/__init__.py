"""What it takes to run a detector in steps: activations that wait, modules that run something else."""
