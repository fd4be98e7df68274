"""The workflow's steps, from files to files. The scripts call them."""
