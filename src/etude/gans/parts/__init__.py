"""What the GAN files share: networks, the ring, the Fréchet distance and its judge, stages, drawing, nulls."""
