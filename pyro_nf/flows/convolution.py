"""Convolution flows: circular and symmetric, with their own kernel or with one set by other coordinates."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyro_nf.flows.base import Flow
from pyro_nf.flows.coupling import Coupling
from pyro_nf.flows.numerics import soft_bound
from pyro_nf.interface.arguments import Count, Size, checked
from pyro_nf.networks import ContextParameters

# Gains of a frequency lie between e^-5 and e^5 = 148. A convolution mixes all frequencies in every coordinate: its
# inverse loses as many digits as the largest and the smallest gain are apart, here at most four.
LOG_GAIN_BOUND = 5.0


class CircularConvolution(Flow):
    r"""Circular convolution, `y_i = sum_n w_{i-n mod dim} x_n`, by a kernel w with a real cepstrum c.

    The spectrum of w is `exp(rfft(c))`, which is never zero, and that of its inverse `exp(-rfft(c))`.
    `log_det = sum_k log |exp(fft(c)_k)| = dim c_0`. Every w with an invertible matrix has a c, but for signs: the gains
    of frequency 0 and, if dim is even, of dim / 2 are positive here. c is softly shrunk so that all gains lie between
    e^-5 and e^5, and starts at zero: the identity. Both directions cost O(dim log dim).

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        Karami, Schuurmans, Sohl-Dickstein, Dinh, Duckworth (2019), "Invertible convolutional flow", NeurIPS 32. The
        cepstrum is ours.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.convolution import CircularConvolution
        >>> flow = CircularConvolution(4)
        >>> _ = torch.nn.init.constant_(flow.params.cepstrum[1], 0.1)  # w = exp(0.1 shift), roughly 1 + 0.1 shift
        >>> flow(torch.tensor([1.0, 0.0, 0.0, 0.0])).detach().round(decimals=2)
        tensor([1.0000, 0.1000, 0.0000, 0.0000])
    """

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        self.params = ContextParameters({"cepstrum": torch.zeros(dim)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve with w."""
        (cepstrum,) = self.params(context)
        y, terms = _convolve("circular", x, cepstrum)
        return y, terms.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve with the kernel of the opposite cepstrum."""
        (cepstrum,) = self.params(context)
        x, terms = _convolve("circular", y, -cepstrum)
        return x, terms.sum(-1)


class SymmetricConvolution(Flow):
    r"""Symmetric convolution, `y = C' diag(exp(s)) C x`, C the orthonormal discrete cosine transform (DCT-II).

    It is the convolution of x, reflected at both ends, with a symmetric kernel: a filter without the wrap-around of
    `CircularConvolution`, and without its phase shifts. `log_det = sum_k s_k`, with s softly bounded by +-5. s starts
    at zero: the identity. Both directions cost O(dim log dim).

    Args:
        dim: Number of coordinates.
        context_dim: Width of the context; 0 for none.

    References:
        Karami, Schuurmans, Sohl-Dickstein, Dinh, Duckworth (2019), "Invertible convolutional flow", NeurIPS 32.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.convolution import SymmetricConvolution
        >>> flow = SymmetricConvolution(4)
        >>> _ = torch.nn.init.constant_(flow.params.log_gain[0], -5.0)  # softly bounded to -2.5: damps the mean
        >>> flow(torch.ones(4)).detach()
        tensor([0.0821, 0.0821, 0.0821, 0.0821])
    """

    @checked
    def __init__(self, dim: Size, context_dim: Count = 0) -> None:
        super().__init__((dim,), context_dim)
        self.params = ContextParameters({"log_gain": torch.zeros(dim)}, context_dim)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Multiply each frequency by its gain."""
        (log_gain,) = self.params(context)
        y, terms = _convolve("symmetric", x, log_gain)
        return y, terms.sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Divide each frequency by its gain."""
        (log_gain,) = self.params(context)
        x, terms = _convolve("symmetric", y, -log_gain)
        return x, terms.sum(-1)


class ConvolutionCoupling(Coupling):
    r"""Coupling by a convolution, `y_a = x_a`, `y_b = (w(x_a) (*) x_b) exp(s(x_a)) + t(x_a)`.

    A network of `x_a`, zero at first, sets the cepstrum or the log gains of w, the log scales s (softly bounded by +-5)
    and the shifts t: the flow starts as the identity. `log_det` is that of the convolution plus `sum_b s_b`. Both
    directions cost one pass of the network and O(dim log dim). Masks and dim 1 are as in `Coupling`; the convolution
    runs over the coordinates of b in their order.

    Args:
        dim: Number of coordinates.
        mask: `dim` booleans, true where a coordinate is transformed, at least one; `None` for the second half.
        kind: `"circular"` or `"symmetric"`, as in the flows of these names.
        hidden_dims: Widths of the network's hidden layers.
        context_dim: Width of the context; 0 for none.

    Raises:
        ValueError: If there is no such `kind`, or `mask` is of the wrong length or transforms nothing.

    References:
        Karami, Schuurmans, Sohl-Dickstein, Dinh, Duckworth (2019), "Invertible convolutional flow", NeurIPS 32.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.convolution import ConvolutionCoupling
        >>> ConvolutionCoupling(4, kind="symmetric")(torch.arange(4.0)).detach()
        tensor([0., 1., 2., 3.])
    """

    @checked
    def __init__(
        self,
        dim: Size,
        mask: Sequence[bool] | None = None,
        kind: Literal["circular", "symmetric"] = "circular",
        hidden_dims: Sequence[Size] = (32, 32),
        context_dim: Count = 0,
    ) -> None:
        if kind not in _KINDS:
            raise ValueError(f"kind must be 'circular' or 'symmetric'; got {kind!r}")
        super().__init__(dim, mask, _Convolution(kind), hidden_dims, context_dim)


class _Convolution:
    """A transformer for `Coupling` alone: it mixes coordinates, and only the sum of its log-derivatives is right."""

    num_params = 3

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, scale and shift."""
        kernel, raw, shift = params.unbind(-1)
        log_scale = soft_bound(raw, LOG_GAIN_BOUND)
        y, terms = _convolve(self.kind, x, kernel)
        return y * log_scale.exp() + shift, terms + log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Shift, scale and convolve back."""
        kernel, raw, shift = params.unbind(-1)
        log_scale = soft_bound(raw, LOG_GAIN_BOUND)
        x, terms = _convolve(self.kind, (y - shift) * (-log_scale).exp(), -kernel)
        return x, terms - log_scale


def _circular(x: Tensor, cepstrum: Tensor) -> tuple[Tensor, Tensor]:
    log_spectrum = torch.fft.rfft(cepstrum)
    # Dividing c by 1 + max_k |log gain_k| / bound is `soft_bound` of the largest log gain, and keeps c a cepstrum.
    shrink = 1 + log_spectrum.real.abs().amax(-1, keepdim=True) / LOG_GAIN_BOUND
    y = torch.fft.irfft((log_spectrum / shrink).exp() * torch.fft.rfft(x), n=x.shape[-1])
    # The matrix has the eigenvalues exp(fft(c)_k), k = 0 .. dim - 1, so log |det| is the real part of
    # sum_k fft(c)_k = sum_n c_n sum_k exp(-2 pi i k n / dim) = dim c_0: the inner sum is dim at n = 0 and else 0.
    return y, (cepstrum[..., :1] / shrink).expand(y.shape)


def _symmetric(x: Tensor, log_gain: Tensor) -> tuple[Tensor, Tensor]:
    log_gain = soft_bound(log_gain, LOG_GAIN_BOUND)
    # With r = (x_0 .. x_{d-1}, x_{d-1} .. x_0), fft(r)_k = 2 exp(i pi k / 2d) sum_n x_n cos(pi k (2n + 1) / 2d): the
    # DCT-II of x, times a phase that cancels on the way back. At k = d all cosines are 0: any gain will do.
    reflected = torch.cat([x, x.flip(-1)], -1)
    gain = torch.nn.functional.pad(log_gain.exp(), (0, 1))
    y = torch.fft.irfft(gain * torch.fft.rfft(reflected), n=reflected.shape[-1])[..., : x.shape[-1]]
    return y, log_gain.expand(y.shape)


_KINDS = {"circular": _circular, "symmetric": _symmetric}


def _convolve(kind: str, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the convolution, and dim terms whose sum is its log-determinant; minus `kernel` gives the inverse."""
    if x.numel() == 0 or kernel.numel() == 0:  # MKL's transforms refuse empty batches
        return x * kernel, x * kernel
    return _KINDS[kind](x, kernel)
