"""What is true, from what several people say of it."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def dawid_skene(labels: Tensor, annotators: Tensor, num_classes: int | None = None) -> None:
    """Annotators with error rates of their own, who label the same items.

    `truth_i ~ Categorical(share)`, and `labels_ij ~ Categorical(confusion[annotator_j, truth_i])`.
    The priors: `share ~ Dirichlet(1, ..., 1)`; `confusion[a, k] ~ Dirichlet`, with the concentration 4 for the right
    label and 1 for each other, which also tells the classes apart.

    Args:
        labels: What each assessment of each item says, `(items, assessments)`, of 0 to K - 1.
        annotators: Who made the assessment, `(assessments,)`, of 0 to annotators - 1.
        num_classes: K; the largest label and 1 by default.

    References:
        Dawid and Skene (1979), "Maximum likelihood estimation of observer error-rates using the EM algorithm".
    """
    if num_classes is None:
        num_classes = int(labels.max()) + 1
    num_items, num_assessments = labels.shape
    like = torch.ones(num_classes, device=labels.device)
    share = pyro.sample("share", dist.Dirichlet(like))
    with pyro.plate("class", num_classes, dim=-1), pyro.plate("annotator", int(annotators.max()) + 1, dim=-2):
        confusion = pyro.sample("confusion", dist.Dirichlet(like + 3.0 * torch.diag(like)))
    with pyro.plate("item", num_items, dim=-2):
        truth = pyro.sample("truth", dist.Categorical(share))
        with pyro.plate("assessment", num_assessments, dim=-1):
            pyro.sample("labels", dist.Categorical(confusion[annotators, truth]), obs=labels)
