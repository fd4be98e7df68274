"""What a detector is worth: COCO metrics and how sure they are."""
