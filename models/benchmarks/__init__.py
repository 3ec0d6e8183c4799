"""What serves benchmarks: posteriors with known answers, energies, image loaders."""

from pyro_nf.models.benchmarks import energies, fertility, hard_posteriors, images, motorcycle, posteriordb

__all__ = ["energies", "fertility", "hard_posteriors", "images", "motorcycle", "posteriordb"]
