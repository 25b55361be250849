"""What gathered latents tell: effective rank, similarity of text and image, sources, reconstruction, two dimensions.

Pure functions. Shapes: N samples, Z latent width, C episode width, V width of the image vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

RIDGE = 1e-2  # of the kernel's mean diagonal


def effective_rank(x: Float[Tensor, "N Z"]) -> Float[Tensor, ""]:
    """exp of the entropy of the singular values, as shares of their sum (Roy and Vetterli 2007, definition 1)."""
    if not x.isfinite().all():  # which torch.linalg refuses
        return x.new_tensor(torch.nan)
    values = torch.linalg.svdvals(x.double())
    share = values / values.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum().exp()


def similarity(
    text: Float[Tensor, "N Z"], vision: Float[Tensor, "N Z"], image_ids: Int[Tensor, "N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean cosine of (a text and its own image, a text and the image of another sample); NaN where there is none."""
    cosines = F.normalize(text.double(), dim=-1) @ F.normalize(vision.double(), dim=-1).T
    others = image_ids[:, None] != image_ids
    return torch.diagonal(cosines).mean(), cosines[others].mean()


def source_consistency(latents: Float[Tensor, "N Z"], sources: Int[Tensor, "N"]) -> Float[Tensor, ""]:
    """Mean cosine of two latents of different sources; NaN where there is one source alone."""
    unit = F.normalize(latents.double(), dim=-1)
    return (unit @ unit.T)[sources[:, None] != sources].mean()


def reconstruction(
    episodes: Float[Tensor, "N C"], vectors: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(mean squared, mean absolute) error of each image vector rebuilt from its episode by a linear map that was fitted
    to the others.

    Ridge regression with an intercept's worth of centring, in its dual form; the error of the sample that is left out
    is [A^-1 Y]_i / [A^-1]_ii with A = E E^T + ridge (Hastie et al. 2009, The Elements of Statistical Learning, 7.10.1
    and 12.3.7).
    """
    if not (episodes.isfinite().all() and vectors.isfinite().all()):
        return episodes.new_tensor(torch.nan), episodes.new_tensor(torch.nan)
    e, y = episodes.double(), vectors.double()
    e = torch.cat([e, e.new_ones(len(e), 1) * e.norm(dim=1).mean()], dim=1)  # the last column carries the mean
    kernel = e @ e.T
    kernel = kernel + RIDGE * torch.diagonal(kernel).mean().clamp(min=1e-12) * torch.eye(len(e), device=e.device)
    inverse = torch.linalg.inv(kernel)
    errors = inverse @ y / torch.diagonal(inverse)[:, None]
    return errors.square().mean(), errors.abs().mean()


def principal_plane(x: Float[Tensor, "N Z"]) -> tuple[Float[Tensor, "N 2"], Float[Tensor, "2"]]:
    """(coordinates on the first two principal components, their shares of the variance); NaN where x is not finite."""
    if not x.isfinite().all():
        return x.new_full((len(x), 2), torch.nan), x.new_full((2,), torch.nan)
    centred = x.double() - x.double().mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = centred @ directions[:2].T
    return F.pad(plane, (0, 2 - plane.shape[1])), F.pad(
        values[:2].square() / values.square().sum().clamp(min=1e-30), (0, 2 - len(values[:2]))
    )


def nearest_is_own(
    text: Float[Tensor, "N Z"],
    vision: Float[Tensor, "N Z"],
    image_ids: Int[Tensor, "N"],
    counted: Bool[Tensor, "N"],
) -> Float[Tensor, ""]:
    """Share of texts whose nearest image of the pool, by cosine, is their own (recall at 1); NaN of an empty pool."""
    text, vision, ids = text[counted].double(), vision[counted].double(), image_ids[counted]
    if not len(ids):
        return torch.tensor(torch.nan)
    cosines = F.normalize(text, dim=-1) @ F.normalize(vision, dim=-1).T
    return (ids[cosines.argmax(1)] == ids).double().mean()
