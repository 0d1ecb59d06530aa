"""Random matrices in float64, some with a planted spectrum: what tests of spectra share."""

import torch


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def planted(S, shape=(40, 30), seed=0):
    """A matrix with the singular values S."""
    U = torch.linalg.qr(gaussian(shape[0], len(S), seed=seed)).Q
    V = torch.linalg.qr(gaussian(shape[1], len(S), seed=seed + 1)).Q
    return U @ torch.diag(torch.as_tensor(S, dtype=torch.float64)) @ V.T
