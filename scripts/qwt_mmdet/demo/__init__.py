"""The demo: its images, and the training of its detector."""
