"""What the loops of image classifiers share: settings, batches, losses of ensembles, snapshots, scores, pictures."""
