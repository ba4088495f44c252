"""Random numbers from the operating system's cryptographic generator, for training in secure mode."""

from __future__ import annotations

import math
import os

import torch

MANTISSA, ONE = 2**52 - 1, 1023 << 52
"""Bits of a double: those behind the point, and the exponent of numbers from 1 to 2."""

AT_ONCE = {"cpu": 2**15, "cuda": 2**20}
"""Normal numbers that are made together, by the devices that can make them: on a CPU they stay in its cache."""


class Cryptographic:
    """Random numbers straight from ``os.urandom``, as many as are asked for.

    Nothing is kept between two calls, neither a key nor a position. So no process that is forked, no copy and no checkpoint
    can go on with the same numbers, and whoever reads the memory of a training later learns nothing about its noise.

    A normal number is half the sum of four from two independent Box-Muller pairs: ``r1 (cos a1 + sin a1) / 2 + ...``, in
    double precision, with 52 random bits in each of the four uniform numbers. A single Box-Muller number in floating point
    can only take values from which a sum that it was added to may be told (Mironov 2012, "On significance of the
    least significant bits for differential privacy"); for a sum of four, a search has to try some 2**156 combinations
    (Holohan and Braghin 2021, "Secure random sampling in differential privacy", section 5.1,
    https://arxiv.org/abs/2107.10138). Opacus adds up four in its secure mode, too. The largest number that can come out is
    12 standard deviations.
    """

    def anew(self) -> Cryptographic:
        """What a copy of a training draws from."""
        return self

    def uniform(self, number: int) -> torch.Tensor:
        """Uniform numbers.

        Returns:
            Shape ``[number]``, double precision, multiples of 2**-52 from 0 to 1 without 1.
        """
        return self._from_one_to_two(number) - 1

    def normal(self, number: int, device: torch.device) -> torch.Tensor:
        """Standard normal numbers.

        Args:
            device: where they are computed.

        Returns:
            Shape ``[number]``, double precision.
        """
        uniform = self._from_one_to_two(4 * number).to(device).view(4, number)
        radius = (2 - uniform[:2]).log_().mul_(-0.5).sqrt_()  # 2 - u lies above 0; a half of sqrt(-2 log)
        angle = uniform[2:].mul_(2 * math.pi)
        return angle.cos().add_(angle.sin_()).mul_(radius).sum(0)

    def add_normal(self, total: torch.Tensor, std: float) -> None:
        """Add normal numbers in double precision, and round once, to the precision of the sum.

        Args:
            total: what they are added to, in place.
            std: their standard deviation.
        """
        flat = total.view(-1) if total.is_contiguous() else total.flatten()
        device = total.device if total.device.type in AT_ONCE else torch.device("cpu")
        for part in flat.split(AT_ONCE[device.type]):
            part.copy_(self.normal(len(part), device).mul_(std).add_(part.to(device)))
        if not total.is_contiguous():
            total.copy_(flat.view(total.shape))

    def _from_one_to_two(self, number: int) -> torch.Tensor:
        if not number:
            return torch.empty(0, dtype=torch.float64)
        words = torch.frombuffer(bytearray(os.urandom(8 * number)), dtype=torch.int64)
        return words.bitwise_and_(MANTISSA).bitwise_or_(ONE).view(torch.float64)
