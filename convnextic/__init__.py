"""ConvNeXTIC: the VCIP 2022 challenge codec of ConvNeXt blocks."""
