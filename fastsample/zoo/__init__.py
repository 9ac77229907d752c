"""What is built in: real images of digits and a network trained on them, exact denoisers of known distributions."""

from .digits import digits, digits_network
from .exact import Empirical, GaussianMixture

__all__ = ["Empirical", "GaussianMixture", "digits", "digits_network"]
