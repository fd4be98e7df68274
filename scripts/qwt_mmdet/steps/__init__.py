"""The workflow's steps, from files to files: what the scripts call, one module for steps that are alike."""
