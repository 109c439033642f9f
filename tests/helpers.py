"""Codecs for tests of common/: CompressAI's smallest models under the contract of a paper's."""

from common.coding.contract import Codec

from compressai import models


class FactorizedPrior(models.FactorizedPrior, Codec):
    tag = b"test"


class ScaleHyperprior(models.ScaleHyperprior, Codec):
    tag = b"test"
