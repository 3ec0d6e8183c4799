"""What the gradients of a log density give without a network: modes, the nearest normal, the nearest transport map."""
