"""The foundations: risk, regularisation, backpropagation, feed-forward networks, ensembles."""
