"""The bridge to Asteroid (optional extra).

Asteroid puts the batch first in masks, SpeechBrain the sources.
"""

from torch import nn


class AsteroidMaskNet(nn.Module):
    """An Asteroid masker as a SpeechBrain masknet.

    Arguments
    ---------
    masker : torch.nn.Module
        [batch, channels, frames] -> [batch, n_src, channels, frames], like
        ``asteroid.masknn.convolutional.TDConvNet``.

    Example
    -------
    >>> from torch import nn
    >>> class Halves(nn.Module):
    ...     def forward(self, mix_w):
    ...         return 0.5 * mix_w.new_ones(len(mix_w), 2, *mix_w.shape[1:])
    >>> import torch
    >>> AsteroidMaskNet(Halves())(torch.randn(3, 16, 10)).shape
    torch.Size([2, 3, 16, 10])
    """

    def __init__(self, masker):
        super().__init__()
        self.masker = masker

    def forward(self, mix_w):
        """[batch, channels, frames] -> [num_spks, batch, channels, frames]."""
        return self.masker(mix_w).transpose(0, 1)


class AsteroidMasker(nn.Module):
    """A SpeechBrain masknet, ours for one, in Asteroid's masker slot.

    Arguments
    ---------
    masknet : torch.nn.Module
        [batch, channels, frames] -> [num_spks, batch, channels, frames].

    Example
    -------
    >>> import torch
    >>> from trackformer_sb.nnet.masknet import PerformerMaskNet
    >>> masknet = PerformerMaskNet(16, 4, d_model=32, num_layers=1)
    >>> AsteroidMasker(masknet)(torch.randn(3, 16, 10)).shape
    torch.Size([3, 4, 16, 10])
    """

    def __init__(self, masknet):
        super().__init__()
        self.masknet = masknet

    def forward(self, mix_w):
        """[batch, channels, frames] -> [batch, num_spks, channels, frames]."""
        return self.masknet(mix_w).transpose(0, 1)
