"""Looking into a trained network: input gradients, the pictures and checks made of them, and the network to look into."""
