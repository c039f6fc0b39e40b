"""What detectors share: boxes, suppression, average precision, scenes, pictures."""
