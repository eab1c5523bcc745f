"""Apple's disk images (UDIF): chunks in zlib, bzip2, LZMA, ADC or as they are, and a property list that places them."""
