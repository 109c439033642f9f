"""ConvNeXTIC: a codec with ConvNeXt blocks, an entry to the VCIP 2022 challenge."""
