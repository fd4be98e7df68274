"""Images and annotations: where they come from, which are chosen, how they are read."""
