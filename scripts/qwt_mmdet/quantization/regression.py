"""Streaming sums of a linear regression of a layer's outputs on the inputs of its weights."""

import torch
from torch import Tensor


class RegressionSums:
    """Weighted means and centred second moments of vectors x [groups, n, in] and y [groups, n, out].

    Products are computed in single precision, after a shift near the mean, and summed in float64. Memory does
    not grow with the number of vectors.

    Args:
        columns: of x.
        width: of a chunk of columns. Columns of different chunks count as not correlated. With more than one
            chunk there are no moments of x with y.
        batch: number of vectors that are multiplied together, since adding up [in, in] costs more than
            multiplying a few vectors.
    """

    def __init__(self, columns: int, width: int, batch: int) -> None:
        self.widths = [len(chunk) for chunk in torch.arange(columns).split(width)]
        self.batch = batch
        self.count = 0.0
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._origin: tuple[Tensor, Tensor]
        self._sums: list[Tensor] = []

    @property
    def is_empty(self) -> bool:
        """True until vectors were added."""
        return not self._sums and not self._waiting

    def update(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add vectors with weights [n], or with ones; without y, for the moments of x alone."""
        if y is None:
            y = x.new_empty(*x.shape[:2], 0)
        if weight is None:
            weight = x.new_ones(x.shape[1])
        self._waiting.append((x, y, weight))
        if sum(len(w) for *_, w in self._waiting) >= self.batch:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        x, y, weight = (
            torch.cat(parts, axis) if len(parts) > 1 else parts[0]
            for parts, axis in zip(zip(*self._waiting, strict=True), (1, 1, 0), strict=True)
        )
        self._waiting.clear()
        if not self._sums:
            self._origin = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._origin[0], y - self._origin[1]
        weighted = x * weight[:, None]
        chunks = zip(weighted.split(self.widths, 2), x.split(self.widths, 2), strict=True)
        new = [
            weighted.sum(1, dtype=torch.float64),
            (y * weight[:, None]).sum(1, dtype=torch.float64),
            *[(w.transpose(1, 2) @ p).double() for w, p in chunks],
        ]
        if len(self.widths) == 1:
            new.append((weighted.transpose(1, 2) @ y).double())
        if self._sums:
            for kept, added in zip(self._sums, new, strict=True):
                kept += added
        else:
            self._sums = new
        self.count += float(weight.sum(dtype=torch.float64))

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of x [groups, in] and of y [groups, out], float64."""
        self._add_waiting()
        return tuple(
            origin[:, 0].double() + total / self.count
            for origin, total in zip(self._origin, self._sums[:2], strict=True)
        )  # type: ignore[return-value]

    def moments(self, *, centred: bool) -> tuple[list[Tensor], Tensor | None]:
        """Second moments of x, a chunk [groups, columns, columns] each, and of x with y [groups, in, out].

        Args:
            centred: about the means.
        """
        mean_x, mean_y = self.means()
        sum_x, sum_y = self._sums[:2]
        products = [total / self.count for total in self._sums[2:]]
        near_x, near_y = sum_x / self.count, sum_y / self.count  # from the origins
        cross = products.pop() if len(self.widths) == 1 else None

        def shifted(
            product: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]
        ) -> Tensor:
            moment = product - near[0][:, :, None] * near[1][:, None]
            return moment if centred else moment + far[0][:, :, None] * far[1][:, None]

        squares = [
            shifted(product, (near, near), (far, far))
            for product, near, far in zip(
                products, near_x.split(self.widths, 1), mean_x.split(self.widths, 1), strict=True
            )
        ]
        if cross is not None:
            cross = shifted(cross, (near_x, near_y), (mean_x, mean_y))
        return squares, cross


def ridge_towards(weight: Tensor, squares: Tensor, cross: Tensor, strength: float) -> Tensor:
    """argmin over W of E‖y − W x‖² + λ ‖W − weight‖², λ = strength · the mean of the diagonal of E[x xᵀ].

    Args:
        weight: [groups, out, in].
        squares: E[x xᵀ], [groups, in, in]. cross: E[x yᵀ], [groups, in, out]; float64.

    Returns:
        [groups, out, in], float64. The weight of an input that is always 0 does not change.
    """
    weight = weight.double()
    left = cross - squares @ weight.transpose(1, 2)
    diagonal = squares.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    ridge = torch.where(mean > 0, strength * mean, 1.0).expand_as(diagonal)
    change = torch.linalg.solve(squares + torch.diag_embed(ridge), left)
    return weight + change.transpose(1, 2)
